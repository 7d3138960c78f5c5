"""Step schedules: their views, their JSON form, and errors that name what is wrong."""

import json

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.schedule import SAMPLERS, StepSchedule, even_timesteps

DEFAULT_JSON = {
    "format": "ddsm-step-schedule",
    "version": 1,
    "train_timesteps": 1000,
    "sampler": "ddim",
    "timesteps": [500, 0],
    "widths": [0.5, 1.0],
}


def schedule(**fields):
    return StepSchedule(**{"timesteps": (500, 0), "widths": (0.5, 1.0), **fields})


def load_text(text, folder):
    path = folder / "schedule.json"
    path.write_text(text)
    return StepSchedule.load(path)


@pytest.mark.parametrize(
    ("train_timesteps", "steps", "expected"),
    [
        (1000, 5, (800, 600, 400, 200, 0)),
        (1000, 1, (999,)),
        (4, 4, (3, 2, 1, 0)),
        (10, 3, (6, 3, 0)),
    ],
)
def test_even_timesteps(train_timesteps, steps, expected):
    assert even_timesteps(train_timesteps, steps) == expected


@pytest.mark.parametrize("steps", range(2, 101))
def test_even_timesteps_always_fall_to_zero(steps):
    timesteps = even_timesteps(100, steps)
    assert len(set(timesteps)) == steps
    assert list(timesteps) == sorted(timesteps, reverse=True)
    assert timesteps[-1] == 0
    assert timesteps[0] < 100


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_even_timesteps_out_of_range(steps):
    with pytest.raises(InputError, match="`steps`"):
        even_timesteps(1000, steps)


def test_uniform():
    made = StepSchedule.uniform(0.25, [9, 4, 0], train_timesteps=10, sampler="ddpm")
    assert made.timesteps == (9, 4, 0)
    assert made.widths == (0.25, 0.25, 0.25)
    assert (made.train_timesteps, made.sampler, len(made)) == (10, "ddpm", 3)


def test_segments_and_width_counts():
    made = StepSchedule((5, 4, 3, 2, 1, 0), (0.5, 0.5, 1.0, 0.25, 0.5, 0.5))
    assert made.segments() == [(0.5, 2), (1.0, 1), (0.25, 1), (0.5, 2)]
    assert list(made.width_counts().items()) == [(1.0, 1), (0.5, 4), (0.25, 1)]


def test_with_widths_changes_nothing_else():
    for options in ({"eta": 0.5}, {"sampler": "ddpm", "variance": "fixed_small"}):
        made = schedule(**options).with_widths([1.0, 0.25])
        assert made == schedule(widths=(1.0, 0.25), **options)
    with pytest.raises(InputError, match="`widths`"):
        made.with_widths([1.0])


def test_values_become_plain_python_numbers():
    made = StepSchedule(np.array([500, 0]), np.array([0.5, 1.0]), eta=1)
    assert made == schedule(eta=1.0)
    assert {type(t) for t in made.timesteps} == {int}
    assert {type(value) for value in (*made.widths, made.eta)} == {float}
    assert json.loads(json.dumps(made.to_dict())) == {**DEFAULT_JSON, "eta": 1.0}


def test_json_of_the_default_has_exactly_these_keys():
    assert schedule().to_dict() == DEFAULT_JSON


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"eta": 0.1},
        {"sampler": "ddpm", "variance": "fixed_small"},
        {"train_timesteps": 501, "widths": (1 / 3, 0.7)},
    ],
)
def test_file_round_trip(fields, tmp_path):
    made = schedule(**fields)
    made.save(tmp_path / "schedule.json")
    assert StepSchedule.load(tmp_path / "schedule.json") == made


@pytest.mark.parametrize(
    "options", [{"sampler": "ddpm", "variance": "fixed_small"}, {"sampler": "ddim", "eta": 0.25}]
)
def test_other_variance_and_eta_are_stored(options, tmp_path):
    schedule(**options).save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {**DEFAULT_JSON, **options}


def test_save_without_overwrite_keeps_the_old_file(tmp_path):
    path = tmp_path / "schedule.json"
    schedule().save(path)
    with pytest.raises(InputError, match="exists already"):
        schedule(widths=(1.0, 1.0)).save(path, overwrite=False)
    assert StepSchedule.load(path) == schedule()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("timesteps", (500, 500)),
        ("timesteps", (0, 500)),
        ("timesteps", (500, -1)),
        ("timesteps", (1000, 0)),
        ("timesteps", (True, False)),
        ("timesteps", (500.0, 0.0)),
        ("timesteps", ("500", "0")),
        ("timesteps", (float("nan"), 0)),
        ("timesteps", ()),
        ("widths", (1.0,)),
        ("widths", (1.0, 1.0, 1.0)),
        ("widths", (0.0, 1.0)),
        ("widths", (-0.5, 1.0)),
        ("widths", (1.01, 1.0)),
        ("widths", (float("nan"), 1.0)),
        ("widths", ("0.5", 1.0)),
        ("widths", (True, 1.0)),
        ("widths", (None, 1.0)),
        ("train_timesteps", 0),
        ("train_timesteps", 100_001),
        ("train_timesteps", 1000.0),
        ("train_timesteps", True),
        ("train_timesteps", "1000"),
        ("sampler", "leapfrog"),
        ("sampler", None),
        ("sampler", ["ddim"]),
        ("variance", "learned"),
        ("eta", -0.1),
        ("eta", 1.1),
        ("eta", float("nan")),
        ("eta", "0"),
        ("eta", True),
    ],
)
def test_bad_value_is_named(argument, value):
    with pytest.raises(InputError, match=f"`{argument}`"):
        schedule(**{argument: value})


