"""A tf_keras model that computes what a plain UNet computes, for tools that know tf_keras only.

There is no second description of the network. Keras records which layers and operations a layer's
`call` applies to symbolic tensors; the twin applies the same ones to tf_keras's. Convolutions and
dense layers become tf_keras's own, which `tensorflow-model-optimization` can wrap; layers made of
others are opened up; every other layer or operation is called as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf
import tf_keras

from ddsm_tf.models.blocks import Block
from ddsm_tf.models.layers import SlimmableConv2D, SlimmableDense, SlimmableLayer

# tf_keras has no public name for it, and `is_keras_tensor` raises for anything but tensors.
_KerasTensor = type(tf_keras.Input(()))


@dataclass(frozen=True)
class Twin:
    """A tf_keras copy of a plain UNet.

    Attributes:
        model: functional model, `[x (N, H, W, C), t (N,)] → output (N, H, W, C)`, all float32; of a
            UNet with classes `[x, t, labels (N,)]`, int32.
        sources: name of a layer of `model` → the Keras layer whose weights it copied.
    """

    model: tf_keras.Model
    sources: dict[str, SlimmableLayer]


def twin_of(subnet: Any) -> Twin:
    """Build the twin of a network and copy its weights.

    Args:
        subnet: a `SlimmableUNet` with one width, float32.
    """
    x = tf_keras.Input(subnet.image_shape, name="x")
    inputs = [x, tf_keras.Input((), name="t")]
    if subnet.num_classes:
        inputs.append(tf_keras.Input((), name="labels", dtype="int32"))
    builder = _Builder()
    output = builder.open_up(subnet, *inputs)
    twin = Twin(tf_keras.Model(inputs, output), builder.sources)
    for name, layer in twin.sources.items():
        twin.model.get_layer(name).set_weights([w.numpy() for w in _weights(layer)])
    return twin


def weights_back(twin: Twin, model: tf_keras.Model | None = None) -> None:
    """Copy the weights of a model into the network that the twin was made of.

    Args:
        model: the twin's own model, or a copy of it with layers of the same names.
    """
    model = twin.model if model is None else model
    for name, layer in twin.sources.items():
        values = model.get_layer(name).get_weights()
        for weight, value in zip(_weights(layer), values, strict=True):
            weight.assign(value)


class WithWeights(tf_keras.layers.Layer):
    """A Keras layer's arithmetic on weights that tf_keras trains.

    Args:
        layer: the built Keras layer; its own weights are neither read nor changed.
    """

    def __init__(self, layer: SlimmableLayer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Functions, because tf_keras would look into a layer and claim what it finds there.
        self._names_and_shapes = lambda: [(w.name, w.shape) for w in layer.trainable_variables]
        self._arithmetic = layer.stateless_call

    def build(self, input_shape: Any) -> None:
        self.values = [self.add_weight(name, shape) for name, shape in self._names_and_shapes()]
        super().build(input_shape)

    def call(self, x: Any) -> Any:
        outputs, _ = self._arithmetic(self.values, [], x)
        return outputs


@dataclass
class _Builder:
    """Applies to tf_keras tensors what a Keras layer applies to its own."""

    sources: dict[str, SlimmableLayer] = field(default_factory=dict)
    count: int = 0

    def open_up(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply what the layer's `call` consists of."""
        tensors, fill_in = _split((args, kwargs))
        symbols = [keras.KerasTensor(tuple(x.shape), x.dtype.name) for x in tensors]
        symbolic_args, symbolic_kwargs = fill_in(symbols)
        graph = keras.Function(symbols, layer.call(*symbolic_args, **symbolic_kwargs))
        return graph._run_through_graph(tensors, operation_fn=self.counterpart)

    def counterpart(self, operation: Any) -> Callable[..., Any]:
        """The function of tf_keras tensors that stands for a Keras layer or operation."""
        if isinstance(operation, Block):
            return lambda *args, **kwargs: self.open_up(operation, *args, **kwargs)
        name = self._new_name(operation)
        if isinstance(operation, SlimmableLayer):
            self.sources[name] = operation
            # A plain UNet has the one width 1, which is every layer's default.
            return lambda x, width=1.0: _layer_like(operation, name)(x)
        return lambda *args, **kwargs: _apply(operation, name, args, kwargs)

    def _new_name(self, operation: Any) -> str:
        """Numbered in the order of execution, so that the same network gets the same names."""
        self.count += 1
        return f"{re.sub(r'_[0-9]+$', '', operation.name)}_{self.count:03d}"


def _layer_like(layer: SlimmableLayer, name: str) -> Callable[[Any], Any]:
    """The tf_keras layer that stands for a layer with weights."""
    if isinstance(layer, SlimmableDense):
        return tf_keras.layers.Dense(layer.outputs.channels, name=name)
    if not isinstance(layer, SlimmableConv2D):
        return WithWeights(layer, name=name)
    options = {"filters": layer.outputs.channels, "kernel_size": layer.kernel_size, "name": name}
    if layer.strides == 1:
        return tf_keras.layers.Conv2D(padding="same", **options)
    # TensorFlow's own "same" pads one side only where a stride is 2.
    pad = tf_keras.layers.ZeroPadding2D(layer.kernel_size // 2, name=f"{name}_padding")
    convolve = tf_keras.layers.Conv2D(strides=layer.strides, padding="valid", **options)
    return lambda x: convolve(pad(x))


def _apply(operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A Keras operation, or a layer without weights, as one tf_keras layer."""
    tensors, fill_in = _split((args, kwargs))

    @tf.autograph.experimental.do_not_convert
    def call(values: Any) -> Any:
        # tf_keras's copies of a model pass a single tensor without its list.
        value_args, value_kwargs = fill_in(keras.tree.flatten(values))
        return operation.call(*value_args, **value_kwargs)

    return tf_keras.layers.Lambda(call, name=name)(tensors)


def _split(arguments: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The tf_keras tensors in nested arguments, and a function that puts others in their place."""
    leaves = keras.tree.flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _KerasTensor)]

    def fill_in(values: list[Any]) -> Any:
        filled = list(leaves)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return keras.tree.pack_sequence_as(arguments, filled)

    return [leaves[place] for place in places], fill_in


def _weights(layer: SlimmableLayer) -> list[Any]:
    """In the order of the twin's: kernel, bias; gamma, beta."""
    return [weight for weight, _ in layer.weight_axes()]
