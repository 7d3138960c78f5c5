"""Layers that can run at several widths, in backend-neutral Keras 3.

The channels of every feature map are split into the same number of groups, and a width keeps
the first of them: `ChannelAxis` says which. A group is at once the unit of slimming and of
normalisation, so GroupNorm sees the same sets of channels at every width. `width` is an argument
of each call and a plain Python number: slicing is static, and at width 1 there is none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from ddsm_tf import cost

PACKAGE = "ddsm_tf"


class ChannelAxis(NamedTuple):
    """A channel axis split into groups.

    Attributes:
        channels: channels at width 1.
        groups: groups at width 1. 0 marks an axis that is never slimmed, such as the image's own
            channels.
        size: channels of a group; the last one takes what is left over. 0 takes
            channels // groups.
    """

    channels: int
    groups: int
    size: int = 0

    @property
    def group_size(self) -> int:
        """Channels of every group but the last."""
        return self.size or self.channels // self.groups

    def active(self, width: float) -> int:
        """Channels in use at `width`: those of the first round(groups · width) groups."""
        groups = active_groups(self.groups, width)
        return self.channels if groups == self.groups else groups * self.group_size

    def group_of_channel(self, width: float) -> np.ndarray:
        """The group of every channel in use, int (active,)."""
        return np.minimum(np.arange(self.active(width)) // self.group_size, self.groups - 1)


def active_groups(groups: int, width: float) -> int:
    """How many of `groups` a width keeps: at least one, or none of none."""
    return min(groups, max(1, round(groups * width)))


# The slimmed dimensions of a weight: dimension → its parts, of which all but one have a single one.
Axes = dict[int, tuple[ChannelAxis, ...]]


def slice_axes(weight: Any, axes: Axes, width: float) -> Any:
    """The channels of a weight that `width` uses, on all of its slimmed dimensions at once.

    A kernel whose input is `[h, skip]` holds the channels of `h` first, then those of `skip`. Each
    part is sliced by itself, so that a channel meets its own weights at every width.
    """
    start, shape, joined = [0] * len(weight.shape), list(weight.shape), None
    for axis, parts in axes.items():
        shape[axis] = sum(part.active(width) for part in parts)
        if len(parts) > 1:
            joined = axis
    if shape == list(weight.shape):
        return weight
    if joined is None:
        # Not by index: TensorFlow's gradient of that is several times slower.
        return ops.slice(weight, start, shape)
    pieces = []
    for part in axes[joined]:
        shape[joined] = part.active(width)
        pieces.append(ops.slice(weight, list(start), list(shape)))
        start[joined] += part.channels
    return ops.concatenate(pieces, axis=joined)


def over_pixels(per_channel: Any) -> Any:
    """(N, C) → (N, 1, 1, C), to be broadcast over the pixels of (N, H, W, C)."""
    return ops.reshape(per_channel, (-1, 1, 1, per_channel.shape[-1]))


def silu(x: Any, training: bool = False) -> Any:
    """x · σ(x), any shape.

    In training the backend's own, whose gradient keeps x alone and not σ(x) as well. TensorFlow
    would write that gradient into every SavedModel, once for each call, and trace it for longer
    than the network itself, so that networks which only run multiply.
    """
    return ops.silu(x) if training else x * ops.sigmoid(x)


class SlimmableLayer(keras.layers.Layer):
    """A layer whose weights at a narrow width are slices of the wide ones.

    Subclasses list `(weight, axes)` in `weight_axes`. All else follows from it.
    """

    def weight_axes(self) -> list[tuple[Any, Axes]]:
        """Each weight with its slimmed dimensions."""
        raise NotImplementedError

    def weights_at(self, width: float) -> list[Any]:
        """The slices that `width` uses, in the order of `weight_axes`."""
        slices = []
        for weight, axes in self.weight_axes():
            value = ops.convert_to_tensor(weight, dtype=self.compute_dtype)
            slices.append(slice_axes(value, axes, width))
        cost.report(parameters=sum(math.prod(piece.shape) for piece in slices))
        return slices

    def assign_slices(self, wide: SlimmableLayer, width: float) -> None:
        """Copy the slices that `wide` uses at `width` into this narrower layer."""
        for (target, _), (weight, axes) in zip(self.weight_axes(), wide.weight_axes(), strict=True):
            target.assign(slice_axes(ops.convert_to_tensor(weight), axes, width))


@keras.saving.register_keras_serializable(package=PACKAGE)
class SlimmableConv2D(SlimmableLayer):
    """2-D convolution, NHWC, `(N, H, W, in) → (N, H/strides, W/strides, out)`.

    Padding is symmetric, so that stride 2 samples the same pixels on every runtime.

    Args:
        inputs: the parts of the input's channel axis, each (channels, groups).
        outputs: the output's channel axis, (channels, groups).
        kernel_size: odd side of the kernel, in pixels.
        strides: 1 or 2.
        kernel_initializer: Keras initializer.
    """

    def __init__(
        self,
        inputs: tuple[ChannelAxis, ...],
        outputs: ChannelAxis,
        kernel_size: int = 3,
        strides: int = 1,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.inputs = tuple(ChannelAxis(*part) for part in inputs)
        self.outputs = ChannelAxis(*outputs)
        self.kernel_size = kernel_size
        self.strides = strides
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: Any = None) -> None:
        channels_in = sum(part.channels for part in self.inputs)
        shape = (self.kernel_size, self.kernel_size, channels_in, self.outputs.channels)
        self.kernel = self.add_weight(
            shape=shape, initializer=self.kernel_initializer, name="kernel"
        )
        self.bias = self.add_weight(shape=shape[-1:], initializer="zeros", name="bias")
        self.built = True

    def weight_axes(self):
        return [
            (self.kernel, {2: self.inputs, 3: (self.outputs,)}),
            (self.bias, {0: (self.outputs,)}),
        ]

    def call(self, x: Any, width: float = 1.0) -> Any:
        kernel, bias = self.weights_at(width)
        padding = "same"
        if self.strides > 1:
            margin = self.kernel_size // 2
            x = ops.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
            padding = "valid"
        x = ops.conv(x, kernel, self.strides, padding, data_format="channels_last")
        cost.report(
            macs=math.prod(x.shape[1:3]) * math.prod(kernel.shape),
            activations=math.prod(x.shape[1:]),
        )
        return x + bias

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class SlimmableDense(SlimmableLayer):
    """Dense layer, `(N, in) → (N, out)`.

    Args:
        inputs: the input's channel axis, (channels, groups).
        outputs: the output's channel axis, (channels, groups).
    """

    def __init__(self, inputs: ChannelAxis, outputs: ChannelAxis, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inputs = ChannelAxis(*inputs)
        self.outputs = ChannelAxis(*outputs)

    def build(self, input_shape: Any = None) -> None:
        shape = (self.inputs.channels, self.outputs.channels)
        self.kernel = self.add_weight(shape=shape, initializer="glorot_uniform", name="kernel")
        self.bias = self.add_weight(shape=shape[-1:], initializer="zeros", name="bias")
        self.built = True

    def weight_axes(self):
        outputs = (self.outputs,)
        return [(self.kernel, {0: (self.inputs,), 1: outputs}), (self.bias, {0: outputs})]

    def call(self, x: Any, width: float = 1.0) -> Any:
        kernel, bias = self.weights_at(width)
        cost.report(macs=math.prod(kernel.shape))
        return ops.matmul(x, kernel) + bias

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inputs": self.inputs, "outputs": self.outputs}


@keras.saving.register_keras_serializable(package=PACKAGE)
class SlimmableGroupNorm(SlimmableLayer):
    """Group normalisation whose groups are the same sets of channels at every width.

    Means over a group are taken as a product of per-channel means with a constant 0/1 matrix:
    everything stays four-dimensional, groups may differ in size, and statistics are float32
    whatever the compute dtype.

    Args:
        inputs: the parts of the input's channel axis, each (channels, groups).
        epsilon: added to the variance.

    Reference: Wu and He, 2018, arXiv 1803.08494.
    """

    def __init__(
        self, inputs: tuple[ChannelAxis, ...], epsilon: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.inputs = tuple(ChannelAxis(*part) for part in inputs)
        self.epsilon = epsilon

    def build(self, input_shape: Any = None) -> None:
        shape = (sum(part.channels for part in self.inputs),)
        self.gamma = self.add_weight(shape=shape, initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=shape, initializer="zeros", name="beta")
        self.built = True

    def weight_axes(self):
        return [(self.gamma, {0: self.inputs}), (self.beta, {0: self.inputs})]

    def membership(self, width: float) -> np.ndarray:
        """Which group each active channel belongs to, float32 (channels, groups) of 0 and 1."""
        groups, offset = [], 0
        for part in self.inputs:
            of_channel = part.group_of_channel(width)
            groups.append(of_channel + offset)
            offset += of_channel[-1] + 1
        return np.equal.outer(np.concatenate(groups), np.arange(offset)).astype(np.float32)

    def call(self, x: Any, width: float = 1.0) -> Any:
        gamma, beta = (ops.cast(weight, "float32") for weight in self.weights_at(width))
        cost.report(activations=math.prod(x.shape[1:]))
        member = self.membership(width)
        # Tensors made once, or a graph would hold them once for each product.
        to_groups = ops.convert_to_tensor(member / member.sum(axis=0))
        to_channels = ops.convert_to_tensor(member.T)

        def group_mean(per_channel: Any) -> Any:
            return ops.matmul(ops.matmul(per_channel, to_groups), to_channels)

        wide = ops.cast(x, "float32")
        means = ops.mean(wide, axis=(1, 2))
        # E[x²] - E[x]² reads the features once; rounding may take it just below zero.
        variances = ops.mean(ops.square(wide), axis=(1, 2)) - ops.square(means)
        mean = group_mean(means)
        # The products may be rounded to ten bits on a GPU, so what they sum must be small already.
        spread = ops.maximum(variances, 0.0) + ops.square(means - mean)
        scale = gamma * ops.rsqrt(group_mean(spread) + self.epsilon)
        shift = beta - mean * scale
        return ops.cast(wide * over_pixels(scale) + over_pixels(shift), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inputs": self.inputs, "epsilon": self.epsilon}
