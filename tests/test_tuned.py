"""Fitting a network to one schedule: each width is trained where the schedule runs it."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from conftest import eagerly, randomise

from ddsm_tf.errors import InputError
from ddsm_tf.models import SGD, Adam, DiffusionModel, SlimmableUNet, TunedDiffusionModel
from ddsm_tf.models.objective import timestep_probabilities
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training import report
from ddsm_tf.training.checkpoints import Checkpoints
from ddsm_tf.training.run import Run

WIDTHS = (1.0, 0.75, 0.5, 0.25)
SHAPE = (4, 4, 1)
# Of 100 timesteps: 0.25 has 80 … 99, 0.5 has 30 … 79, 1 has 0 … 29; nobody has 0.75.
SCHEDULE = StepSchedule((90, 70, 60, 40, 20, 10), (0.25, 0.5, 0.5, 0.5, 1.0, 1.0), 100)
TIMESTEPS = {1.0: range(31), 0.5: range(31, 81), 0.25: range(81, 100)}


def make_model(schedule=SCHEDULE, table=None, classes=0, **options):
    unet = SlimmableUNet(
        image_size=4,
        channels=1,
        base_channels=16,
        channel_multipliers=(1,),
        attention_resolutions=(),
        blocks_per_level=1,
        widths=WIDTHS,
        num_classes=classes,
    )
    table = table or NoiseTable.linear(100)
    return TunedDiffusionModel(randomise(unet), table, schedule=schedule, **options)


def images(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE)).astype(np.float32)


@pytest.fixture
def seen(monkeypatch):
    """Fills with (width, timesteps) of every call of a network."""
    calls, call = [], SlimmableUNet.call

    def recorded(self, x, t, *labels, width=None, training=False):
        calls.append((width, np.asarray(t)))
        return call(self, x, t, *labels, width=width, training=training)

    monkeypatch.setattr(SlimmableUNet, "call", recorded)
    return calls


def test_timesteps_count_to_the_nearest_step():
    assert {w: range(t[0], t[-1] + 1) for w, t in SCHEDULE.timesteps_by_width().items()} == (
        TIMESTEPS
    )
    every = StepSchedule((3, 2, 1, 0), (0.5, 1.0, 0.5, 1.0), 4)
    assert every.timesteps_by_width() == {1.0: (0, 2), 0.5: (1, 3)}
    assert StepSchedule.uniform(0.5, (7,), train_timesteps=9).timesteps_by_width() == {
        0.5: tuple(range(9))
    }


def test_under_guidance_timesteps_count_to_both_branches():
    guided = StepSchedule((2, 0), (0.5, 1.0), 4, guidance_scale=2.0)
    assert guided.timesteps_by_width() == {1.0: (0, 1), 0.5: (2, 3)}
    apart = guided.with_widths((0.5, 1.0), (0.25, 0.25))
    assert apart.timesteps_by_width() == {1.0: (0, 1), 0.5: (2, 3), 0.25: (0, 1, 2, 3)}


def test_each_width_is_trained_at_its_own_timesteps(seen):
    model = make_model()
    model.compile(SGD(0.0), run_eagerly=True)
    model.fit(images(12 * 16), batch_size=16, verbose=0)
    widths = [width for width, _ in seen]
    assert widths == [model._choose_widths(step)[0] for step in range(12)]
    assert set(widths) == set(TIMESTEPS)
    for width, t in seen:
        assert set(t) <= set(TIMESTEPS[width])
    logs = {name for name, value in model.get_metrics_result().items() if value}
    assert logs == {"loss", "loss_1", "loss_0.5", "loss_0.25"}


def test_all_timesteps_of_a_width_are_drawn_alike():
    model = make_model()
    for width, timesteps in TIMESTEPS.items():
        (_, t), _, _ = model._draw_inputs(images(4000), True, width)
        counts = np.bincount(np.asarray(t), minlength=100)[timesteps.start : timesteps.stop]
        assert counts.sum() == 4000
        expected = 4000 / len(timesteps)
        assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)


def test_timesteps_are_drawn_as_often_as_training_visits_them():
    table = NoiseTable.edm(100)
    model = make_model(table=table)
    visits = timestep_probabilities(table)
    expected = np.array([visits[TIMESTEPS[width]].sum() for width in TIMESTEPS])
    choices = [model._choose_widths(step)[0] for step in range(4000)]
    shares = [choices.count(width) / 4000 for width in TIMESTEPS]
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(shares, expected, atol=0.025)
    t, _ = model._draws.timesteps_and_noise(20_000, model._trained_timesteps(0.5))
    among = visits[TIMESTEPS[0.5]]
    counts = np.bincount(np.asarray(t), minlength=100) / 20_000
    np.testing.assert_allclose(counts[TIMESTEPS[0.5]], among / among.sum(), atol=0.01)
    assert counts[TIMESTEPS[0.5]].sum() == pytest.approx(1.0)


def test_what_no_width_of_the_schedule_uses_stays():
    narrow = StepSchedule((50, 0), (0.5, 0.25), 100)
    model = make_model(narrow)
    half = model.unet.subnet(0.5)
    before = [weight.numpy() for weight in model.trainable_variables]
    model.compile(SGD(0.5), run_eagerly=True)
    model.fit(images(64), batch_size=8, verbose=0)
    changed = [
        np.count_nonzero(weight.numpy() != old)
        for weight, old in zip(model.trainable_variables, before, strict=True)
    ]
    sizes = [int(np.prod(weight.shape)) for weight in half.trainable_variables]
    for count, size, weight in zip(changed, sizes, before, strict=True):
        assert 0 < count <= size
        assert size < weight.size or weight.size == 1


def test_tuning_lowers_the_error_where_the_schedule_is():
    schedule = StepSchedule((75, 25), (0.25, 0.5), 100)
    model, data = make_model(schedule), np.tile(images(1), (64, 1, 1, 1))

    def error(width, t):
        noise = np.random.default_rng(9).standard_normal(data.shape).astype(np.float32)
        signal, scale = (factor[t] for factor in model.noise_table.signal_and_noise_scale())
        x = (signal * data + scale * noise).astype(np.float32)
        output = np.asarray(model.denoise(x, np.full(len(x), t), width))
        return float(np.square(output - noise).mean())

    places = [(0.25, 75), (0.5, 25), (1.0, 75)]
    before = [error(*place) for place in places]
    model.compile(Adam(3e-3))
    model.fit(data, batch_size=16, epochs=30, verbose=0)
    after = [error(*place) for place in places]
    assert after[0] < 0.5 * before[0] and after[1] < 0.5 * before[1]
    # The full width is used nowhere, and half of its weights were not trained.
    assert after[2] > 1.5 * after[0]


def test_validation_looks_at_every_width_and_timestep(seen):
    model = make_model()
    model.compile(SGD(0.0), run_eagerly=True)
    model.evaluate(images(400), batch_size=400, verbose=0)
    assert [width for width, _ in seen] == list(WIDTHS)
    for _, t in seen:
        np.testing.assert_array_equal(t, seen[0][1])
    assert seen[0][1].min() < 5 and seen[0][1].max() > 94


def test_a_tuned_model_is_saved_with_its_schedule(tmp_path):
    model = make_model()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert isinstance(loaded, TunedDiffusionModel) and loaded.schedule == SCHEDULE
    assert loaded._trained_timesteps(0.5) == tuple(TIMESTEPS[0.5])


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"`distillation` \(=0.3\) must be 0 with a schedule"):
        make_model(distillation=0.3)
    with pytest.raises(InputError, match=r"0\.3"):
        make_model(StepSchedule.uniform(0.3, (5, 0), train_timesteps=100))
    with pytest.raises(InputError, match="train_timesteps"):
        make_model(StepSchedule.uniform(0.5, (5, 0)))


TUNED = StepSchedule((750, 500, 250, 0), (0.5, 0.5, 1.0, 1.0))


@pytest.fixture(scope="module")
def source(tiny_run, tmp_path_factory):
    """A run with a schedule."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("tuned") / "source")
    TUNED.save(run / "schedule.json")
    return run


