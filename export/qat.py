"""Quantization-aware training: convolutions and dense layers that round to int8 as they train."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

_quantize = tfmot.quantization.keras
Range = tuple[float, float]


class RoundedLayer(_quantize.QuantizeWrapperV2):
    """A layer whose input, kernel and output are rounded to int8.

    tfmot's own wrapper rounds the kernel and the output, and leaves the input to the layer before.
    Here that is often a sum or a concatenation that other layers read in float32, which would
    carry the rounding along every skip connection.

    Args:
        layer: a Conv2D or Dense layer. Its kernel has a range for each channel.
        ranges: of the input and the output, to start from.
    """

    def __init__(self, layer: tf_keras.layers.Layer, ranges: tuple[Range, Range]) -> None:
        registry = _quantize.default_8bit.Default8BitQuantizeRegistry()
        super().__init__(layer, registry.get_quantize_config(layer))
        self.ranges = ranges

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.input_quantizer = _quantize.quantizers.MovingAverageQuantizer(
            num_bits=8, per_axis=False, symmetric=False, narrow_range=False
        )
        self.input_range = self.input_quantizer.build(input_shape, "input", self)
        for name, ends in zip(("input", "post_activation"), self.ranges, strict=True):
            for end, value in zip(("min", "max"), ends, strict=True):
                self._variable(f"{name}_{end}").assign(value)

    def _variable(self, name: str) -> tf.Variable:
        [variable] = [w for w in self.weights if w.name.split(":")[0].split("/")[-1] == name]
        return variable

    def call(self, inputs: Any, training: Any = None) -> Any:
        training = bool(training)
        return super().call(
            self.input_quantizer(inputs, training, weights=self.input_range), training=training
        )


def observed_ranges(
    model: tf_keras.Model, names: Collection[str], inputs: Any
) -> dict[str, tuple[Range, Range]]:
    """The ranges of layers' inputs and outputs on a batch, each with zero in it for padding.

    tfmot would start from [-6, 6] and move by a thousandth a step, which is far too slow for
    fine-tuning in hundreds of steps.

    Args:
        model: the float model; to be called before its layers are wrapped.
        names: of the layers.
        inputs: a batch for the model.
    """
    layers = [model.get_layer(name) for name in names]
    ends = [(layer.input, layer.output) for layer in layers]
    values = tf_keras.Model(model.inputs, ends)(inputs, training=False)
    return {
        name: (_range(before.numpy()), _range(after.numpy()))
        for name, (before, after) in zip(names, values, strict=True)
    }


def _range(values: np.ndarray) -> Range:
    return min(float(values.min()), 0.0), max(float(values.max()), 0.0)


class RoundedNetwork:
    """A tf_keras model with `RoundedLayer`s, called as a UNet is.

    Args:
        model: takes `[x, t]`, or `[x, t, labels]`.
        image_shape: (H, W, C).
        num_classes: of the labels; 0 for a model without.
    """

    def __init__(
        self, model: tf_keras.Model, image_shape: tuple[int, int, int], num_classes: int = 0
    ) -> None:
        self.model = model
        self.image_shape = image_shape
        self.num_classes = num_classes

    def __call__(self, *inputs: Any) -> Any:
        """The output, float32 (N, H, W, C), for x, t, float32 (N,), and labels, int32 (N,)."""
        return self.model(list(inputs), training=False)
