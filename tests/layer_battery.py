"""The checks that every slimmable layer must pass, as one function."""

import keras
import numpy as np
from conftest import randomise

from ddsm_tf.models.layers import ChannelAxis, SlimmableLayer

# Which of a layer's axes each dimension of a weight belongs to, counted from the end.
DIMENSIONS = {
    "kernel": {-2: "inputs", -1: "outputs"},
    "bias": {-1: "outputs"},
    "gamma": {-1: "inputs"},
    "beta": {-1: "inputs"},
}


def run_layer_battery(make_layer, inputs, widths, output_shape):
    """Check one layer class at every width; raises `AssertionError` at the first flaw.

    Args:
        make_layer: () → a fresh layer.
        inputs: width → a tuple of float32 arrays, the call's arguments.
        widths: the widths to try, widest first.
        output_shape: width → the shape of the layer's output.
    """
    layer = make_layer()
    check_config(layer)
    randomise(layer)
    for width in widths:
        arguments = inputs(width)
        output = check_call(layer, arguments, width, output_shape(width))
        check_bfloat16(make_layer, layer, arguments, width, output)
        check_narrow_layer(layer, arguments, width, output)
    check_gradient_step(layer, inputs(widths[0]), widths[0])


def check_config(layer):
    """`from_config(get_config())` makes weights of the same shapes. Builds the layer."""
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    for each in (layer, copy):
        each.build(None)
    shapes = [weight.shape for weight in layer.weights]
    assert shapes and [weight.shape for weight in copy.weights] == shapes


def check_call(layer, arguments, width, shape):
    """The shape without values is the shape with them; returns the output."""
    symbols = [keras.KerasTensor(array.shape, array.dtype) for array in arguments]
    assert layer(*symbols, width=width).shape == shape
    output = keras.ops.convert_to_numpy(layer(*arguments, width=width))
    assert output.shape == shape and output.dtype == np.float32
    assert np.isfinite(output).all() and output.std() > 0.01
    return output


def check_bfloat16(make_layer, layer, arguments, width, output):
    """Mixed precision computes in bfloat16, keeps float32 weights, and is near float32."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = make_layer()
        half.build(None)
    finally:
        keras.config.set_dtype_policy("float32")
    copy_weights(layer, half)
    assert {weight.dtype for weight in half.weights} == {"float32"}
    result = half(*arguments, width=width)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    difference = keras.ops.convert_to_numpy(keras.ops.cast(result, "float32")) - output
    # bfloat16 has 8 bits of mantissa: each of a few operations errs by up to 0.4 %.
    assert 0.0 < np.abs(difference).max() < 0.05 * np.abs(output).max()


def check_narrow_layer(layer, arguments, width, output):
    """A layer as wide as the slice, with weights cut by hand, gives the same output."""
    narrow = type(layer).from_config(narrow_axes(layer.get_config(), width))
    narrow.build(None)
    pairs = zip(slimmable_layers(layer), slimmable_layers(narrow), strict=True)
    for wide_part, narrow_part in pairs:
        for wide, target in zip(wide_part.weights, narrow_part.weights, strict=True):
            target.assign(cut(wide, wide_part, width))
    result = keras.ops.convert_to_numpy(narrow(*arguments))
    np.testing.assert_allclose(result, output, atol=1e-5)


def check_gradient_step(layer, arguments, width):
    """One step down the gradient changes every kernel and lowers the loss."""
    import tensorflow as tf

    def loss():
        return tf.reduce_mean(tf.square(layer(*arguments, width=width) - 1.0))

    with tf.GradientTape() as tape:
        first = loss()
    gradients = tape.gradient(first, [weight.value for weight in layer.trainable_variables])
    assert all(gradient is not None for gradient in gradients)
    before = [weight.numpy() for weight in layer.trainable_variables]
    for weight, gradient in zip(layer.trainable_variables, gradients, strict=True):
        weight.assign_sub(0.02 * gradient)
    assert float(loss()) < float(first)
    for weight, old in zip(layer.trainable_variables, before, strict=True):
        # Attention does not depend on the bias of its keys, so biases may stay.
        if weight.path.endswith("kernel"):
            assert np.abs(weight.numpy() - old).max() > 1e-6, weight.path


def copy_weights(source, target):
    for weight, copy in zip(source.weights, target.weights, strict=True):
        copy.assign(weight)


def slimmable_layers(layer):
    return [inner for inner in layer._flatten_layers() if isinstance(inner, SlimmableLayer)]


def narrow_axes(config, width):
    """A config whose channel axes are as wide as the slice, with as many groups."""

    def narrow(value):
        if isinstance(value, ChannelAxis):
            groups = value.groups and max(1, round(value.groups * width))
            return ChannelAxis(len(kept_channels((value,), width)), groups)
        return tuple(map(narrow, value)) if isinstance(value, tuple) else value

    return {key: narrow(value) for key, value in config.items()}


def kept_channels(parts, width):
    """Indices, within the concatenated axis, of the first groups of every part."""
    kept, offset = [], 0
    for channels, groups, _ in parts:
        groups_kept = max(1, round(groups * width))
        # The last group takes the remainder; an axis without groups is kept whole.
        whole = groups_kept >= groups
        count = channels if whole else groups_kept * (channels // groups)
        kept.append(offset + np.arange(count))
        offset += channels
    return np.concatenate(kept)


def cut(weight, layer, width):
    """The part of a weight that `width` uses, cut with NumPy."""
    value = weight.numpy()
    for dimension, name in DIMENSIONS[weight.path.split("/")[-1]].items():
        axis = getattr(layer, name)
        parts = (axis,) if isinstance(axis, ChannelAxis) else axis
        value = np.take(value, kept_channels(parts, width), axis=value.ndim + dimension)
    return value
