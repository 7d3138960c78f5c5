"""Run configurations and presets: texts, files, and errors that name the key."""

import dataclasses
import json

import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.training.config import RunConfig
from ddsm_tf.training.presets import ABOUT, PRESETS, get_preset


def load_changed(folder, change=None, drop=()):
    """Load the digits preset from a file after a change to its JSON."""
    value = {**get_preset("digits").to_dict(), **(change or {})}
    path = folder / "config.json"
    path.write_text(json.dumps({key: value[key] for key in value if key not in drop}))
    return RunConfig.load(path)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10"])
def test_preset_round_trip(name, tmp_path):
    config = get_preset(name)
    assert config.preset == name
    assert ABOUT[name]
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == config


def test_presets_are_all_known():
    assert set(PRESETS) == set(ABOUT)
    assert {"digits", "fashion_mnist", "cifar10"} < set(PRESETS)


def test_cifar10_preset_is_that_of_the_papers():
    config = get_preset("cifar10")
    assert (config.base_channels, config.channel_multipliers) == (128, (1, 2, 2, 2))
    assert (config.attention_resolutions, config.blocks_per_level) == ((16,), 2)
    assert (config.dropout, config.ema_momentum, config.image_size) == (0.1, 0.9999, 32)
    assert (config.train_timesteps, config.beta_start, config.beta_end) == (1000, 1e-4, 0.02)


@pytest.mark.parametrize("name", ["", "DIGITS", "mnist"])
def test_unknown_preset(name):
    with pytest.raises(InputError, match=r"`PRESET` .*digits, fashion_mnist, cifar10"):
        get_preset(name)


def test_changed():
    config = get_preset("digits").changed(
        [
            "widths=1,0.5",
            "seed=0",
            "steps=12",
            "learning_rate=1e-3",
            "dropout=1",
            "horizontal_flip=True",
            "attention_resolutions=4",
            "data=npz:a=b.npz",
            "mixed_precision=mixed_bfloat16",
        ]
    )
    assert config == dataclasses.replace(
        get_preset("digits"),
        widths=(1.0, 0.5),
        seed=0,
        steps=12,
        learning_rate=0.001,
        dropout=1.0,
        horizontal_flip=True,
        attention_resolutions=(4,),
        data="npz:a=b.npz",
        mixed_precision="mixed_bfloat16",
    )
    assert {type(width) for width in config.widths} == {float}
    assert type(config.dropout) is float


def test_changed_leaves_the_original():
    config = get_preset("digits")
    before = config.to_dict()
    assert config.changed(["steps=3"]).to_dict() == {**before, "steps": 3}
    assert config.to_dict() == before
    assert before["steps"] != 3
    assert config.changed([]) == config


def test_later_assignment_wins():
    assert get_preset("digits").changed(["seed=1", "seed=2"]).seed == 2


def test_bool_texts():
    config = get_preset("fashion_mnist")
    assert config.horizontal_flip is True
    assert config.changed(["horizontal_flip=false"]).horizontal_flip is False
    assert config.changed(["jit_compile=TRUE"]).jit_compile is True


def test_empty_list():
    assert (
        get_preset("fashion_mnist").changed(["attention_resolutions="]).attention_resolutions == ()
    )


@pytest.mark.parametrize(
    ("text", "close"),
    [("learning_rat=1", "learning_rate"), ("width=1", "widths"), ("batchsize=4", "batch_size")],
)
def test_unknown_key_suggests_a_close_one(text, close):
    with pytest.raises(InputError, match=f"did you mean {close}?"):
        get_preset("digits").changed([text])


