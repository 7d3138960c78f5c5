"""Images: value ranges, grids and files. Arrays are NHWC."""

from __future__ import annotations

import io
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


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Lay out uint8 (N, H, W, C) images as one picture, row by row.

    Args:
        columns: images a row; about as many as rows if left out.
        gap: grey pixels between images.

    Returns:
        uint8 (rows · (H + gap) - gap, columns · (W + gap) - gap, C); blank cells are grey.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (rows * columns, height + gap, width + gap, channels)
    cells = np.full(shape, 128, np.uint8)
    cells[:count, :height, :width] = images
    grid = cells.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
    grid = grid.reshape(rows * shape[1], columns * shape[2], channels)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def png_bytes(picture: np.ndarray, scale: int = 1) -> bytes:
    """One uint8 (H, W, 1 to 4) picture as a PNG file, each pixel enlarged `scale` times."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("Pillow", "edge") from error
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    # Pillow takes grey and alpha, like every other image, by the number of channels.
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(picture: np.ndarray, path: str | os.PathLike, scale: int = 1) -> None:
    """Write `png_bytes` to a file, atomically."""
    data = png_bytes(picture, scale)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def save_images(images: np.ndarray, path: str | os.PathLike) -> None:
    """Write uint8 (N, H, W, C) images: a grid for `.png`, the array itself for `.npy`.

    Raises:
        InputError: the path ends in neither.
    """
    check_image_path(path)
    if Path(path).suffix == ".npy":
        # By way of memory: NumPy's own writing to a file hides what the system says of a full disk.
        buffer = io.BytesIO()
        np.save(buffer, images)
        with atomic_file(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
        return
    # Small images are enlarged so that a person can see them.
    scale = max(1, 48 // max(images.shape[1:3]))
    save_png(image_grid(images), path, scale)


def check_image_path(path: str | os.PathLike) -> None:
    """Raise `InputError` unless `path` ends in .png or .npy; call it before the long work."""
    if Path(path).suffix not in (".png", ".npy"):
        raise invalid("out", str(path), "must end in .png (a grid) or .npy (uint8 NHWC)")
