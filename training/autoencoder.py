"""The autoencoder program: trains the encoder and decoder of latent diffusion, and judges them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_file, write_json
from ddsm_tf.images import image_grid, save_png, to_float, to_uint8
from ddsm_tf.models.autoencoder import KLAutoencoder
from ddsm_tf.training.callbacks import StepCallback
from ddsm_tf.training.config import AutoencoderConfig
from ddsm_tf.training.data import ImageSet, load_images, split_images
from ddsm_tf.training.pipeline import training_pipeline
from ddsm_tf.training.run_folder import RunFolder
from ddsm_tf.training.train import (
    fit_with_checkpoints,
    make_optimizer,
    state_variables,
    uses_xla,
)

REPORTED_IMAGES = 1024
GRID_COLUMNS = 12


class AutoencoderRun(RunFolder):
    """The run folder of an autoencoder: configuration, checkpoints, weights, pictures, report."""

    Config = AutoencoderConfig
    command = "ddsm autoencoder"

    @property
    def weights_path(self) -> Path:
        """The autoencoder with its averaged weights and its latent scale."""
        return self.path / "autoencoder.keras"

    def load_split(self) -> tuple[ImageSet, ImageSet]:
        """The images that the run trains on, and those it holds out."""
        config = self.config
        cache = self.path / "cache"
        images = load_images(config.data, config.image_size, config.channels, cache)
        return split_images(images, config.held_out_images, config.seed)

    def new_autoencoder(self) -> KLAutoencoder:
        """The run's architecture with fresh weights."""
        config = self.config
        return KLAutoencoder(
            image_size=config.image_size,
            channels=config.channels,
            latent_channels=config.latent_channels,
            base_channels=config.base_channels,
            channel_multipliers=config.channel_multipliers,
            blocks_per_level=config.blocks_per_level,
            kl_weight=config.kl_weight,
            seed=config.seed,
            name="autoencoder",
        )

    def save_weights(self, model: KLAutoencoder) -> None:
        """Write the autoencoder, atomically."""
        with atomic_file(self.weights_path) as temporary:
            model.save(temporary)

    def load_autoencoder(self) -> KLAutoencoder:
        """The trained autoencoder.

        Raises:
            InputError: there are no weights yet, or the file is broken.
        """
        return load_autoencoder(self.weights_path)


def load_autoencoder(path: Path) -> KLAutoencoder:
    """Read an `autoencoder.keras`.

    Raises:
        InputError: it is missing, broken, or holds another model.
    """
    if not path.is_file():
        raise invalid("autoencoder", str(path), "is missing; see `ddsm autoencoder`")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises many types for a broken archive
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise invalid("autoencoder", str(path), f"cannot be read: {reason}") from error
    if not isinstance(model, KLAutoencoder):
        raise invalid("autoencoder", str(path), "holds no KLAutoencoder")
    return model


def train_autoencoder(run: AutoencoderRun) -> dict[str, float]:
    """Train to the last step, from the newest checkpoint where there is one; then report.

    Returns:
        See `report_of`.

    Raises:
        InputError: the data or a checkpoint cannot be used.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    config = run.config
    training, held_out = run.load_split()
    keras.utils.set_random_seed(config.seed % 2**32)
    keras.config.set_dtype_policy(config.mixed_precision)
    model = run.new_autoencoder()
    model.compile(make_optimizer(config), jit_compile=uses_xla(config))
    model.optimizer.build(model.trainable_variables)
    first_step = run.checkpoints.restore_latest(state_variables(model))
    judged = (held_out if len(held_out.images) else training).images
    if first_step < config.steps:
        batches = training_pipeline(
            training.images,
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=first_step,
            steps=config.steps,
            flip=config.horizontal_flip,
        )
        grids = ReconstructionGrids(run, judged, first_step, config.sample_every)
        fit_with_checkpoints(run, model, batches, run.checkpoints, first_step, grids)
    with model.averaged_weights():
        model.set_latent_scale(to_float(training.images[:REPORTED_IMAGES]))
        run.save_weights(model)
    return write_report(run, run.load_autoencoder(), judged[:REPORTED_IMAGES])


def write_report(run: AutoencoderRun, model: KLAutoencoder, images: np.ndarray) -> dict[str, float]:
    """Write `reconstructions.png` and `report.json`; returns the report."""
    report = report_of(model, images)
    save_png(reconstruction_grid(model, images), run.path / "reconstructions.png")
    write_json(run.path / "report.json", report)
    return report


def report_of(model: KLAutoencoder, images: np.ndarray) -> dict[str, float]:
    """How well an autoencoder gives images back.

    Args:
        model: the autoencoder.
        images: uint8 (N, H, W, C) that it was not trained on.

    Returns:
        `psnr`: dB, of all pixels together; `kl`: nats a latent value; `latent_std`: of the scaled
        latents, 1 where the scale fits; `latent_scale`; `images`.
    """
    error, kl, latents = [], [], []
    for first in range(0, len(images), 64):
        batch = to_float(images[first : first + 64])
        encoded = keras.ops.convert_to_numpy(model.encode(batch))
        decoded = to_uint8(keras.ops.convert_to_numpy(model.decode(encoded)))
        error.append(np.square(decoded.astype(float) - images[first : first + 64]))
        kl.append(keras.ops.convert_to_numpy(model(batch)["kl"]))
        latents.append(encoded)
    mean_error = float(np.mean(np.concatenate(error)))
    return {
        "psnr": 10.0 * math.log10(255.0**2 / max(mean_error, 1e-12)),
        "kl": float(np.mean(np.concatenate(kl))),
        "latent_std": float(np.std(np.concatenate(latents), dtype=np.float64)),
        "latent_scale": float(keras.ops.convert_to_numpy(model.latent_scale)),
        "images": len(images),
    }


def reconstruction_grid(model: KLAutoencoder, images: np.ndarray, rows: int = 3) -> np.ndarray:
    """Images above their reconstructions, `rows` times, as one uint8 picture."""
    shown = images[: rows * GRID_COLUMNS]
    decoded = model.decode(model.encode(to_float(shown)))
    again = to_uint8(keras.ops.convert_to_numpy(decoded))
    columns = min(GRID_COLUMNS, len(shown))
    pairs = []
    for first in range(0, len(shown) - len(shown) % columns, columns):
        pairs += [shown[first : first + columns], again[first : first + columns]]
    return image_grid(np.concatenate(pairs), columns)


class ReconstructionGrids(StepCallback):
    """A picture of reconstructions every `every` steps; 0 is never."""

    def __init__(
        self, run: AutoencoderRun, images: np.ndarray, first_step: int, every: int
    ) -> None:
        super().__init__(first_step)
        self.run, self.images, self.every = run, images, every

    def after_step(self, logs: Mapping[str, Any]) -> None:
        if not self.every or self.step % self.every:
            return
        self.sync()
        with self.model.averaged_weights():
            picture = reconstruction_grid(self.model, self.images)
        save_png(picture, self.run.path / "samples" / f"step_{self.step:08d}.png")