@pytest.mark.parametrize("text", ["zzz=1", "preset=mine"])
def test_unknown_key_without_a_close_one_lists_all(text):
    with pytest.raises(InputError, match=r"`--set` .*known: data, image_size"):
        get_preset("digits").changed([text])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("steps", "key=value"),
        ("", "key=value"),
        ("steps=many", "an integer"),
        ("steps=1e3", "an integer"),
        ("steps=", "an integer"),
        ("learning_rate=fast", "a number"),
        ("horizontal_flip=1", "true or false"),
        ("horizontal_flip=yes", "true or false"),
        ("widths=1;0.5", "numbers separated by commas"),
        ("channel_multipliers=1,1.5", "numbers separated by commas"),
    ],
)
def test_text_that_does_not_parse(text, rule):
    with pytest.raises(InputError, match=f"`--set` .*{rule}"):
        get_preset("digits").changed([text])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("steps", "0"),
        ("steps", "-3"),
        ("batch_size", "-1"),
        ("image_size", "0"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", "-1e-4"),
        ("widths", "1,nan"),
        ("seed", "-1"),
        ("warmup_steps", "-1"),
        ("sample_every", "-1"),
        ("checkpoint_every", "0"),
        ("dropout", "1.5"),
        ("dropout", "-0.1"),
        ("ema_momentum", "2"),
        ("distillation", "nan"),
        ("beta_start", "0"),
        ("learning_rate_decay", "linear"),
        ("mixed_precision", "float16"),
    ],
)
def test_value_out_of_range_is_named(key, text):
    with pytest.raises(InputError, match=f"`{key}`"):
        get_preset("digits").changed([f"{key}={text}"])


@pytest.mark.parametrize("key", ["sample_every", "warmup_steps", "middle_widths", "seed"])
def test_zero_is_allowed_where_it_has_a_meaning(key):
    assert getattr(get_preset("digits").changed([f"{key}=0"]), key) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 2.0),
        ("steps", True),
        ("steps", "10"),
        ("steps", None),
        ("learning_rate", "0.1"),
        ("learning_rate", True),
        ("learning_rate", -1),
        ("horizontal_flip", 1),
        ("horizontal_flip", "true"),
        ("widths", 1.0),
        ("widths", "1"),
        ("widths", ["1"]),
        ("channel_multipliers", [1, 2.0]),
        ("data", 3),
        ("mixed_precision", None),
    ],
)
def test_wrong_type_in_the_file_is_named(key, value, tmp_path):
    with pytest.raises(InputError, match=f"config .*config.json: `{key}`"):
        load_changed(tmp_path, {key: value})


def test_whole_numbers_may_stand_for_floats(tmp_path):
    config = load_changed(tmp_path, {"clip_norm": 2, "widths": [1, 0.5]})
    assert (type(config.clip_norm), config.clip_norm, config.widths) == (float, 2.0, (1.0, 0.5))


def test_missing_and_unknown_keys(tmp_path):
    with pytest.raises(
        InputError, match=r"lacks the keys \['seed', 'steps'\] .*unknown keys \['zzz'\]"
    ):
        load_changed(tmp_path, {"zzz": 1}, drop=("seed", "steps"))


@pytest.mark.parametrize(
    ("change", "drop", "named"),
    [
        ({"version": 2}, (), "`version`"),
        ({}, ("version",), "`version`"),
        ({"format": "ddsm-step-schedule"}, (), "format"),
        ({}, ("format",), "format"),
    ],
)
def test_wrong_format_or_version(change, drop, named, tmp_path):
    with pytest.raises(InputError, match=f"config.json: .*{named}"):
        load_changed(tmp_path, change, drop)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": "ddsm-run", "version": 1}'])
def test_file_that_is_no_configuration(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.*config\.json"):
        RunConfig.load(tmp_path / "config.json")


def test_truncated_file(tmp_path):
    path = tmp_path / "config.json"
    get_preset("digits").save(path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(InputError, match=r"`config` .*not valid JSON"):
        RunConfig.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"`config` .*cannot be read"):
        RunConfig.load(tmp_path / "config.json")


def test_integer_beyond_float64(tmp_path):
    with pytest.raises(InputError, match="`dropout`"):
        load_changed(tmp_path, {"dropout": 10**400})


@pytest.mark.parametrize("channels", [5, 7])
def test_at_most_four_channels(channels):
    with pytest.raises(InputError, match="`channels`"):
        get_preset("digits").changed([f"channels={channels}"])
