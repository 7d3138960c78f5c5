"""Optimizers that stay right under `tf.distribute`, and the learning rate's warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from ddsm_tf.models.layers import PACKAGE
from ddsm_tf.models.replicas import replica_count, sum_over_replicas


class _ClipReducedGradients:
    """Clip the gradient of the global batch, not each replica's share of it.

    Keras clips before it sums over replicas, and a replica's gradient is scaled by 1/N, so its
    `global_clipnorm` means another thing on N devices. Here the gradients are summed first; each
    replica then hands on 1/N of the clipped sum, which the optimizer's own sum restores.
    """

    def _clip_gradients(self, grads: Sequence[Any]) -> Sequence[Any]:
        # Keras has no public hook between reducing and clipping. Replicas are traced by threads
        # that share this object, so nothing of it may change meanwhile.
        replicas = replica_count()
        if self.global_clipnorm is None or replicas == 1:
            return super()._clip_gradients(grads)
        clipped = super()._clip_gradients(sum_over_replicas(grads))
        return [ops.divide(gradient, replicas) for gradient in clipped]


@keras.saving.register_keras_serializable(package=PACKAGE)
class Adam(_ClipReducedGradients, keras.optimizers.Adam):
    """`keras.optimizers.Adam` whose `global_clipnorm` means the same on any number of devices."""


@keras.saving.register_keras_serializable(package=PACKAGE)
class SGD(_ClipReducedGradients, keras.optimizers.SGD):
    """`keras.optimizers.SGD` whose `global_clipnorm` means the same on any number of devices."""


@keras.saving.register_keras_serializable(package=PACKAGE)
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly to its value, then stays.

    Args:
        learning_rate: the value after warm-up.
        warmup_steps: steps of the rise; step 0 has 1 / warmup_steps of the rate.
    """

    def __init__(self, learning_rate: float, warmup_steps: int) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps

    def __call__(self, step: Any) -> Any:
        share = (ops.cast(step, "float32") + 1.0) / max(self.warmup_steps, 1)
        return self.learning_rate * ops.minimum(share, 1.0)

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps}
