"""Fine-tuning of a tf_keras model with the diffusion loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from ddsm_tf.images import to_float
from ddsm_tf.noise import NoiseTable


@dataclass(frozen=True)
class NoisedImages:
    """Batches of the diffusion loss, each a pure function of the seed and the step.

    Item k is `x_t, t, noise`, float32 (N, H, W, C), (N,) and (N, H, W, C), where
    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε and t is uniform (DDPM, algorithm 1).

    Attributes:
        images: uint8 (count, H, W, C).
        noise_table: the forward process.
        batch_size: images N of a batch, drawn with replacement.
        steps: number of batches.
        seed: of the images, timesteps and noise.
    """

    images: np.ndarray
    noise_table: NoiseTable
    batch_size: int
    steps: int
    seed: int = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        random = np.random.default_rng([self.seed, step])
        images = to_float(self.images[random.integers(len(self.images), size=self.batch_size)])
        t = random.integers(self.noise_table.train_timesteps, size=self.batch_size)
        noise = random.standard_normal(images.shape, dtype=np.float32)
        signal_scale, noise_scale = (
            scale[t, None, None, None].astype(np.float32)
            for scale in self.noise_table.signal_and_noise_scale()
        )
        return signal_scale * images + noise_scale * noise, t.astype(np.float32), noise


# Autograph reads the code of every layer, which takes longer than a hundred steps.
@tf.autograph.experimental.do_not_convert
def fine_tune(
    model: tf_keras.Model,
    batches: NoisedImages,
    learning_rate: float,
    *callbacks: Any,
    on_step: Callable[[], None] | None = None,
) -> None:
    """Train a model on every batch once, with Adam.

    Args:
        model: `[x_t, t] → noise`.
        batches: one a step.
        learning_rate: at the first step; it falls to zero along a cosine.
        callbacks: tf_keras callbacks; they hear of batches and of one epoch.
        on_step: called after every step.
    """
    rate = tf_keras.optimizers.schedules.CosineDecay(learning_rate, len(batches))
    # The legacy optimizer updates a weight in one operation, and so is traced faster.
    model.optimizer = tf_keras.optimizers.legacy.Adam(rate, global_clipnorm=1.0)

    @tf.function(autograph=False)
    def train_step(x_t: tf.Tensor, t: tf.Tensor, noise: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            error = tf.reduce_mean(tf.square(model([x_t, t], training=True) - noise))
        model.optimizer.minimize(error, model.trainable_variables, tape=tape)

    # Variables that a first trace makes would cost a second one.
    model.optimizer._create_all_weights(model.trainable_variables)
    listeners = tf_keras.callbacks.CallbackList(callbacks, model=model)
    listeners.on_train_begin()
    for step, batch in enumerate(batches):
        listeners.on_train_batch_begin(step)
        train_step(*batch)
        if on_step is not None:
            on_step()
    listeners.on_epoch_end(0)
