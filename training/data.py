"""Image sources, and batches whose order is a pure function of the seed.

A source is a text: `digits` (inside scikit-learn), `npz:FILE[:KEY]`, `folder:DIR` or
`tfds:NAME[:SPLIT]`. Whatever it holds becomes uint8 images of one size.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid, missing_extra
from ddsm_tf.images import to_float

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
IMAGE_KEYS = ("images", "x_train", "train_images", "x", "arr_0")
LABEL_KEYS = ("labels", "y_train", "train_labels", "y")
BROKEN_ARCHIVE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, AttributeError)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,), or None.
    """

    images: np.ndarray
    labels: np.ndarray | None


def load_images(source: str, image_size: int, channels: int) -> ImageSet:
    """Read a source; resize (antialiased) and centre-crop to a square, convert channels.

    Args:
        source: see the module's text.
        image_size: side in pixels.
        channels: 1 to 4.

    Raises:
        InputError: the source is malformed, missing or unreadable, or holds no such images.
    """
    kind, _, rest = source.partition(":")
    readers = {"digits": _digits, "npz": _npz, "folder": _folder, "tfds": _tfds}
    if kind not in readers or (kind == "digits") == bool(rest):
        rule = "must be digits, npz:FILE[:KEY], folder:DIR or tfds:NAME[:SPLIT]"
        raise invalid("data", source, rule)
    images, labels = readers[kind](rest)
    if len(images) < 2:
        raise invalid("data", source, f"holds {len(images)} images; at least 2 are needed")
    fitted = np.stack([_fit(image, image_size, channels) for image in images])
    return ImageSet(fitted, labels)


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
        ImageSet(images.images[rows], None if images.labels is None else images.labels[rows])
        for rows in (np.sort(order[held_out:]), np.sort(order[:held_out]))
    )


def training_batches(
    images: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    steps: int,
    flip: bool,
    labels: np.ndarray | None = None,
) -> Iterator[tuple]:
    """Batches of steps first_step … steps - 1, each a pure function of seed and step.

    Every epoch visits each image once in an order of its own; a batch may span two epochs. A run
    that is resumed at any step therefore sees the images that an uninterrupted one sees.

    Yields:
        Tuples of one element, as Keras wants them: float32 (batch_size, H, W, C) in [-1, 1], or the
        pair of these and int32 labels (batch_size,) where there are labels.
    """
    count = len(images)
    orders: dict[int, np.ndarray] = {}
    for step in range(first_step, steps):
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // count
        for epoch in np.unique(epochs):
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([seed, 0, epoch]).permutation(count)
        for epoch in [epoch for epoch in orders if epoch < epochs[0]]:
            del orders[epoch]
        rows = [
            orders[epoch][position % count]
            for epoch, position in zip(epochs, positions, strict=True)
        ]
        # Latents are floats already.
        batch = to_float(images[rows]) if images.dtype == np.uint8 else np.array(images[rows])
        if flip:
            mirrored = np.random.default_rng([seed, 1, step]).random(batch_size) < 0.5
            batch[mirrored] = batch[mirrored, :, ::-1]
        yield ((batch, labels[rows].astype(np.int32)),) if labels is not None else (batch,)


def _digits(_: str) -> tuple[Any, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "demo") from error
    digits = load_digits()
    # Sixteen grey levels and zero, 0 to 16.
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    return images[..., None], digits.target.astype(np.int64)


def _npz(rest: str) -> tuple[np.ndarray, np.ndarray | None]:
    path, key = _split_key(rest)
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise invalid("data", str(path), "must be an .npz archive")
        with archive:
            key = key or next((name for name in IMAGE_KEYS if name in archive.files), None)
            if key not in archive.files:
                rule = f"must name one of {archive.files}, as npz:FILE:KEY"
                raise invalid("data", f"npz:{rest}", rule)
            images = archive[key]
            label_key = next((name for name in LABEL_KEYS if name in archive.files), None)
            labels = archive[label_key] if label_key else None
    except InputError:
        raise
    except OSError as error:
        raise invalid("data", str(path), f"cannot be read: {error.strerror or error}") from error
    except BROKEN_ARCHIVE as error:
        raise invalid("data", str(path), f"is not a readable .npz archive: {error}") from error
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        labels = None
    images = check_images(images, f"npz:{rest}")
    return images, None if labels is None else labels.astype(np.int64)


def _split_key(rest: str) -> tuple[Path, str | None]:
    """`FILE[:KEY]`; a file whose own name holds a colon wins."""
    if not Path(rest).exists() and ":" in rest:
        path, _, key = rest.rpartition(":")
        return Path(path), key
    return Path(rest), None


def check_images(images: np.ndarray, name: str) -> np.ndarray:
    """uint8 (N, H, W, C) of an array that a user gave.

    Args:
        images: (N, H, W) or (N, H, W, 1 to 4); uint8, or finite floats in [0, 1].
        name: what to call it in an error.

    Raises:
        InputError: another shape, dtype or range, or NaN.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not 1 <= images.shape[-1] <= 4 or 0 in images.shape:
        rule = f"has the shape {images.shape}; it must be (N, H, W) or (N, H, W, 1 to 4)"
        raise invalid("data", name, rule)
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise invalid("data", name, f"has the dtype {images.dtype}; it must be uint8 or float")
    if not np.isfinite(images).all():
        bad = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
        raise invalid("data", name, f"has NaN or infinity in {bad} images")
    if images.min() < 0.0 or images.max() > 1.0:
        rule = f"has floats in [{images.min():g}, {images.max():g}]; they must lie in [0, 1]"
        raise invalid("data", name, rule)
    return np.rint(images * 255.0).astype(np.uint8)


def _folder(rest: str) -> tuple[list[Any], None]:
    folder = Path(rest)
    if not folder.is_dir():
        raise invalid("data", f"folder:{rest}", "must name a folder")
    Image = _pillow()
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(image.copy())
        except (OSError, Image.DecompressionBombError) as error:
            raise invalid("data", str(file), f"is not a readable image: {error}") from error
    return images, None


def _tfds(rest: str) -> tuple[np.ndarray, np.ndarray | None]:
    name, _, split = rest.partition(":")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise missing_extra("tensorflow-datasets", "train") from error
    try:
        examples = list(tfds.as_numpy(tfds.load(name, split=split or "train")))
    except Exception as error:  # TFDS raises as many types as it has builders
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise invalid("data", f"tfds:{rest}", f"cannot be loaded: {reason}") from error
    labels = None
    if examples and "label" in examples[0]:
        labels = np.array([example["label"] for example in examples], np.int64)
    return [_pillow().fromarray(np.squeeze(example["image"])) for example in examples], labels


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("Pillow", "train") from error
    return Image


def _fit(image: Any, size: int, channels: int) -> np.ndarray:
    """One array or Pillow image as uint8 (size, size, channels)."""
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, channels):
            return image
        image = _pillow().fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if image.mode.startswith("I"):
        # Sixteen bits of grey: Pillow's own conversion would turn all above 255 white.
        image = _pillow().fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    image = image.convert(MODES[channels])
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    fitted = image.resize((size, size), _pillow().Resampling.LANCZOS, box=box)
    return np.asarray(fitted, np.uint8).reshape(size, size, channels)
