"""Slimmable layers and blocks, against NumPy and against layers that are narrow to begin with."""

import keras
import numpy as np
import pytest
from conftest import randomise
from keras import ops
from layer_battery import run_layer_battery

from ddsm_tf.models.blocks import AttentionBlock, ResidualBlock, TimestepEmbedding, Upsample
from ddsm_tf.models.layers import (
    ChannelAxis,
    SlimmableConv2D,
    SlimmableDense,
    SlimmableGroupNorm,
    active_groups,
)

A8, A16 = ChannelAxis(8, 2), ChannelAxis(16, 2)
A32, A7, IMAGE = ChannelAxis(32, 2), ChannelAxis(7, 3), ChannelAxis(3, 0)


def features(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pixels(*parts):
    """width → one feature map whose channels are those of `parts`."""
    return lambda width: (features(2, 4, 6, sum(part.active(width) for part in parts)),)


def pixels_and_embedding(*parts):
    return lambda width: (*pixels(*parts)(width), features(2, A32.active(width), seed=1))


def image_of(axis, height=4, breadth=6):
    return lambda width: (2, height, breadth, axis.active(width))


BATTERY = {
    "conv": (lambda: SlimmableConv2D((A8,), A16), pixels(A8), image_of(A16)),
    "conv of an image": (lambda: SlimmableConv2D((IMAGE,), A8), pixels(IMAGE), image_of(A8)),
    "conv, stride 2": (
        lambda: SlimmableConv2D((A8,), A8, strides=2),
        pixels(A8),
        image_of(A8, 2, 3),
    ),
    "conv, two parts": (lambda: SlimmableConv2D((A16, A8), A8), pixels(A16, A8), image_of(A8)),
    "conv, uneven groups": (lambda: SlimmableConv2D((A8,), A7), pixels(A8), image_of(A7)),
    "dense": (
        lambda: SlimmableDense(A8, A32),
        lambda width: (features(2, A8.active(width)),),
        lambda width: (2, A32.active(width)),
    ),
    "norm": (lambda: SlimmableGroupNorm((A16,)), pixels(A16), image_of(A16)),
    "norm, two parts": (
        lambda: SlimmableGroupNorm((A16, A8)),
        pixels(A16, A8),
        lambda width: (2, 4, 6, A16.active(width) + A8.active(width)),
    ),
    "timestep": (
        lambda: TimestepEmbedding(8, A32),
        lambda width: (np.array([3.0, 700.0], np.float32),),
        lambda width: (2, A32.active(width)),
    ),
    "residual": (
        lambda: ResidualBlock((A8,), A8, A32),
        pixels_and_embedding(A8),
        image_of(A8),
    ),
    "residual, shortcut": (
        lambda: ResidualBlock((A8,), A16, A32),
        pixels_and_embedding(A8),
        image_of(A16),
    ),
    "residual, two parts": (
        lambda: ResidualBlock((A16, A8), A8, A32),
        pixels_and_embedding(A16, A8),
        image_of(A8),
    ),
    "residual, dropout": (
        lambda: ResidualBlock((A8,), A8, A32, dropout=0.5),
        pixels_and_embedding(A8),
        image_of(A8),
    ),
    "attention": (lambda: AttentionBlock(A8), pixels(A8), image_of(A8)),
    "upsample": (lambda: Upsample(A8), pixels(A8), image_of(A8, 8, 12)),
}


@pytest.mark.parametrize("name", BATTERY)
def test_battery(name):
    make_layer, inputs, output_shape = BATTERY[name]
    run_layer_battery(make_layer, inputs, (1.0, 0.5), output_shape)


def built(layer):
    layer.build(None)
    return randomise(layer)


def call(layer, *arguments, **options):
    return keras.ops.convert_to_numpy(layer(*arguments, **options))


def numpy_conv(x, kernel, bias, stride=1):
    """Cross-correlation with k // 2 zeros on all four sides, pixel by pixel."""
    size = kernel.shape[0]
    margin = size // 2
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    rows = range(0, x.shape[1], stride)
    columns = range(0, x.shape[2], stride)
    output = np.empty((len(x), len(rows), len(columns), kernel.shape[-1]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = padded[:, row : row + size, column : column + size]
            output[:, i, j] = np.tensordot(window, kernel, axes=3) + bias
    return output


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_conv_is_numpy_convolution(size, stride):
    layer = built(SlimmableConv2D((A8,), A16, kernel_size=size, strides=stride))
    x = features(2, 6, 8, 8)
    expected = numpy_conv(x, layer.kernel.numpy(), layer.bias.numpy(), stride)
    np.testing.assert_allclose(call(layer, x), expected, atol=1e-5)


def test_stride_2_pads_symmetrically():
    # TensorFlow's "same" would start at the pixel itself, with all padding behind.
    layer = SlimmableConv2D((ChannelAxis(1, 0),), ChannelAxis(1, 0), strides=2)
    layer.build(None)
    layer.kernel.assign(np.arange(9, dtype=np.float32).reshape(3, 3, 1, 1))
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 0, 0] = 1.0
    assert call(layer, x)[0, :, :, 0].tolist() == [[4.0, 0.0], [0.0, 0.0]]
    x = x[:, ::-1, ::-1]
    assert call(layer, x)[0, :, :, 0].tolist() == [[0.0, 0.0], [0.0, 8.0]]


def test_each_part_meets_its_own_kernel_rows():
    layer = built(SlimmableConv2D((A16, A8), A8))
    h, skip = features(2, 4, 4, 8), features(2, 4, 4, 4, seed=1)
    kernel, bias = layer.kernel.numpy(), layer.bias.numpy()[:4]
    expected = numpy_conv(h, kernel[:, :, 0:8, :4], bias)
    expected += numpy_conv(skip, kernel[:, :, 16:20, :4], 0.0)
    output = call(layer, np.concatenate([h, skip], axis=-1), width=0.5)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_dense_is_a_matrix_product():
    layer = built(SlimmableDense(A8, A16))
    x = features(3, 4)
    expected = x @ layer.kernel.numpy()[:4, :8] + layer.bias.numpy()[:8]
    np.testing.assert_allclose(call(layer, x, width=0.5), expected, atol=1e-6)


def numpy_norm(x, groups, gamma, beta):
    """Group normalisation over explicit lists of channels."""
    output = np.empty(x.shape)
    for channels in groups:
        part = x[..., channels].astype(np.float64)
        mean = part.mean(axis=(1, 2, 3), keepdims=True)
        variance = part.var(axis=(1, 2, 3), keepdims=True)
        output[..., channels] = (part - mean) / np.sqrt(variance + 1e-5)
    return output * gamma + beta


@pytest.mark.parametrize(
    ("parts", "width", "groups", "kept"),
    [
        ((A8,), 1.0, [[0, 1, 2, 3], [4, 5, 6, 7]], range(8)),
        ((A8,), 0.5, [[0, 1, 2, 3]], range(4)),
        # The last group takes the remainder.
        ((A7,), 1.0, [[0, 1], [2, 3], [4, 5, 6]], range(7)),
        # Groups do not reach over from one part to the next.
        ((A16, A8), 0.5, [list(range(8)), [8, 9, 10, 11]], [*range(8), *range(16, 20)]),
    ],
)
def test_norm_is_numpy_norm(parts, width, groups, kept):
    layer = built(SlimmableGroupNorm(parts))
    x = 3.0 + 2.0 * features(2, 3, 5, len(kept))
    gamma, beta = (weight.numpy()[list(kept)] for weight in (layer.gamma, layer.beta))
    expected = numpy_norm(x, groups, gamma, beta)
    np.testing.assert_allclose(call(layer, x, width=width), expected, atol=2e-5)


@pytest.mark.parametrize("width", [0.75, 0.5, 0.25])
def test_norm_has_the_same_groups_at_every_width(width):
    axis = ChannelAxis(16, 4)
    layer = built(SlimmableGroupNorm((axis,)))
    # Channels differ in scale, so any other grouping gives another output.
    x = features(2, 4, 4, 16) * np.arange(1, 17, dtype=np.float32)
    kept = axis.active(width)
    narrow = call(layer, x[..., :kept], width=width)
    np.testing.assert_allclose(narrow, call(layer, x)[..., :kept], atol=1e-5)


def test_norm_of_a_constant_is_its_shift():
    # E[x²] - E[x]² may round below zero here.
    layer = built(SlimmableGroupNorm((A8,)))
    output = call(layer, np.full((1, 4, 4, 8), 100.3, np.float32))
    # What rounding leaves of the variance of 100.3 divides a mean that is off by an ulp.
    np.testing.assert_allclose(output[0, 0, 0], layer.beta.numpy(), atol=0.02)


def test_norm_stands_products_of_ten_bits(monkeypatch):
    # As GPUs multiply float32 by default.
    def rounded(x):
        bits = np.asarray(x, np.float32).view(np.uint32)
        return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)

    exact = ops.matmul
    monkeypatch.setattr(ops, "matmul", lambda a, b: exact(rounded(a), rounded(b)))
    layer = built(SlimmableGroupNorm((A8,)))
    x = 30.7 + features(2, 6, 6, 8)
    gamma, beta = layer.gamma.numpy(), layer.beta.numpy()
    expected = numpy_norm(x, [[0, 1, 2, 3], [4, 5, 6, 7]], gamma, beta)
    found = call(layer, x)
    # The mean is off by up to 2⁻¹¹ of itself, which shifts the output; its scale must not change.
    shift = (found - expected).mean(axis=(1, 2), keepdims=True)
    assert np.abs(shift).max() < 0.03 * np.abs(gamma).max()
    np.testing.assert_allclose(found - shift, expected, atol=2e-3)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_upsample_repeats_pixels(width):
    layer = built(Upsample(A8))
    x = features(2, 3, 5, A8.active(width))
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(
        call(layer, x, width=width), call(layer.conv, doubled, width=width), atol=1e-6
    )


def test_timestep_sinusoids():
    # Dense layers that hand the sinusoids on: SiLU of x, less SiLU of -x, is x.
    layer = TimestepEmbedding(6, ChannelAxis(12, 0))
    layer.build(None)
    identity = np.eye(6, dtype=np.float32)
    layer.expand.kernel.assign(np.concatenate([identity, -identity], axis=1))
    project = np.zeros((12, 12), np.float32)
    project[:6, :6], project[6:, :6] = identity, -identity
    layer.project.kernel.assign(project)
    angles = 700.0 * np.array([1.0, 1e-2, 1e-4])
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    output = call(layer, np.array([700.0]))[0]
    np.testing.assert_allclose(output[:6], expected, atol=2e-4)


def silu(x):
    return x / (1.0 + np.exp(-x))


def test_residual_block_adds_the_timestep_between_its_convolutions():
    layer = built(ResidualBlock((A8,), A16, A32))
    x, embedding = features(2, 4, 4, 8), features(2, 32, seed=1)

    def norm(part, h):
        groups = np.split(np.arange(h.shape[-1]), 2)
        return numpy_norm(h, groups, part.gamma.numpy(), part.beta.numpy())

    def conv(part, h):
        return numpy_conv(h, part.kernel.numpy(), part.bias.numpy())

    dense = layer.timestep_dense
    timestep = silu(embedding) @ dense.kernel.numpy() + dense.bias.numpy()
    h = conv(layer.input_conv, silu(norm(layer.input_norm, x))) + timestep[:, None, None]
    h = conv(layer.output_conv, silu(norm(layer.output_norm, h)))
    expected = h + conv(layer.shortcut, x)
    np.testing.assert_allclose(call(layer, x, embedding), expected, atol=1e-4)


def test_attention_is_softmax_attention():
    layer = built(AttentionBlock(A8))
    x = features(2, 3, 4, 8)
    norm = layer.norm
    groups = np.split(np.arange(8), 2)
    h = numpy_norm(x, groups, norm.gamma.numpy(), norm.beta.numpy()).reshape(2, 12, 8)

    def project(part, h):
        return h @ part.kernel.numpy()[0, 0] + part.bias.numpy()

    query, key, value = (project(part, h) for part in (layer.query, layer.key, layer.value))
    scores = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(8.0))
    h = project(layer.output_conv, scores / scores.sum(axis=-1, keepdims=True) @ value)
    np.testing.assert_allclose(call(layer, x), x + h.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize(
    "make_layer", [lambda: ResidualBlock((A8,), A8, A32), lambda: AttentionBlock(A8)]
)
def test_new_block_is_the_identity(make_layer):
    layer = make_layer()
    layer.build(None)
    x = features(2, 4, 4, 8)
    arguments = (x, features(2, 32)) if isinstance(layer, ResidualBlock) else (x,)
    assert np.array_equal(call(layer, *arguments), x)


def test_residual_block_drops_out_in_training_only():
    layer = built(ResidualBlock((A8,), A8, A32, dropout=0.5))
    plain = ResidualBlock((A8,), A8, A32)
    plain.build(None)
    for weight, copy in zip(layer.weights[: len(plain.weights)], plain.weights, strict=True):
        copy.assign(weight)
    arguments = features(2, 4, 4, 8), features(2, 32)
    assert np.array_equal(call(layer, *arguments), call(plain, *arguments))
    first, second = (call(layer, *arguments, training=True) for _ in range(2))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(
    ("groups", "width", "kept"),
    [(4, 1.0, 4), (4, 0.6, 2), (3, 0.3, 1), (2, 0.01, 1), (0, 0.5, 0), (32, 0.25, 8)],
)
def test_active_groups(groups, width, kept):
    assert active_groups(groups, width) == kept


def test_channels_of_an_uneven_axis():
    assert [A7.active(width) for width in (1.0, 0.67, 0.34)] == [7, 4, 2]
    assert A7.group_of_channel(1.0).tolist() == [0, 0, 1, 1, 2, 2, 2]
