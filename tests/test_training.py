"""The training program: killed anywhere it goes on to the same weights; what it writes is whole."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import EAGER, TINY_SETTINGS, eagerly, run_ddsm, set_options

from ddsm_tf.errors import InputError
from ddsm_tf.training import callbacks
from ddsm_tf.training.callbacks import keep_history_until, read_history
from ddsm_tf.training.checkpoints import Checkpoints
from ddsm_tf.training.run import Run
from ddsm_tf.training.strategy import Placement
from ddsm_tf.training.train import open_shared_run

STEPS = 10
SETTINGS = [*TINY_SETTINGS, "sample_every=10"]

# Runs `ddsm`, but dies at the given step as a machine does that loses its power.
DYING = """
import os, signal, sys
import ddsm_tf.files as files
from ddsm_tf.training import callbacks

step, where = int(sys.argv[1]), sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if where == "after step":
    update = callbacks.StepBar.after_step
    callbacks.StepBar.after_step = lambda self, logs: die() if self.step == step else None
else:
    sync = files._sync
    files._sync = lambda path: die() if f"step_{step:08d}" in path.name else sync(path)

from ddsm_tf.cli import main
main(sys.argv[3:])
"""


def train_arguments(out, *more, steps=STEPS):
    settings = set_options(SETTINGS)
    return ["train", "digits", "--out", str(out), "--steps", str(steps), *settings, *more]


def final_state(run):
    with np.load(run / "checkpoints" / f"step_{STEPS:08d}.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run_ddsm(*train_arguments(out))
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.mark.parametrize(
    ("step", "where", "left"),
    [
        pytest.param(2, "after step", [], marks=pytest.mark.slow),
        pytest.param(7, "after step", [4], marks=pytest.mark.slow),
        (8, "within the checkpoint", [4]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(uninterrupted, tmp_path, step, where, left):
    out = tmp_path / "run"
    arguments = [sys.executable, "-c", DYING, str(step), where, *train_arguments(out)]
    killed = subprocess.run(arguments, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Checkpoints(out / "checkpoints").steps() == left
    refused = run_ddsm(*train_arguments(out))
    assert refused.returncode == 2 and "--resume" in refused.stderr
    done = run_ddsm(*train_arguments(out, "--resume"))
    assert done.returncode == 0, done.stderr
    expected, found = final_state(uninterrupted), final_state(out)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    assert not list(out.rglob(".*"))
    keys = ("step", "loss", "loss_1", "loss_0.5")
    assert [[e[k] for k in keys] for e in read_history(out / "logs" / "history.jsonl")] == [
        [e[k] for k in keys] for e in read_history(uninterrupted / "logs" / "history.jsonl")
    ]


def test_a_signal_ends_training_after_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    arguments = train_arguments(out, "--set", "checkpoint_every=100000", steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-c", EAGER, *arguments],
        cwd=Path(__file__).parent,
        stderr=subprocess.PIPE,
        text=True,
    )
    history = out / "logs" / "history.jsonl"
    while not history.exists() or not history.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    (step,) = Checkpoints(out / "checkpoints").steps()
    assert process.returncode == 130
    assert stderr == f"ddsm: stopped at step {step}; go on with --resume\n"
    assert (out / "weights.keras").is_file()


def test_a_run_folder_holds_what_the_interface_promises(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"config.json", "checkpoints", "weights.keras", "logs", "samples"}
    history = read_history(uninterrupted / "logs" / "history.jsonl")
    assert [entry["step"] for entry in history] == [2, 4, 6, 8, 10]
    assert history[-1]["loss"] < history[0]["loss"]
    events = EventAccumulator(str(uninterrupted / "logs")).Reload()
    assert {"loss", "loss_1", "loss_0.5", "learning_rate"} <= set(events.Tags()["tensors"])


def test_weights_are_the_moving_average(uninterrupted):
    run = Run.open(uninterrupted)
    unet = run.load_unet()
    state = list(final_state(uninterrupted).values())[1:]
    raw = state[: len(unet.trainable_variables)]
    saved = [np.asarray(variable) for variable in unet.trainable_variables]
    largest = max(np.abs(a - b).max() for a, b in zip(raw, saved, strict=True))
    assert 1e-5 < largest < 0.1
    averages = [v for v in state[len(raw) :] if v.ndim]
    assert any(v.shape == saved[0].shape and np.array_equal(v, saved[0]) for v in averages)


def test_a_run_can_be_given_more_steps_but_no_other_settings(uninterrupted, tmp_path, run_here):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    done = run_here(*train_arguments(out, "--resume", "--set", "learning_rate=1e-4"))
    assert done.returncode == 2
    assert "`learning_rate` (=0.0001) differs" in done.stderr
    with eagerly():
        done = run_here(*train_arguments(out, "--resume", steps=12))
    assert done.returncode == 0, done.stderr
    assert Checkpoints(out / "checkpoints").steps() == [8, 10, 12]
    assert json.loads((out / "config.json").read_text())["steps"] == 12


def test_a_resumed_run_keeps_the_steps_and_settings_it_was_started_with(
    uninterrupted, tmp_path, run_here
):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    config = (out / "config.json").read_bytes()
    done = run_here("train", "digits", "--out", out, "--resume")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "trained 10 steps")
    fewer = run_here("train", "digits", "--out", out, "--resume", "--steps", "8")
    assert fewer.returncode == 2
    assert "`steps` (=8) must be at least the run's 10" in fewer.stderr
    other = run_here("train", "cifar10_16", "--out", out, "--resume")
    assert other.returncode == 2
    assert "`preset` (='cifar10_16') differs from the run's 'digits'" in other.stderr
    assert (out / "config.json").read_bytes() == config


def test_a_worker_takes_the_steps_it_was_told_before_the_chief_has_written_them(
    uninterrupted, tmp_path
):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    config = dataclasses.replace(Run.open(out).config, steps=12)
    worker = Placement(worker=1, workers=2, replicas=2)
    run = open_shared_run(out, config, lambda: pytest.fail("opened"), worker, "config.json")
    assert (run.path, run.config.steps) == (out, 12)


def test_a_refused_command_does_not_stand_in_the_way_of_the_corrected_one(tmp_path, run_here):
    run = tmp_path / "run"
    for wrong in (["--data", f"npz:{tmp_path}/typo.npz"], ["--set", "widths=1,0.99"]):
        assert run_here(*train_arguments(run, *wrong, steps=1)).returncode == 2
        assert not run.exists()
    run.mkdir()
    (run / "cache").mkdir()
    assert run_here(*train_arguments(run, *wrong, steps=1)).returncode == 2
    assert [item.name for item in run.iterdir()] == ["cache"]
    assert run_here(*train_arguments(run, steps=1)).returncode == 0
    # What has been trained stays, whatever is asked of it.
    (run / "checkpoints" / "step_00000001.npz").write_bytes(b"broken")
    assert run_here(*train_arguments(run, "--resume", steps=2)).returncode == 2
    assert (run / "config.json").exists() and (run / "weights.keras").exists()


def test_a_loss_that_is_not_finite_stops_with_the_setting_to_blame(tmp_path, run_here):
    arguments = ["--set", "learning_rate=1e30", "--set", "warmup_steps=0"]
    with eagerly():
        done = run_here(*train_arguments(tmp_path / "run", *arguments))
    assert done.returncode == 2
    assert "learning_rate" in done.stderr and done.stderr.count("\n") == 1


def test_seconds_of_a_step_count_the_steps_since_the_start(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])
    log = callbacks.LossLog(tmp_path, 7, 5, batch_size=6)
    monkeypatch.setattr(log, "sync", lambda: None)
    monkeypatch.setattr(log, "_means", lambda logs: {"loss": 1.0})
    log.set_model(mock.Mock(optimizer=mock.Mock(learning_rate=0.1)))
    for _ in range(8):
        clock[0] += 2.0
        log.on_train_batch_end(0)
    entries = read_history(tmp_path / "history.jsonl")
    # Three steps after the resumption at the seventh, then five.
    assert [entry["step"] for entry in entries] == [10, 15]
    assert [entry["seconds_per_step"] for entry in entries] == [2.0, 2.0]
    assert entries[0]["images_per_second_per_device"] == 3.0


def test_sample_grids_are_made_along_the_way(uninterrupted):
    from PIL import Image

    files = sorted(path.name for path in (uninterrupted / "samples").iterdir())
    assert files == ["step_00000010_width_0.5.png", "step_00000010_width_1.png"]
    with Image.open(uninterrupted / "samples" / files[0]) as image:
        assert image.size == (6 * (6 * 9 - 1), 6 * (6 * 9 - 1))


class Variable:
    """A stand-in for a Keras variable."""

    def __init__(self, value):
        self.value = np.asarray(value)
        self.shape = self.value.shape

    def assign(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return self.value


def test_checkpoints_keep_every_dtype_and_the_newest_three(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    values = [np.float32([[1.5, -0.0]]), np.int64(7), np.uint32([2**32 - 1])]
    assert checkpoints.restore_latest([Variable(value) for value in values]) == 0
    for step in (1, 2, 3, 4):
        checkpoints.save(step, [Variable(value) for value in values])
    assert checkpoints.steps() == [2, 3, 4]
    variables = [Variable(np.zeros_like(value)) for value in values]
    assert checkpoints.restore_latest(variables) == 4
    for variable, value in zip(variables, values, strict=True):
        assert variable.value.dtype == value.dtype
        np.testing.assert_array_equal(variable.value, value)


def test_a_broken_or_foreign_checkpoint_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, [Variable(np.zeros(2))])
    with pytest.raises(InputError, match="another architecture"):
        checkpoints.restore_latest([Variable(np.zeros(3))])
    file = checkpoints.file(3)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"step_00000003.npz.*broken"):
        checkpoints.restore_latest([Variable(np.zeros(2))])


def test_history_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n{"step": 6, "lo')
    assert [entry["step"] for entry in read_history(path)] == [2, 4]
    keep_history_until(path, 2)
    assert path.read_text() == '{"step": 2, "loss": 1.0}\n'