@pytest.fixture
def tune(source, run_here):
    def tune(out, *arguments):
        with eagerly():
            return run_here("tune", source, "--out", out, *arguments)

    return tune


def test_tune_makes_a_run_of_its_own(source, tmp_path, tune, run_here):
    out = tmp_path / "tuned"
    done = tune(out, "--set", "sample_every=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"trained 3 steps: {out / 'weights.keras'}\n"
    before, run = Run.open(source), Run.open(out)
    # A third of ten steps, half of the rate.
    assert run.config.steps == 3
    assert run.config.learning_rate == pytest.approx(before.config.learning_rate / 2)
    assert run.config.tuned_from == str(source)
    # Exports say so, for with other schedules the network is worse.
    assert run.provenance["tuned_for"] == "2 steps at 1, 2 steps at 0.5"
    assert StepSchedule.load(out / "schedule.json") == TUNED
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step_00000003_schedule.png"
    ]
    old, new = before.load_unet().get_weights(), run.load_unet().get_weights()
    moved = max(np.abs(a - b).max() for a, b in zip(old, new, strict=True))
    # Warming up, Adam moves a weight by at most the rate a step.
    assert 1e-6 < moved < 3 * run.config.learning_rate
    # Nothing else is needed to go on, and the judge is the same.
    for name in ("config.json", "weights.keras"):
        assert (out / "tuning" / name).read_bytes() == (source / name).read_bytes()
    assert (out / "classifier.keras").read_bytes() == (source / "classifier.keras").read_bytes()
    sampled = run_here("sample", out, "-n", 2, "-o", tmp_path / "x.npy")
    assert sampled.returncode == 0, sampled.stderr


