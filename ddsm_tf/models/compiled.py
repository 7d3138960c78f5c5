"""One compiled inference graph per width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from ddsm_tf.errors import invalid


class CompiledDenoiser:
    """`denoise(x, t, width, labels)` over a `SlimmableUNet`, NumPy in and out.

    The graph of a width is compiled at its first call and reads the weights at each call, so
    it may be kept while training goes on.

    Args:
        unet: the network.
        xla: compile by XLA, once for every width and batch size: seconds each, and then faster
            calls. With JAX it is always so.

    Raises:
        InputError: `xla`, and Keras's backend has none.
    """

    def __init__(self, unet: Any, *, xla: bool = False) -> None:
        if xla and keras.backend.backend() not in ("tensorflow", "jax"):
            rule = f"needs Keras on TensorFlow or JAX, not {keras.backend.backend()}"
            raise invalid("xla", xla, rule)
        self._unet = unet
        self._xla = xla
        self._compiled: dict[float, Callable] = {}

    def __call__(
        self,
        x: np.ndarray,
        t: int | np.ndarray,
        width: float,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """The output for x, float32 (N, H, W, C), at timestep t, a scalar or (N,).

        Models with classes need `labels`, int32 (N,).
        """
        if width not in self._compiled:
            self._compiled[width] = _compile(self._unet, self._unet.check_width(width), self._xla)
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        given = [] if labels is None else [np.asarray(labels, np.int32)]
        if bool(given) != bool(self._unet.num_classes):
            rule = "must be given to a model with classes, and to no other"
            raise invalid("labels", labels, f"{rule}; num_classes is {self._unet.num_classes}")
        return np.asarray(self._compiled[width](x, timesteps, *given), np.float32)


class CompiledDecoder:
    """`decode(latents)` over a `KLAutoencoder` whose weights stay as they are, NumPy in and out.

    Args:
        autoencoder: the autoencoder.
        batch_size: latents at a time.
    """

    def __init__(self, autoencoder: Any, batch_size: int = 16) -> None:
        self._autoencoder = autoencoder
        self._batch_size = batch_size
        self._compiled: Callable | None = None

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Images, float32 (N, H, W, C) about [-1, 1], of latents, float32 (N, h, w, c)."""
        if self._compiled is None:
            self._compiled = self._compile()
        latents = np.asarray(latents, np.float32)
        parts = [
            np.asarray(self._compiled(latents[first : first + self._batch_size]), np.float32)
            for first in range(0, len(latents), self._batch_size)
        ]
        return np.concatenate(parts)

    def _compile(self) -> Callable:
        decode, backend = self._autoencoder.decode, keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            spec = tf.TensorSpec((None, *self._autoencoder.latent_shape), tf.float32)
            return tf.function(decode, input_signature=[spec])
        if backend == "jax":
            import jax

            return jax.jit(decode)
        return lambda latents: keras.ops.convert_to_numpy(decode(latents))


def _compile(unet: Any, width: float, xla: bool) -> Callable:
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _compile_tensorflow(unet, width, xla)
    if backend == "jax":
        return _compile_jax(unet, width)
    return lambda *inputs: keras.ops.convert_to_numpy(unet(*inputs, width=width))


def _compile_tensorflow(unet: Any, width: float, xla: bool) -> Callable:
    import tensorflow as tf

    # A free batch axis: the last, smaller batch must not be traced again.
    signature = [
        tf.TensorSpec((None, *unet.image_shape), tf.float32),
        tf.TensorSpec((None,), tf.float32),
    ]
    if unet.num_classes:
        signature.append(tf.TensorSpec((None,), tf.int32))
    graph = tf.function(
        lambda *inputs: unet(*inputs, width=width),
        input_signature=signature,
        jit_compile=xla or None,
    )
    return lambda *inputs: tf.cast(graph(*inputs), tf.float32)


def _compile_jax(unet: Any, width: float) -> Callable:
    import jax

    @jax.jit
    def forward(trainable: list, non_trainable: list, *inputs: Any) -> Any:
        return unet.stateless_call(trainable, non_trainable, *inputs, width=width)[0]

    def run(*inputs: Any) -> Any:
        trainable = [variable.value for variable in unet.trainable_variables]
        non_trainable = [variable.value for variable in unet.non_trainable_variables]
        return forward(trainable, non_trainable, *inputs)

    return run
