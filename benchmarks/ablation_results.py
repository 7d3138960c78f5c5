"""The section of RESULTS.md about ablations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tables import table

from ddsm_tf.training.presets import get_preset

BASELINE = "baseline"


def section(content: Mapping[str, Any]) -> Iterator[str]:
    """Every variant beside the baseline: error and distance of each width."""
    settings, results = content["settings"], _by_variant(content)
    widths = [str(float(width)) for width in settings["widths"]]
    seeds = sorted(results[BASELINE])
    preset = get_preset(settings["preset"])
    others = [name for name in results if name != BASELINE]
    yield f"## Ablations: `{preset.preset}`" + (f", {others[0]}" if len(others) == 1 else "")
    yield ""
    yield (
        f"{preset.image_size}×{preset.image_size} images, base {settings['base_channels']}; every "
        f"variant is trained for as many MACs as {settings['steps']} steps of the baseline, from "
        f"seeds {', '.join(map(str, seeds))}. Error: of the predicted noise on "
        f"{settings['held_out_images']} held-out images, over the baseline's of the same seed and "
        "width (below 1 is better). Distance: Fréchet, on features of a classifier of these "
        f"images, {settings['sampled_images']} samples of {settings['sampling_steps']} steps, all "
        "at one width. Mean over seeds ± half of their range."
    )
    for key, digits in (("error", 3), ("distance", 1)):
        yield ""
        head = ["error / baseline's" if key == "error" else "distance", "steps"]
        head += [f"width {float(width):g}" for width in widths]
        rows = [
            [name, str(found[seeds[0]]["steps"]), *_cells(found, results[BASELINE], key, digits)]
            for name, found in results.items()
        ]
        yield from table(head, rows)
    yield ""
    for name, found in results.items():
        yield f"- `{name}`: {found[seeds[0]]['about']}"


def _by_variant(content: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Variant → seed → what was measured; variants that lack a seed of the baseline's stay out."""
    found: dict[str, dict[int, Any]] = {}
    for key, result in content.items():
        name, is_training, seed = key.partition(", seed ")
        if is_training:
            found.setdefault(name, {})[int(seed)] = result
    return {name: seeds for name, seeds in found.items() if set(seeds) == set(found[BASELINE])}


def _cells(
    found: Mapping[int, Any], default: Mapping[int, Any], key: str, digits: int
) -> Iterator[str]:
    for width in found[min(found)][key]:
        values = np.array([found[seed][key][width] for seed in found])
        if key == "error":
            values = values / [default[seed][key][width] for seed in found]
        half_range = (values.max() - values.min()) / 2
        yield f"{values.mean():.{digits}f} ± {half_range:.{digits}f}"
