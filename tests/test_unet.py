"""The slimmable UNet: its widths, its plain subnets, its arguments and its file."""

import itertools

import keras
import numpy as np
import pytest
from conftest import TINY, randomise

from ddsm_tf.errors import InputError
from ddsm_tf.models import SlimmableUNet
from ddsm_tf.models.blocks import ResidualBlock
from ddsm_tf.models.unet import choose_group_size

FOUR = (1.0, 0.75, 0.5, 0.25)


def make_unet(**changes):
    return randomise(SlimmableUNet(**{**TINY, **changes}))


def noisy_images(unet, count=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *unet.image_shape), np.float32)


def run(unet, x, t, **options):
    return keras.ops.convert_to_numpy(unet(x, np.asarray(t), **options))


@pytest.fixture(scope="module")
def unet():
    """Four widths, so that the narrowest has a single group of channels."""
    return make_unet(base_channels=16, widths=FOUR)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_channels": 16, "widths": FOUR},
        {"channels": 3, "channel_multipliers": (1, 2, 3), "attention_resolutions": (2, 4)},
        {
            "channels": 2,
            "image_size": (4, 8),
            "base_channels": 12,
            "channel_multipliers": (1, 1.5),
        },
        {"channels": 4, "base_channels": 12, "widths": (1.0, 0.6, 0.3)},
        {
            "base_channels": 16,
            "group_size": 3,
            "timestep_channels": 10,
            "channel_multipliers": (1,),
            "blocks_per_level": 2,
        },
        {"base_channels": 11, "widths": (1.0,), "channel_multipliers": (1,)},
    ],
    ids=["four widths", "three levels", "not square", "rounded widths", "own groups", "odd base"],
)
def test_subnet_is_the_slimmable_call(changes):
    unet = make_unet(**changes)
    x, t = noisy_images(unet), [3, 700]
    outputs = []
    for width in unet.widths:
        narrow = unet.subnet(width)
        outputs.append(run(unet, x, t, width=width))
        assert narrow.widths == (1.0,) and narrow.image_shape == unet.image_shape
        np.testing.assert_allclose(run(narrow, x, t), outputs[-1], atol=1e-5)
        assert outputs[-1].shape == x.shape and outputs[-1].std() > 0.05
    for wider, narrower in itertools.pairwise(outputs):
        assert np.abs(wider - narrower).max() > 0.01


def test_subnet_where_the_groups_do_not_divide_the_channels():
    unet = make_unet(base_channels=18, widths=(1.0, 0.6, 0.3))
    x = noisy_images(unet)
    expected = run(unet, x, [3, 700], width=0.6)
    np.testing.assert_allclose(run(unet.subnet(0.6), x, [3, 700]), expected, atol=1e-5)


def test_subnet_has_copies_of_the_weights(unet):
    narrow = unet.subnet(0.5)
    assert narrow.count_params() < 0.3 * unet.count_params()
    x = noisy_images(unet)
    before = run(unet, x, [1, 2], width=0.5)
    narrow.output_conv.bias.assign(narrow.output_conv.bias + 1.0)
    assert np.array_equal(run(unet, x, [1, 2], width=0.5), before)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_decoder_reads_features_then_skip(monkeypatch, width):
    # The order of the kernel's parts. A subnet cannot tell, since it has the same order.
    unet = make_unet(attention_resolutions=())
    inputs, outputs, call = {}, {}, ResidualBlock.call

    def recorded(self, x, *arguments, **options):
        inputs[self], outputs[self] = x, call(self, x, *arguments, **options)
        return outputs[self]

    monkeypatch.setattr(ResidualBlock, "call", recorded)
    run(unet, noisy_images(unet), [3, 700], width=width)
    first_up = unet.up_levels[0][0][0]
    features, skip = outputs[unet.middle[-1]], outputs[unet.down_levels[-1][0][0]]
    assert np.array_equal(inputs[first_up], np.concatenate([features, skip], axis=-1))
    assert np.abs(features - skip).max() > 0.01


def test_widest_is_the_default(unet):
    x = noisy_images(unet)
    assert np.array_equal(run(unet, x, [5, 6]), run(unet, x, [5, 6], width=1.0))


def test_wide_weights_do_not_reach_a_narrow_width():
    unet = make_unet(channel_multipliers=(1,))
    x = noisy_images(unet)
    narrow, wide = run(unet, x, [5, 6], width=0.5), run(unet, x, [5, 6])
    kernel = unet.middle[0].input_conv.kernel
    changed = kernel.numpy()
    changed[:, :, 4:] += 1.0
    kernel.assign(changed)
    assert np.array_equal(run(unet, x, [5, 6], width=0.5), narrow)
    assert np.abs(run(unet, x, [5, 6]) - wide).max() > 0.01


