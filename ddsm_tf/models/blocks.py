"""The blocks of a slimmable UNet: residual, attention, resampling, timestep embedding."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from ddsm_tf import cost
from ddsm_tf.models.layers import (
    PACKAGE,
    ChannelAxis,
    SlimmableConv2D,
    SlimmableDense,
    SlimmableGroupNorm,
    SlimmableLayer,
    over_pixels,
    silu,
)


class Block(keras.layers.Layer):
    """A layer made of slimmable layers, all built at once because every shape is known."""

    def build(self, input_shape: Any = None) -> None:
        for layer in self._flatten_layers(include_self=False, recursive=False):
            if not layer.built:
                layer.build(None)
        self.built = True


@keras.saving.register_keras_serializable(package=PACKAGE)
class TimestepEmbedding(Block):
    """Sinusoids of t, then two dense layers: `(N,) → (N, outputs)`.

    Sinusoids as in DDPM's code (Vaswani et al., 2017, arXiv 1706.03762): sines first, then
    cosines, frequencies from 1 down to 1/10000.

    Args:
        frequency_channels: sines and cosines together; never slimmed.
        outputs: channel axis of the embedding.
    """

    def __init__(self, frequency_channels: int, outputs: ChannelAxis, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Keras would round float timesteps to half precision.
        self.autocast = False
        self.frequency_channels = frequency_channels
        self.outputs = ChannelAxis(*outputs)
        self.expand = SlimmableDense(ChannelAxis(frequency_channels, 0), self.outputs)
        self.project = SlimmableDense(self.outputs, self.outputs)

    def call(self, t: Any, width: float = 1.0) -> Any:
        half = self.frequency_channels // 2
        exponents = np.arange(half, dtype=np.float32) / max(half - 1, 1)
        angles = ops.cast(t, "float32")[:, None] * np.exp(-math.log(10000.0) * exponents)
        sinusoids = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
        hidden = silu(self.expand(ops.cast(sinusoids, self.compute_dtype), width=width))
        return self.project(hidden, width=width)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "frequency_channels": self.frequency_channels,
            "outputs": self.outputs,
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class ClassEmbedding(SlimmableLayer):
    """A vector for each class and one for "no class", `(N,) → (N, outputs)`.

    It is added to the timestep's embedding (Dhariwal and Nichol, 2021, arXiv 2105.05233, section
    3.1).

    Args:
        num_classes: K; labels are integers in [0, K], K being "no class".
        outputs: channel axis of the embedding.
    """

    def __init__(self, num_classes: int, outputs: ChannelAxis, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.outputs = ChannelAxis(*outputs)

    def build(self, input_shape: Any = None) -> None:
        self.table = self.add_weight(
            shape=(self.num_classes + 1, self.outputs.channels),
            initializer=keras.initializers.RandomNormal(stddev=1.0),
            name="table",
        )
        self.built = True

    def weight_axes(self):
        return [(self.table, {1: (self.outputs,)})]

    def call(self, labels: Any, width: float = 1.0) -> Any:
        (table,) = self.weights_at(width)
        return ops.take(table, ops.cast(labels, "int32"), axis=0)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "outputs": self.outputs,
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class ResidualBlock(Block):
    """Norm, SiLU, convolution, plus the timestep; norm, SiLU, dropout, convolution; shortcut.

    `(N, H, W, in), (N, embedding) → (N, H, W, out)`. The second convolution starts at zero, so
    that the block starts as its shortcut (DDPM, appendix B).

    Args:
        inputs: the parts of the input's channel axis; two where a skip was concatenated.
        outputs: the output's channel axis.
        embedding: channel axis of the timestep embedding.
        dropout: rate in [0, 1).
    """

    def __init__(
        self,
        inputs: tuple[ChannelAxis, ...],
        outputs: ChannelAxis,
        embedding: ChannelAxis,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.inputs = tuple(ChannelAxis(*part) for part in inputs)
        self.outputs = ChannelAxis(*outputs)
        self.embedding = ChannelAxis(*embedding)
        self.dropout = dropout
        self.input_norm = SlimmableGroupNorm(self.inputs)
        self.input_conv = SlimmableConv2D(self.inputs, self.outputs)
        self.timestep_dense = SlimmableDense(self.embedding, self.outputs)
        self.output_norm = SlimmableGroupNorm((self.outputs,))
        self.output_dropout = keras.layers.Dropout(dropout)
        self.output_conv = SlimmableConv2D(
            (self.outputs,), self.outputs, kernel_initializer="zeros"
        )
        self.shortcut = None
        if self.inputs != (self.outputs,):
            self.shortcut = SlimmableConv2D(self.inputs, self.outputs, kernel_size=1)

    def call(self, x: Any, embedding: Any, width: float = 1.0, training: bool = False) -> Any:
        h = silu(self.input_norm(x, width=width), training)
        h = self.input_conv(h, width=width)
        h = h + over_pixels(self.timestep_dense(silu(embedding, training), width=width))
        h = silu(self.output_norm(h, width=width), training)
        if self.dropout:
            h = self.output_dropout(h, training=training)
        h = self.output_conv(h, width=width)
        return h + (x if self.shortcut is None else self.shortcut(x, width=width))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "embedding": self.embedding,
            "dropout": self.dropout,
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class AttentionBlock(Block):
    """Single-head self-attention over pixels with a residual, `(N, H, W, C) → (N, H, W, C)`.

    Args:
        axis: the channel axis.
    """

    def __init__(self, axis: ChannelAxis, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = ChannelAxis(*axis)
        self.norm = SlimmableGroupNorm((self.axis,))
        self.query = SlimmableConv2D((self.axis,), self.axis, kernel_size=1)
        self.key = SlimmableConv2D((self.axis,), self.axis, kernel_size=1)
        self.value = SlimmableConv2D((self.axis,), self.axis, kernel_size=1)
        self.output_conv = SlimmableConv2D(
            (self.axis,), self.axis, kernel_size=1, kernel_initializer="zeros"
        )

    def call(self, x: Any, width: float = 1.0) -> Any:
        _, height, breadth, channels = x.shape
        pixels = height * breadth
        h = self.norm(x, width=width)

        def flat(projection: SlimmableConv2D) -> Any:
            return ops.reshape(projection(h, width=width), (-1, pixels, channels))

        query, key, value = flat(self.query), flat(self.key), flat(self.value)
        scores = ops.matmul(query, ops.transpose(key, (0, 2, 1))) * channels**-0.5
        # Exponentials of a half-precision score lose the small attentions.
        attention = ops.cast(ops.softmax(ops.cast(scores, "float32")), self.compute_dtype)
        h = ops.reshape(ops.matmul(attention, value), (-1, height, breadth, channels))
        cost.report(
            attention_macs=2 * pixels**2 * channels,
            activations=pixels * (2 * pixels + channels),
        )
        return x + self.output_conv(h, width=width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}


@keras.saving.register_keras_serializable(package=PACKAGE)
class Upsample(Block):
    """Nearest-neighbour doubling and a convolution, `(N, H, W, C) → (N, 2H, 2W, C)`.

    Args:
        axis: the channel axis.
    """

    def __init__(self, axis: ChannelAxis, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = ChannelAxis(*axis)
        self.conv = SlimmableConv2D((self.axis,), self.axis)

    def call(self, x: Any, width: float = 1.0) -> Any:
        _, height, breadth, channels = x.shape
        # Doubling by concatenation needs four dimensions only and no resize operator, which
        # mobile delegates often lack: pixels repeat along channels, rows repeat along columns.
        columns = ops.concatenate([x, x], axis=3)
        columns = ops.reshape(columns, (-1, height, 2 * breadth, channels))
        rows = ops.concatenate([columns, columns], axis=2)
        return self.conv(ops.reshape(rows, (-1, 2 * height, 2 * breadth, channels)), width=width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}
