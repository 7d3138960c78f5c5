"""Latents of a run's images: encoded once, kept in the run folder."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_file
from ddsm_tf.images import to_float
from ddsm_tf.training.progress import progress_bar

BATCH_SIZE = 64
KEPT = ("config.json", "autoencoder.keras")


def adopt_autoencoder(source: str, folder: Path) -> None:
    """Copy a trained autoencoder into a run, so that the run needs no other folder.

    Args:
        source: the autoencoder's run folder.
        folder: where to, inside the run.

    Raises:
        InputError: it is no run folder, or has no weights.
    """
    from ddsm_tf.training.autoencoder import AutoencoderRun

    trained = AutoencoderRun.open(source)
    if not trained.weights_path.is_file():
        raise invalid("autoencoder", source, "has no weights yet; see `ddsm autoencoder`")
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        with atomic_file(folder / name) as temporary:
            shutil.copyfile(Path(source) / name, temporary)


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
    digest.update(np.ascontiguousarray(images))
    path = folder / f"{digest.hexdigest()[:32]}.npy"
    if not path.exists():
        sets = [images, images[:, :, ::-1]] if mirrored else [images]
        with progress_bar(sum(map(len, sets)), "encode") as bar:
            parts = [latents for some in sets for latents in _encode(autoencoder, some, bar)]
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(parts))
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise invalid("latents", str(path), f"cannot be read ({error}); delete it") from error


def _encode(autoencoder: Any, images: np.ndarray, bar: Any) -> Any:
    from keras import ops

    for first in range(0, len(images), BATCH_SIZE):
        batch = to_float(images[first : first + BATCH_SIZE])
        yield ops.convert_to_numpy(autoencoder.encode(batch)).astype(np.float32)
        bar.update(len(batch))