@pytest.mark.parametrize("width", FOUR)
def test_every_width_sees_the_timestep(width):
    # A group of one channel would cancel what the timestep adds to that channel.
    unet = make_unet(base_channels=16, widths=FOUR, channel_multipliers=(1,))
    x = noisy_images(unet)
    early, late = (run(unet, x, [t, t], width=width) for t in (50, 900))
    assert np.abs(early - late).mean() > 0.01 * early.std()


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_images_of_a_batch_are_independent(unet, width):
    x, t = noisy_images(unet, count=3), [0, 400, 999]
    together = run(unet, x, t, width=width)
    alone = [run(unet, x[i : i + 1], t[i : i + 1], width=width) for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    other = np.concatenate([x[:1], 5.0 * x[1:]])
    np.testing.assert_allclose(run(unet, other, [0, 7, 8], width=width)[0], together[0], atol=1e-5)


def test_integer_and_float_timesteps_agree(unet):
    x = noisy_images(unet)
    integers, floats = np.array([501, 999]), np.array([501.0, 999.0], np.float32)
    assert np.array_equal(run(unet, x, integers), run(unet, x, floats))


def test_integer_and_float_timesteps_agree_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = make_unet()
    finally:
        keras.config.set_dtype_policy("float32")
    x = noisy_images(half)
    integers, floats = np.array([501, 999]), np.array([501.0, 999.0], np.float32)
    assert np.array_equal(run(half, x, integers), run(half, x, floats))


def test_mixed_precision_is_near_float32(unet):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = SlimmableUNet.from_config({**unet.get_config(), "dtype": "mixed_bfloat16"})
    finally:
        keras.config.set_dtype_policy("float32")
    for weight, copy in zip(unet.weights, half.weights, strict=True):
        copy.assign(weight)
    x, t = noisy_images(unet), [3, 700]
    for width in (1.0, 0.25):
        output = half(x, np.asarray(t), width=width)
        assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
        difference = run(unet, x, t, width=width) - keras.ops.cast(output, "float32")
        assert 0.0 < np.abs(difference).max() < 0.1


def test_file_keeps_every_bit(unet, tmp_path):
    unet.save(tmp_path / "unet.keras")
    loaded = keras.saving.load_model(tmp_path / "unet.keras", safe_mode=True)
    assert loaded.get_config() == unet.get_config()
    x, t = noisy_images(unet), [3, 700]
    for width in (1.0, 0.25):
        assert np.array_equal(run(loaded, x, t, width=width), run(unet, x, t, width=width))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": (4, 8), "widths": (0.5, 1), "dropout": 0.1},
        {"base_channels": 16, "group_size": 8, "timestep_channels": 6, "channels": 3},
    ],
)
def test_config_round_trip(changes):
    unet = SlimmableUNet(**{**TINY, **changes})
    copy = SlimmableUNet.from_config(unet.get_config())
    assert copy.get_config() == unet.get_config()
    assert [weight.shape for weight in copy.weights] == [weight.shape for weight in unet.weights]
    for name, value in changes.items():
        expected = (1.0, 0.5) if name == "widths" else value
        assert copy.get_config()[name] == expected


@pytest.mark.parametrize(
    ("base_channels", "widths", "asked", "size"),
    [
        (16, FOUR, None, 4),
        (12, (1.0, 0.5), None, 6),
        (20, (1.0, 0.6), None, 4),
        (256, FOUR, None, 8),
        (12, (1.0, 0.6, 0.3), None, 4),  # none is exact, so the smallest
        (16, FOUR, 2, 2),
    ],
)
def test_group_size_makes_widths_exact(base_channels, widths, asked, size):
    assert choose_group_size(base_channels, widths, asked) == size


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("image_size", 7),
        ("image_size", 0),
        ("image_size", (8, 9)),
        ("image_size", (8, 8, 8)),
        ("channels", 0),
        ("channels", 5),
        ("channels", 1.0),
        ("channels", True),
        ("base_channels", 3),
        ("base_channels", 8.0),
        ("channel_multipliers", ()),
        ("channel_multipliers", (1, 0)),
        ("channel_multipliers", (1, 1.3)),
        ("blocks_per_level", 0),
        ("widths", ()),
        ("widths", (1.0, 0)),
        ("widths", (1.5, 1.0)),
        ("widths", (1.0, 0.5, 0.5)),
        ("widths", (1.0, float("nan"))),
        ("widths", (1.0, 0.9)),  # both would keep both of the two groups
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("group_size", 1),
        ("group_size", 9),
    ],
)
def test_bad_argument(argument, value):
    with pytest.raises(InputError, match=f"^`{argument}` "):
        SlimmableUNet(**{**TINY, argument: value})


@pytest.mark.parametrize("width", [0.6, 2.0, 0])
def test_unknown_width(unet, width):
    with pytest.raises(InputError, match=r"`width` \(="):
        unet(noisy_images(unet), np.array([1, 2]), width=width)
    with pytest.raises(InputError, match=r"`width` \(="):
        unet.subnet(width)


def test_dropout_in_training_only():
    unet, plain = (make_unet(dropout=rate, channel_multipliers=(1,)) for rate in (0.5, 0.0))
    for weight, copy in zip(plain.trainable_weights, unet.trainable_weights, strict=True):
        copy.assign(weight)
    x = noisy_images(unet)
    assert np.array_equal(run(unet, x, [1, 2]), run(plain, x, [1, 2]))
    first, second = (run(unet, x, [1, 2], training=True) for _ in range(2))
    assert np.abs(first - second).max() > 0.01


def test_new_network_predicts_zero():
    unet = SlimmableUNet(**TINY)
    assert not run(unet, noisy_images(unet), [1, 2]).any()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("attention_resolutions", 4),
        ("widths", 0.5),
        ("widths", ("a", "b")),
        ("image_size", 8.5),
        ("image_size", "88"),
        ("channel_multipliers", 2),
        ("dropout", "a"),
        ("timestep_channels", 7),
        ("timestep_channels", -4),
    ],
)
def test_arguments_of_another_type_are_named(argument, value):
    with pytest.raises(InputError, match=f"`{argument}`"):
        make_unet(**{argument: value})


def test_precision_is_that_in_force_when_loaded(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        make_unet().save(tmp_path / "half.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    assert loaded.compute_dtype == loaded.output_conv.compute_dtype == "float32"
