"""The sections of RESULTS.md about speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ceilings
import numpy as np
from names import FULL, PAPER_STEPS, STEP_AWARE, TORCH, UPDATE
from tables import instructions, table, with_quartiles

Rounds = dict[tuple[str, str], np.ndarray]


def inference(content: Mapping[str, Any]) -> Iterator[str]:
    """Steps of every runtime, width and batch size."""
    network = content["network"]
    macs = {width: float(value) for width, value in network["macs"].items()}
    side, _, channels = network["image_shape"]
    yield f"## Speed of a step of `{network['preset']}`: {instructions(content['provenance'])}"
    yield ""
    yield (
        f"The `{network['preset']}` network ({side}×{side}×{channels}, random weights) on every "
        f"runtime, {network['threads']} threads. The ceiling is a 3×3 convolution, "
        f"{ceilings.CHANNELS} to {ceilings.CHANNELS} channels at {ceilings.SIDE}×{ceilings.SIDE}, "
        "float32, of the library that is fastest at it; int8 may pass it. Saved: the share of full "
        "width's time that the paper's CIFAR-10 schedule saves, over the "
        f"{_macs_saved(macs):.1%} of MACs that it saves."
    )
    yield ""
    products = content["matmul"].items()
    yield (
        f"Product of two {ceilings.MATMUL_SIDE}×{ceilings.MATMUL_SIDE} matrices, float32: "
        + ", ".join(f"{name} {found['median']:.0f}" for name, found in products)
        + " GMAC/s."
    )
    for name, found in content.items():
        if name.startswith("batch_"):
            yield ""
            yield from _batch(int(name.removeprefix("batch_")), found, macs)


def _batch(batch: int, found: Mapping[str, Any], macs: Mapping[str, float]) -> Iterator[str]:
    rounds = _rounds(found)
    names = list(dict.fromkeys(name for name, _ in rounds if name != "convolution"))
    speeds = {
        library: batch * ceilings.CONVOLUTION_MACS / seconds / 1e9
        for (name, library), seconds in rounds.items()
        if name == "convolution"
    }
    ceiling = max(speeds.values(), key=np.median)
    named = ", ".join(f"{library} {np.median(speed):.0f}" for library, speed in speeds.items())
    yield f"Batch {batch}. Convolution: {named} GMAC/s."
    yield ""
    head = ["ms", *(f"width {float(width):g}" for width in macs)]
    head += ["of the ceiling", "saved", f"as fast as {TORCH}", "furthest from Keras"]
    rows = []
    for name in names:
        full = rounds[name, "1.0"]
        share = batch * macs["1.0"] / full / 1e9 / ceiling
        cells = [with_quartiles(1e3 * rounds[name, width], 1) for width in macs]
        cells += [with_quartiles(share, 2), with_quartiles(_saved(rounds, name, macs), 2)]
        against = rounds[TORCH, "1.0"] / full if (TORCH, "1.0") in rounds else None
        cells += ["" if against is None else f"{with_quartiles(against, 2)} ×"]
        rows.append([name, *cells, f"{found['error'][name]:.1e}"])
    yield from table(head, rows)


def _rounds(found: Mapping[str, Any]) -> Rounds:
    """(what, which) → seconds in each round."""
    split = {tuple(key.rsplit(", ", 1)): np.array(value) for key, value in found["rounds"].items()}
    return {(name, which): seconds for (name, which), seconds in split.items()}


def _macs_saved(macs: Mapping[str, float]) -> float:
    steps = sum(PAPER_STEPS.values())
    spent = sum(count * macs[str(width)] for width, count in PAPER_STEPS.items())
    return 1.0 - spent / (steps * macs["1.0"])


def _saved(rounds: Rounds, name: str, macs: Mapping[str, float]) -> np.ndarray:
    """Time saved over MACs saved by the paper's schedule, round by round."""
    steps = sum(PAPER_STEPS.values())
    spent = sum(count * rounds[name, str(width)] for width, count in PAPER_STEPS.items())
    return (1.0 - spent / (steps * rounds[name, "1.0"])) / _macs_saved(macs)


def trajectories(content: Mapping[str, Any]) -> Iterator[str]:
    """Step-aware trajectories beside those of full width."""
    network = content["network"]
    steps = sum(network["steps"].values())
    yield f"## Speed of whole trajectories: {instructions(content['provenance'])}"
    yield ""
    yield (
        f"The `{network['preset']}` network sampled with {steps} steps in the proportions of the "
        f"paper's CIFAR-10 schedule ({network['macs_saved']:.1%} of the MACs saved), and with the "
        f"same steps at full width; {network['threads']} threads. Images, noise and all: what a "
        "caller waits for."
    )
    for name, found in content.items():
        if not name.startswith("batch_"):
            continue
        rounds = _rounds(found)
        names = dict.fromkeys(each for each, _ in rounds)
        yield ""
        yield f"Batch {name.removeprefix('batch_')}."
        yield ""
        head = ["seconds", FULL, STEP_AWARE, "time saved / MACs saved"]
        head += [f"{STEP_AWARE}, as fast as {TORCH} at {FULL}"]
        yield from table(head, [_trajectory(rounds, each, network) for each in names])


def _trajectory(rounds: Rounds, name: str, network: Mapping[str, Any]) -> list[str]:
    full, aware = rounds[name, FULL], rounds[name, STEP_AWARE]
    saved = (1.0 - aware / full) / network["macs_saved"]
    against = rounds[TORCH, FULL] / aware
    return [
        name,
        with_quartiles(full, 2),
        with_quartiles(aware, 2),
        with_quartiles(saved, 2),
        f"{with_quartiles(against, 2)} ×",
    ]


def training(content: Mapping[str, Any]) -> Iterator[str]:
    """Steps of the sandwich rule beside a step of the full width."""
    found = content["steps"]
    macs = {float(width): float(value) for width, value in found["macs"].items()}
    widest = max(macs)
    yield f"## Speed of a training step: {instructions(content['provenance'])}"
    yield ""
    yield (
        f"The `{found['preset']}` network, base {found['base_channels']}, batch {found['batch']}, "
        f"{found['threads']} threads: a whole step of `fit`. Predicted: the MACs of the widths "
        "that it trains over those of the widest."
    )
    yield ""
    full = np.array(found["rounds"][f"{widest:g}"])
    rows = []
    for name, seconds in found["rounds"].items():
        cells = [name, with_quartiles(1e3 * np.array(seconds), 0)]
        ratio = np.array(seconds) / full
        if name == UPDATE:
            rows.append([*cells, with_quartiles(ratio, 2), "", ""])
            continue
        predicted = sum(macs[float(width)] for width in name.split(", ")) / macs[widest]
        measured = (
            with_quartiles(ratio, 2),
            f"{predicted:.2f}",
            with_quartiles(ratio / predicted, 2),
        )
        rows.append([*cells, *measured])
    head = ["widths", "ms", "over a step of full width", "predicted", "over the prediction"]
    yield from table(head, rows)
