"""Images of a source at one size, in memory or mapped from a file, and what is held out of them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import atomic_folder, read_json, write_json
from ddsm_tf.training.pipeline import training_batches
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.sources import Source, open_source, pillow

__all__ = ["ImageSet", "Rows", "load_images", "split_images", "training_batches"]

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# Larger sets are kept in a file and mapped, where a folder for it is given.
MEMORY_BYTES = 2 * 2**30
_IMAGES, _ABOUT = "images.npy", "about.json"


class Rows:
    """Some rows of an array that is too large to copy them, such as one mapped from a file.

    Args:
        array: (N, …).
        rows: integers (M,), which of them.
    """

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self._array, self._rows = array, rows
        self.dtype = array.dtype
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._array[self._rows[index]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._array[self._rows], dtype)


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        images: uint8 (N, H, W, C); an array, one mapped from a file, or `Rows` of one.
        labels: int64 (N,), or None.
    """

    images: Any
    labels: np.ndarray | None


def load_images(
    source: str, image_size: int, channels: int, cache: str | os.PathLike | None = None
) -> ImageSet:
    """Read a source; centre-crop to a square and resize (antialiased), convert channels.

    Files that cannot be read are named on stderr and left out.

    Args:
        source: see `ddsm_tf.training.sources`.
        image_size: side in pixels.
        channels: 1 to 4.
        cache: folder for images of more than `MEMORY_BYTES`, which are fitted once and mapped;
            None keeps any number in memory.

    Raises:
        InputError: the source is malformed, missing or unreadable, or holds no such images.
    """
    opened = open_source(source)
    size = opened.count * image_size**2 * channels
    if cache is None or size <= MEMORY_BYTES:
        read = list(_fitted(opened, image_size, channels))
        _check_count(opened, len(read))
        images, labels = zip(*read, strict=True)
        return ImageSet(np.stack(images), _labels(labels))
    key = f"{source} {image_size} {channels} {opened.fingerprint}"
    folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        try:
            _write_cache(opened, image_size, channels, folder)
        except InputError:
            # Another worker of the same run may have been first.
            if not folder.exists():
                raise
    return _read_cache(folder)


def _fitted(
    source: Source, image_size: int, channels: int
) -> Iterator[tuple[np.ndarray, int | None]]:
    with progress_bar(source.count, "images") as bar:
        for image, label in source.read():
            yield fit_image(image, image_size, channels), label
            bar.update()


def _labels(labels: Any) -> np.ndarray | None:
    return None if None in labels else np.array(labels, np.int64)


def _check_count(source: Source, count: int) -> None:
    """Name what was left out; `InputError` if too little is left."""
    if count < 2:
        rule = f"holds {count} readable images; at least 2 are needed"
        raise invalid("data", source.name, rule)
    if source.unreadable:
        some = ", ".join(source.unreadable[:3])
        rest = "" if len(source.unreadable) <= 3 else ", …"
        print(
            f"{source.name}: {len(source.unreadable)} unreadable files are left out: {some}{rest}",
            file=sys.stderr,
        )


def _write_cache(source: Source, image_size: int, channels: int, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        shape = (source.count, image_size, image_size, channels)
        mapped = np.lib.format.open_memmap(temporary / _IMAGES, "w+", np.uint8, shape)
        labels = []
        for index, (image, label) in enumerate(_fitted(source, image_size, channels)):
            mapped[index] = image
            labels.append(label)
        mapped.flush()
        known = _labels(labels)
        about = {"source": source.name, "count": len(labels)}
        _check_count(source, len(labels))
        write_json(temporary / _ABOUT, {**about, "labels": None if known is None else labels})


def _read_cache(folder: Path) -> ImageSet:
    about = read_json(folder / _ABOUT, argument="cache")
    try:
        images = np.load(folder / _IMAGES, mmap_mode="r", allow_pickle=False)
        labels = about["labels"]
        # Unreadable files leave blank rows at the end.
        return ImageSet(
            images[: about["count"]], None if labels is None else np.array(labels, np.int64)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise invalid("cache", str(folder), f"is broken ({error}); delete it") from error


def check_classes(images: ImageSet, source: str, num_classes: int) -> None:
    """Raise `InputError` unless every image has a label in [0, num_classes)."""
    if images.labels is None:
        rule = "has no labels; conditional training needs them (or --set num_classes=0)"
        raise invalid("data", source, rule)
    low, high = images.labels.min(), images.labels.max()
    if low < 0 or high >= num_classes:
        rule = f"must be above every label; {source} has labels from {low} to {high}"
        raise invalid("num_classes", num_classes, rule)


def split_images(images: ImageSet, held_out: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to train on and images that training never sees; at most a tenth are held out.

    Args:
        images: all of them.
        held_out: how many to hold out.
        seed: fixes which.
    """
    count = len(images.images)
    order = np.random.default_rng([seed, 2]).permutation(count)
    held_out = min(held_out, count // 10)
    return tuple(
        ImageSet(_take(images.images, rows), None if images.labels is None else images.labels[rows])
        for rows in (np.sort(order[held_out:]), np.sort(order[:held_out]))
    )


def _take(images: np.ndarray, rows: np.ndarray) -> Any:
    return Rows(images, rows) if isinstance(images, np.memmap) else images[rows]


def fit_image(image: Any, size: int, channels: int) -> np.ndarray:
    """One array or Pillow image as uint8 (size, size, channels)."""
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, channels):
            return image
        image = pillow().fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if image.mode.startswith("I"):
        # Sixteen bits of grey: Pillow's own conversion would turn all above 255 white.
        image = pillow().fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    image = image.convert(MODES[channels])
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    fitted = image.resize((size, size), pillow().Resampling.LANCZOS, box=box)
    return np.asarray(fitted, np.uint8).reshape(size, size, channels)
