"""Images: value ranges, grids and files. Arrays are NHWC."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from ddsm_tf.errors import invalid, missing_extra
from ddsm_tf.files import atomic_file


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] floats to uint8 [0, 255]; values outside are clipped, halves round to even."""
    return np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def image_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lay out uint8 (N, H, W, C) images as one (rows·H, columns·W, C) picture, blanks black."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def save_png(picture: np.ndarray, path: str | os.PathLike, scale: int = 1) -> None:
    """Write one uint8 (H, W, 1 to 4) picture, each pixel enlarged `scale` times, atomically."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("Pillow", "edge") from error
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    # A lone second channel is no alpha channel: show the first two as red and green.
    if picture.shape[-1] == 2:
        picture = np.concatenate([picture, np.zeros_like(picture[..., :1])], axis=-1)
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")


def save_images(images: np.ndarray, path: str | os.PathLike) -> None:
    """Write uint8 (N, H, W, C) images: a grid for `.png`, the array itself for `.npy`.

    Raises:
        InputError: the path ends in neither.
    """
    check_image_path(path)
    if Path(path).suffix == ".npy":
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, images)
        return
    # Small images are enlarged so that a person can see them; 256 pixels a side is plenty.
    scale = max(1, 64 // max(images.shape[1:3]))
    save_png(image_grid(images), path, scale)


def check_image_path(path: str | os.PathLike) -> None:
    """Raise `InputError` unless `path` ends in .png or .npy; call it before the long work."""
    if Path(path).suffix not in (".png", ".npy"):
        raise invalid("out", str(path), "must end in .png (a grid) or .npy (uint8 NHWC)")