def test_the_note_of_a_schedule_with_many_widths_fits_a_bundle(source, tmp_path):
    config = dataclasses.replace(Run.open(source).config, tuned_from="source")
    run = Run(shutil.copytree(source, tmp_path / "run"), config)
    run.tuning_path.mkdir()

    def note(widths):
        schedule = StepSchedule(
            tuple(range(99))[::-1], tuple((11 + i % widths) / 100 for i in range(99))
        )
        schedule.save(run.tuning_path / "schedule.json")
        return run.provenance["tuned_for"]

    assert note(3) == "33 steps at 0.13, 33 steps at 0.12, 33 steps at 0.11"
    # One more width makes 201 characters, and a manifest takes 200.
    assert len(note(11)) == 184 and note(11).startswith("9 steps at 0.21, ")
    assert note(12) == "99 steps at 12 widths"


@pytest.mark.slow
def test_an_interrupted_tuning_goes_on_to_the_same_weights(source, tmp_path, tune):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tune(whole, "--steps", 6).returncode == 0
    assert tune(parts, "--steps", 4).returncode == 0
    refused = tune(parts, "--steps", 6)
    assert refused.returncode == 2 and "pass --resume" in refused.stderr
    done = tune(parts, "--steps", 6, "--resume")
    assert done.returncode == 0, done.stderr
    states = [np.load(Checkpoints(run / "checkpoints").file(6)) for run in (whole, parts)]
    assert len(states[0].files) > 50
    for name in states[0].files:
        np.testing.assert_array_equal(states[0][name], states[1][name])


def test_a_folder_that_was_cut_short_is_completed(source, tmp_path, tune):
    out = tmp_path / "tuned"
    out.mkdir()
    done = tune(tmp_path / "other", "--steps", 1)
    assert done.returncode == 0
    shutil.copy(tmp_path / "other" / "config.json", out)
    done = tune(out, "--steps", 1, "--resume")
    assert done.returncode == 0, done.stderr
    assert StepSchedule.load(out / "tuning" / "schedule.json") == TUNED
    assert json.loads((out / "tuning" / "config.json").read_text())["tuned_from"] == ""


def test_the_report_says_how_it_was_tuned(source, tmp_path, tune):
    out = tmp_path / "tuned"
    assert tune(out, "--steps", 1, "--set", "seed=4").returncode == 0
    commands = report._commands(Run.open(out)).splitlines()
    assert commands[0] == (
        f"ddsm tune {source} --schedule tuned/tuning/schedule.json --out tuned "
        "--set steps=1 --set seed=4"
    )
    assert commands[1].startswith("ddsm sample tuned")


def test_any_schedule_can_be_tuned_for(source, tmp_path, tune):
    out = tmp_path / "tuned"
    done = tune(out, "--steps", 1, "--schedule", "uniform:0.5")
    assert done.returncode == 0, done.stderr
    run = Run.open(out)
    assert set(run.tuned_schedule.widths) == {0.5} and len(run.tuned_schedule) == 4
    assert isinstance(run.model_to_train(), TunedDiffusionModel)
    assert type(run.load_model()) is DiffusionModel
    done = tune(out, "--steps", 1, "--resume")
    assert done.returncode == 2
    assert "`--schedule` (='2 steps at 0.5, 2 steps at 1') is another than" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "base_channels=16"], "is fixed by the network that is tuned: 8"),
        (["--set", "prediction=v"], "is fixed by the network that is tuned: 'epsilon'"),
        (["--set", "tuned_from=x"], "is no field"),
        (["--set", "distillation=0.5"], "`distillation` (=0.5) must be 0"),
        (["--schedule", "uniform:0.3"], "0.3"),
        (["--schedule", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, tune, arguments, words):
    done = tune(tmp_path / "tuned", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "tuned").exists()


def test_a_run_without_schedule_or_weights_cannot_be_tuned(tiny_run, tmp_path, run_here):
    done = run_here("tune", tiny_run, "--out", tmp_path / "x")
    assert done.returncode == 2 and "run `ddsm search` first" in done.stderr
    bare = shutil.copytree(tiny_run, tmp_path / "bare")
    (bare / "weights.keras").unlink()
    done = run_here("tune", bare, "--out", tmp_path / "x", "--schedule", "full")
    assert done.returncode == 2 and "has no weights yet" in done.stderr
    assert not (tmp_path / "x").exists()
