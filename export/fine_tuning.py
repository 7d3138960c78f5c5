"""Fine-tuning of a tf_keras model with the diffusion loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras

from ddsm_tf.images import to_float
from ddsm_tf.models.objective import Objective
from ddsm_tf.noise import NoiseTable


class Batch(NamedTuple):
    """A batch of the diffusion loss.

    Attributes:
        inputs: the network's: x, float32 (N, H, W, C), t, float32 (N,), and, for a model with
            classes, labels, int32 (N,).
        target: what it should put out, float32 (N, H, W, C).
        weight: of each squared error, float32 (N, 1, 1, 1).
    """

    inputs: list[np.ndarray]
    target: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class NoisedImages:
    """Batches of the diffusion loss, each a pure function of the seed and the step.

    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε (DDPM, algorithm 1); what the network is given and should
    put out follows from the noise table's prediction, as in training.

    Attributes:
        images: uint8 (count, H, W, C), or latents, float32.
        noise_table: the forward process, and what the network predicts.
        batch_size: images N of a batch, drawn with replacement.
        steps: number of batches.
        seed: of the images, timesteps and noise.
        labels: of the images, integers (count,); None for a model without classes.
        num_classes: of the model; the label that stands for "no class".
        label_dropout: share of the labels that become "no class", in [0, 1].
        weighting: of the timesteps; see `ddsm_tf.models.objective`.
    """

    images: np.ndarray
    noise_table: NoiseTable
    batch_size: int
    steps: int
    seed: int = 0
    labels: np.ndarray | None = None
    num_classes: int = 0
    label_dropout: float = 0.0
    weighting: str = "uniform"

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        random = np.random.default_rng([self.seed, step])
        chosen = random.integers(len(self.images), size=self.batch_size)
        images = self.images[chosen]
        images = to_float(images) if images.dtype == np.uint8 else images
        t = self._objective.draw_timesteps(random, self.batch_size)
        noise = random.standard_normal(images.shape, dtype=np.float32)
        at_t = self._objective.numpy_at(t)
        x_t = at_t.signal * images + at_t.noise * noise
        inputs = [at_t.input_scale * x_t, t.astype(np.float32)]
        if self.labels is not None:
            dropped = random.random(self.batch_size) < self.label_dropout
            labels = np.where(dropped, self.num_classes, self.labels[chosen])
            inputs.append(labels.astype(np.int32))
        return Batch(inputs, at_t.target_image * images + at_t.target_noise * noise, at_t.weight)

    @cached_property
    def _objective(self) -> Objective:
        return Objective.of(self.noise_table, self.weighting)


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
        model: `[x, t] → output`, or `[x, t, labels] → output`.
        batches: one a step.
        learning_rate: at the first step; it falls to zero along a cosine.
        callbacks: tf_keras callbacks; they hear of batches and of one epoch.
        on_step: called after every step.
    """
    rate = tf_keras.optimizers.schedules.CosineDecay(learning_rate, len(batches))
    # The legacy optimizer updates a weight in one operation, and so is traced faster.
    model.optimizer = tf_keras.optimizers.legacy.Adam(rate, global_clipnorm=1.0)

    @tf.function(autograph=False)
    def train_step(inputs: list[tf.Tensor], target: tf.Tensor, weight: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            error = tf.reduce_mean(weight * tf.square(model(inputs, training=True) - target))
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
