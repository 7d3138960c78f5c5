"""What a source holds: counts, sizes, ranges, labels, and a picture of some images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.images import image_grid, save_png
from ddsm_tf.training.data import fit_image
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.sources import open_source

SHOWN_IMAGES = 64
NAMED_FILES = 20


def inspect_source(
    name: str, *, size: int | None, channels: int | None, out: Path | None
) -> dict[str, Any]:
    """Read a whole source and describe it.

    Args:
        name: see `ddsm_tf.training.sources`.
        size: side of the images in the picture; None takes the smallest side there is.
        channels: of the images in the picture; None takes the most there are.
        out: where the picture goes, a `.png`; None draws none.

    Returns:
        `images`, `widths` and `heights` (smallest, median, largest), `modes` (Pillow's name → how
        many), `range` and `mean` and `standard_deviation` of the values, 0 to 255, `labels` (class
        → how many, or None), `unreadable` (how many) and `unreadable_files` (the first of them).

    Raises:
        InputError: see `open_source`.
    """
    source = open_source(name)
    random = np.random.default_rng(0)
    shown: list[Any] = []
    sizes, modes, labels = [], Counter(), Counter()
    low, high, total, squares, values = 255, 0, 0.0, 0.0, 0
    with progress_bar(source.count, "images") as bar:
        for index, (image, label) in enumerate(source.read()):
            pixels = np.asarray(image)
            sizes.append(pixels.shape[:2])
            modes[_mode(image)] += 1
            labels[label] += 1
            low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
            wide = pixels.astype(np.float64)
            total, squares = total + wide.sum(), squares + np.square(wide).sum()
            values += pixels.size
            _keep_some(shown, image, index, random)
            bar.update()
    heights, widths = np.array(sizes).T
    if out is not None:
        side = size or int(min(heights.min(), widths.min()))
        count = channels or max(_channels(image) for image in shown)
        fitted = np.stack([fit_image(image, side, count) for image in shown])
        save_png(image_grid(fitted), out, scale=max(1, 48 // side))
    mean = total / values
    return {
        "images": len(sizes),
        "widths": _spread(widths),
        "heights": _spread(heights),
        "modes": dict(modes.most_common()),
        "range": [low, high],
        "mean": mean,
        "standard_deviation": float(np.sqrt(max(squares / values - mean**2, 0.0))),
        "labels": _label_counts(labels, source.classes),
        "unreadable": len(source.unreadable),
        "unreadable_files": source.unreadable[:NAMED_FILES],
    }


def _keep_some(shown: list[Any], image: Any, index: int, random: np.random.Generator) -> None:
    """Reservoir sampling: every image has the same chance, however many there are."""
    if len(shown) < SHOWN_IMAGES:
        shown.append(image)
    elif (place := int(random.integers(index + 1))) < SHOWN_IMAGES:
        shown[place] = image


def _mode(image: Any) -> str:
    if isinstance(image, np.ndarray):
        return {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[_channels(image)]
    return image.mode


def _channels(image: Any) -> int:
    if isinstance(image, np.ndarray):
        return image.shape[2] if image.ndim == 3 else 1
    return {"L": 1, "LA": 2, "RGBA": 4, "1": 1}.get(image.mode, 1 if image.mode[0] == "I" else 3)


def _spread(values: np.ndarray) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _label_counts(labels: Counter, classes: tuple[str, ...]) -> dict[str, int] | None:
    if None in labels:
        return None
    names = {label: classes[label] if label < len(classes) else str(label) for label in labels}
    return {names[label]: labels[label] for label in sorted(labels)}