@pytest.mark.parametrize(
    ("sampler", "option", "value", "owners"),
    [
        ("euler", "eta", 0.5, "ddim"),
        ("ddpm", "eta", 0.1, "ddim"),
        ("ddim", "variance", "fixed_small", "ddpm"),
        ("heun", "variance", "fixed_small", "ddpm"),
        ("ddim", "churn", 1.0, "euler and heun"),
        ("ddpm", "churn_min", 0.1, "euler and heun"),
        ("dpmpp_2m", "churn_max", 9.0, "euler and heun"),
        ("ddim", "churn_noise", 0.9, "euler and heun"),
    ],
)
def test_an_option_of_another_sampler_is_refused(sampler, option, value, owners, tmp_path):
    text = json.dumps({**DEFAULT_JSON, "sampler": sampler, option: value})
    named = rf"schedule\.json: `{option}` \(={value!r}\) is for {owners}; {sampler} has no"
    with pytest.raises(InputError, match=named):
        load_text(text, tmp_path)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_defaults_go_with_every_sampler(sampler):
    defaults = {"eta": 0, "variance": "fixed_large", "churn": 0, "churn_max": None}
    assert schedule(sampler=sampler, **defaults) == schedule(sampler=sampler)


def test_timestep_must_lie_below_a_shorter_table():
    with pytest.raises(InputError, match=r"`timesteps` \(=500\)"):
        schedule(train_timesteps=500)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "other"}, "`format`"),
        ({"version": 2}, "`version`"),
        ({"version": "1"}, "`version`"),
        ({"timesteps": "500"}, "`timesteps`"),
        ({"timesteps": {"0": 1}}, "`timesteps`"),
        ({"timesteps": [0, 500]}, "`timesteps`"),
        ({"timesteps": [500.0, 0]}, "`timesteps`"),
        ({"widths": 1.0}, "`widths`"),
        ({"widths": [0.5, None]}, "`widths`"),
        ({"eta": [0]}, "`eta`"),
        ({"variance": 1}, "`variance`"),
        ({"note": "hello"}, "unknown keys .'note'."),
    ],
)
def test_bad_json_value_is_named_with_its_file(change, named, tmp_path):
    with pytest.raises(InputError, match=f"schedule.json.*{named}"):
        load_text(json.dumps({**DEFAULT_JSON, **change}), tmp_path)


@pytest.mark.parametrize("key", sorted(DEFAULT_JSON))
def test_missing_key_is_named(key):
    value = {k: v for k, v in DEFAULT_JSON.items() if k != key}
    named = rf"`{key}` \(=None\)|lacks the keys .'{key}'."
    with pytest.raises(InputError, match=named):
        StepSchedule.from_dict(value)


@pytest.mark.parametrize("value", [None, 3, "text", [DEFAULT_JSON]])
def test_json_must_be_an_object(value):
    with pytest.raises(InputError, match="JSON object"):
        StepSchedule.from_dict(value)


@pytest.mark.parametrize(
    "text",
    ["", "{", json.dumps(DEFAULT_JSON)[:-5], "[" * 100_000 + "]" * 100_000],
    ids=["empty", "brace", "truncated", "deep"],
)
def test_file_that_is_not_json(text, tmp_path):
    with pytest.raises(InputError, match=r"`schedule` .*schedule.json.* not valid JSON"):
        load_text(text, tmp_path)


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "schedule.json").write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(InputError, match=r"`schedule` .*not valid JSON"):
        StepSchedule.load(tmp_path / "schedule.json")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_literals_outside_json_are_refused(literal, tmp_path):
    with pytest.raises(InputError, match=f"{literal} is no JSON"):
        load_text(json.dumps(DEFAULT_JSON).replace("0.5", literal), tmp_path)


def test_number_that_overflows_to_infinity(tmp_path):
    with pytest.raises(InputError, match="`widths`"):
        load_text(json.dumps(DEFAULT_JSON).replace("0.5", "1e999"), tmp_path)


@pytest.mark.parametrize("key", ["widths", "eta"])
def test_integer_beyond_float64(key, tmp_path):
    value = {**DEFAULT_JSON, key: [10**400, 1.0] if key == "widths" else 10**400}
    with pytest.raises(InputError, match=f"`{key}`"):
        load_text(json.dumps(value), tmp_path)


def test_numpy_train_timesteps_can_be_saved(tmp_path):
    schedule(train_timesteps=np.int64(1000)).save(tmp_path / "schedule.json")
    assert StepSchedule.load(tmp_path / "schedule.json") == schedule()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"`schedule` .*none.json.* cannot be read"):
        StepSchedule.load(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"`schedule` .*cannot be read"):
        StepSchedule.load(tmp_path)


def test_check_model():
    schedule().check_model([1.0, 0.5, 0.25], 1000)
    with pytest.raises(InputError, match=r"`widths` \(=0.5\) .*\[1.0, 0.25\]"):
        schedule().check_model([0.25, 1.0], 1000)
    with pytest.raises(InputError, match=r"`train_timesteps` \(=1000\) .*model's 500"):
        schedule().check_model([1.0, 0.5], 500)
