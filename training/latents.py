"""Latents of a run's images: encoded once, kept in the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_file, copy_file
from ddsm_tf.images import to_float
from ddsm_tf.training.progress import progress_bar

BATCH_SIZE = 64
# What a run keeps of its autoencoder, in the order in which it is copied.
ADOPTED = ("config.json", "autoencoder.keras")


def adopt_autoencoder(source: str, folder: Path) -> None:
    """Copy a trained autoencoder into a run, so that the run needs no other folder.

    Args:
        source: the autoencoder's run folder.
        folder: where to, inside the run.

    Raises:
        InputError: it is no run folder, has no weights, or was not trained to its end.
    """
    from keras.ops import convert_to_numpy

    from ddsm_tf.training.autoencoder import AutoencoderRun

    trained = AutoencoderRun.open(source)
    if not trained.weights_path.is_file():
        raise invalid("autoencoder", source, "has no weights yet; see `ddsm autoencoder`")
    scale = convert_to_numpy(trained.load_autoencoder().latent_scale)
    if float(scale) == 1.0:
        rule = "is not trained to its end, so its latents have no scale; see `ddsm autoencoder`"
        raise invalid("autoencoder", source, f"{rule} --resume")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ADOPTED:
        copy_file(Path(source) / name, folder / name)


def encode_images(
    autoencoder: Any, weights: Path, images: np.ndarray, folder: Path, *, mirrored: bool = False
) -> np.ndarray:
    """Latents of images, from the folder if they are there.

    Args:
        autoencoder: a `KLAutoencoder`.
        weights: its file, part of what says whether kept latents are those of these images.
        images: uint8 (N, H, W, C).
        folder: keeps a file for each set of images.
        mirrored: whether latents of the mirrored images follow, for a mirrored latent is not the
            latent of the mirrored image.

    Returns:
        float32 (N or 2N, h, w, c), of about unit variance; mapped from the file, not to be changed.
    """
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(f"{images.shape} {mirrored}".encode())
    for batch in _batches(images):
        digest.update(np.ascontiguousarray(batch))
    path = folder / f"{digest.hexdigest()[:32]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            _write(autoencoder, images, mirrored, temporary)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise invalid("latents", str(path), f"cannot be read ({error}); delete it") from error


def _write(autoencoder: Any, images: Any, mirrored: bool, path: Path) -> None:
    from keras import ops

    sets = 1 + int(mirrored)
    shape = (sets * len(images), *autoencoder.latent_shape)
    latents = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    place = 0
    with progress_bar(len(latents), "encode") as bar:
        for is_mirrored in range(sets):
            for batch in _batches(images):
                pixels = to_float(batch[:, :, ::-1] if is_mirrored else batch)
                encoded = ops.convert_to_numpy(autoencoder.encode(pixels))
                latents[place : place + len(batch)] = encoded
                place += len(batch)
                bar.update(len(batch))
    latents.flush()


def _batches(images: Any) -> Iterator[np.ndarray]:
    for first in range(0, len(images), BATCH_SIZE):
        yield images[first : first + BATCH_SIZE]
