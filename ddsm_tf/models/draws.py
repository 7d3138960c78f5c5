"""What a training step draws: timesteps, noise, and which labels to hide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from ddsm_tf.models.objective import Objective
from ddsm_tf.models.replicas import replica_count, replica_index


class TrainingDraws:
    """Random draws for the images of a batch.

    Under `tf.distribute` every replica draws for the whole global batch and takes its own rows, so
    that what is drawn is what a single device would draw.

    Args:
        seed_generator: whose state all draws advance.
        objective: how often training visits each timestep.
        image_shape: (H, W, C).
    """

    def __init__(
        self,
        seed_generator: keras.random.SeedGenerator,
        objective: Objective,
        image_shape: tuple[int, int, int],
    ) -> None:
        self._seed = seed_generator
        self._objective = objective
        self._image_shape = image_shape

    def timesteps_and_noise(
        self, batch: Any, among: Sequence[int] | None = None
    ) -> tuple[Any, Any]:
        """Timesteps, int32 (N,), and standard normal noise, float32 (N, H, W, C).

        Args:
            batch: N, of this replica.
            among: the timesteps to draw from, rising; None draws from all.
        """
        rows = batch * replica_count()
        t = self._timesteps(rows) if among is None else self._timesteps_among(rows, among)
        noise = keras.random.normal((rows, *self._image_shape), dtype="float32", seed=self._seed)
        return self._mine(t, batch), self._mine(noise, batch)

    def hidden(self, batch: Any, share: float) -> Any:
        """Whether to hide each image's label, bool (N,), on average of a share in [0, 1]."""
        rows = batch * replica_count()
        uniform = keras.random.uniform((rows,), dtype="float32", seed=self._seed)
        return self._mine(uniform, batch) < share

    def _timesteps(self, rows: Any) -> Any:
        cumulative = self._objective.cumulative_probabilities
        if cumulative is None:
            T = len(self._objective.factors.signal)
            return keras.random.randint((rows,), 0, T, seed=self._seed)
        uniform = keras.random.uniform((rows,), dtype="float32", seed=self._seed)
        return ops.cast(ops.searchsorted(cumulative, uniform), "int32")

    def _timesteps_among(self, rows: Any, among: Sequence[int]) -> Any:
        """As often as of all, given that it is one of these."""
        probabilities = self._objective.probabilities_of(among)
        below = np.cumsum(probabilities / probabilities.sum())[:-1].astype(np.float32)
        uniform = keras.random.uniform((rows,), dtype="float32", seed=self._seed)
        places = ops.searchsorted(below, uniform)
        return ops.take(np.asarray(among, np.int32), places)

    def _mine(self, values: Any, batch: Any) -> Any:
        """This replica's rows of what was drawn for the global batch."""
        if replica_count() == 1:
            return values
        return ops.take(values, batch * replica_index() + ops.arange(batch), axis=0)
