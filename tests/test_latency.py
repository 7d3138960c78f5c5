"""Timing a step of every width: turns, medians, threads, and the file that a search reads."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from ddsm_tf import latency
from ddsm_tf.cli import run as run_cli
from ddsm_tf.cost import read_latency
from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge import benchmark as edge_benchmark
from ddsm_tf.errors import InputError
from ddsm_tf.export.savedmodel import SavedModelDenoiser
from ddsm_tf.models.compiled import CompiledDenoiser
from ddsm_tf.training import latency as program
from ddsm_tf.training.run import Run

TASKS = Path("/proc/self/task")
needs_tasks = pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")

# Milliseconds of each width's timed steps, and what must come of them.
STEPS = {1.0: (9, 3, 5, 4, 30), 0.5: (7, 7, 7, 7, 7), 0.25: (0.5, 2, 1, 4, 3)}
SUMMARIES = {
    1.0: {"median_ms": 5, "spread_ms": 5, "min_ms": 3, "max_ms": 30},
    0.5: {"median_ms": 7, "spread_ms": 0, "min_ms": 7, "max_ms": 7},
    0.25: {"median_ms": 2, "spread_ms": 2, "min_ms": 0.5, "max_ms": 4},
}


class FakeDevice:
    """A clock, and a network whose first steps of each turn and of warm-up take seconds."""

    def __init__(self):
        self.now = 1000.0
        self.calls = []

    def perf_counter(self):
        return self.now

    def denoise(self, x, t, width):
        assert (x.shape, x.dtype, t) == ((2, 4, 6, 3), np.float32, 500)
        assert abs(x.std() - 1) < 0.2  # a blank image might be quicker
        turn, is_second = divmod(self.calls.count(width), 2)
        counted = is_second and turn >= latency.WARM_UP
        self.now += STEPS[width][turn - latency.WARM_UP] / 1000 if counted else 8.0
        self.calls.append(width)

    def rest(self):
        self.now += 60.0
        self.calls.append("round")


def test_medians_and_spreads_of_widths_that_take_turns(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(latency, "time", device)
    found = latency.time_widths(
        device.denoise, list(STEPS), (4, 6, 3), batch=2, rounds=5, t=500, on_round=device.rest
    )
    assert list(found) == [1.0, 0.5, 0.25]
    for width, summary in SUMMARIES.items():
        assert found[width] == pytest.approx(STEPS[width])
        assert latency.summary(found[width]) == pytest.approx(summary)
    assert device.calls == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, "round"] * (latency.WARM_UP + 5)


def test_the_table_has_shares_of_time_and_of_macs_side_by_side():
    content = latency.latency_content(
        STEPS, runtime="litert", versions={}, batch=2, threads=1, rounds=5
    )
    lines = program.describe(content, {1.0: 1000, 0.5: 260, 0.25: 70}).splitlines()
    assert lines[0] == "litert, batch 2, threads 1, rounds 5"
    assert [line.split() for line in lines[2:]] == [
        ["1", "5.000", "±", "5.000", "100.0%", "100.0%"],
        ["0.5", "7.000", "±", "0.000", "140.0%", "26.0%"],
        ["0.25", "2.000", "±", "2.000", "40.0%", "7.0%"],
    ]


def measure(run, out, *options):
    return run_cli(["latency", str(run), "-o", str(out), *map(str, options)])


@pytest.fixture
def spied(monkeypatch):
    """What was timed and how, and how many operating-system threads that started."""
    calls = []

    def time_widths(denoise, widths, image_shape, **settings):
        before = len(list(TASKS.iterdir())) if TASKS.is_dir() else 0
        times = latency.time_widths(denoise, widths, image_shape, **settings)
        started = len(list(TASKS.iterdir())) - before if TASKS.is_dir() else 0
        owner = getattr(denoise, "__self__", denoise)
        del settings["on_round"]
        call = SimpleNamespace(owner=type(owner), settings=settings, times=times, started=started)
        calls.append(call)
        return times

    for module in (edge_benchmark, program):
        monkeypatch.setattr(module, "time_widths", time_widths)
    return calls


VERSIONS = {
    "litert": {"ai_edge_litert": importlib.metadata.version("ai-edge-litert")},
    "savedmodel": {"tensorflow": tf.__version__},
    "keras": {"tensorflow": tf.__version__, "keras": keras.__version__},
}
RUNTIMES = [
    ("litert", EdgeSampler, ["--threads", 3, "--quantize", "float16"]),
    ("savedmodel", SavedModelDenoiser, []),
    ("keras", CompiledDenoiser, ["--overwrite"]),
]


@pytest.mark.parametrize(("runtime", "owner", "options"), RUNTIMES)
def test_the_command_writes_what_a_search_reads(
    tiny_run, spied, tmp_path, monkeypatch, capfd, runtime, owner, options
):
    scratch, out = tmp_path / "scratch", tmp_path / "latency.json"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    if "--overwrite" in options:
        out.write_text("old")
    options = ["--runtime", runtime, "--batch", 3, "--rounds", 2, *options]
    assert measure(tiny_run, out, *options) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""
    (call,) = spied
    expected = {"batch": 3, "rounds": 2, "t": 500, "num_classes": 0}
    assert (call.owner, call.settings) == (owner, expected)
    if runtime == "litert" and TASKS.is_dir():
        # The narrow network's; the wide one was loaded before. The caller is the third.
        assert call.started == 2
    check_content(json.loads(out.read_text()), call, runtime)
    medians = {width: float(np.median(times)) for width, times in call.times.items()}
    assert read_latency(f"latency:{out}", (1.0, 0.5)) == medians
    lines = printed.splitlines()
    assert lines[-1] == str(out)
    shares = [line.split()[-2:] for line in lines[2:4]]
    assert shares[0] == ["100.0%", "100.0%"]
    assert shares[1][0] == f"{medians[0.5] / medians[1.0]:.1%}"
    assert not list(scratch.glob("ddsm-*"))


@pytest.mark.parametrize("runtime", program.RUNTIMES)
def test_a_network_with_classes_is_measured_too(tiny_run, tmp_path, capfd, runtime):
    config = dataclasses.replace(Run.open(tiny_run).config, num_classes=3)
    run, out = Run.create(tmp_path / "run", config), tmp_path / "latency.json"
    run.save_weights(run.new_model())
    assert measure(run.path, out, "--runtime", runtime, "--rounds", 1) == 0, capfd.readouterr().err
    assert set(json.loads(out.read_text())["widths"]) == {"1.0", "0.5"}


def check_content(content, call, runtime):
    widths = {str(width): latency.summary(times) for width, times in call.times.items()}
    assert content.pop("widths") == widths and set(widths) == {"1.0", "0.5"}
    machine = content.pop("machine")
    assert set(machine) == {"architecture", "cpu_count", "accelerators"}
    assert machine["cpu_count"] == os.cpu_count()
    assert content == {
        "format": "ddsm-latency",
        "version": 1,
        "runtime": runtime,
        "versions": VERSIONS[runtime],
        "quantize": "float16" if runtime == "litert" else "none",
        "xla": False,
        "batch": 3,
        "threads": 3 if runtime == "litert" else program.tensorflow_threads(),
        "rounds": 2,
    }


@needs_tasks
def test_litert_starts_no_threads_where_it_is_not_told(tiny_bundle):
    blank = np.zeros((1, 8, 8, 1), np.float32)
    before = len(list(TASKS.iterdir()))
    sampler = EdgeSampler(Bundle.load(tiny_bundle))
    for width in (1.0, 0.5):
        sampler.denoise(blank, 0, width)
    assert len(list(TASKS.iterdir())) - before == edge_benchmark.DEFAULT_THREADS - 1
    assert edge_benchmark.benchmark(sampler, rounds=1)["threads"] == 1


SCRIPT = """
import json, sys
from pathlib import Path
from ddsm_tf.cli import run
code = run(sys.argv[1:])
import tensorflow as tf
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
pools = tf.config.threading
intra_op = pools.get_intra_op_parallelism_threads()
inter_op = pools.get_inter_op_parallelism_threads()
print(json.dumps([code, intra_op, inter_op, names.count("tf_Compute")]))
"""


@needs_tasks
def test_tensorflow_starts_with_the_threads(tiny_run, tmp_path):
    # One more than it would take by itself.
    threads = len(os.sched_getaffinity(0)) + 1
    out = tmp_path / "latency.json"
    options = ["latency", tiny_run, "-o", out, "--runtime", "keras", "--rounds", 1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, options), "--threads", str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, threads, threads, threads]
    assert json.loads(out.read_text())["threads"] == threads


def test_tensorflows_own_choice_of_threads(monkeypatch):
    threading = tf.config.threading
    monkeypatch.setattr(threading, "get_intra_op_parallelism_threads", lambda: 0)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert program.tensorflow_threads() == 3
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "7")
    assert program.tensorflow_threads() == 7
    monkeypatch.setattr(threading, "get_intra_op_parallelism_threads", lambda: 5)
    assert program.tensorflow_threads() == 5


def test_a_file_is_not_replaced_unasked(tiny_run, tmp_path, capfd):
    out = tmp_path / "latency.json"
    out.write_text("precious")
    assert measure(tiny_run, out, "--runtime", "keras", "--rounds", 1) == 2
    assert out.read_text() == "precious"
    errors = capfd.readouterr().err
    assert errors == (
        f"ddsm: `out` (='{out}') exists already; choose another name or pass --overwrite\n"
    )


BAD = [
    (["{run}"], "-o"),
    (["{run}", "-o", "{tmp}"], "is a folder; name a file"),
    (["{tmp}", "-o", "{tmp}/x.json"], "no run folder"),
    (["{empty}", "-o", "{tmp}/x.json"], "has no weights yet"),
    (["{run}", "-o", "{tmp}/x.json", "--runtime", "onnx"], "onnx"),
    (["{run}", "-o", "{tmp}/x.json", "--batch", "0"], "--batch"),
    (["{run}", "-o", "{tmp}/x.json", "--rounds", "0"], "--rounds"),
    (["{run}", "-o", "{tmp}/x.json", "--threads", "-1"], "--threads"),
    (["{run}", "-o", "{tmp}/x.json", "--quantize", "int4"], "--quantize"),
    (
        ["{run}", "-o", "{tmp}/x.json", "--runtime", "keras", "--quantize", "float16"],
        "`quantize` (='float16') is for litert; keras is not quantised",
    ),
    (
        ["{run}", "-o", "{tmp}/x.json", "--runtime", "savedmodel", "--threads", "97"],
        "`threads` (=97) cannot be set now: TensorFlow has started",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_and_leaves_nothing(tiny_run, tmp_path, capfd, arguments, words):
    tf.config.list_logical_devices()  # starts TensorFlow, whichever test runs first
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(tiny_run / "config.json", empty)
    code = run_cli(
        ["latency", *(a.format(run=tiny_run, tmp=tmp_path, empty=empty) for a in arguments)]
    )
    printed, errors = capfd.readouterr()
    assert (code, printed) == (2, "")
    assert words in errors and errors.startswith("ddsm: ") and errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_threads_of_a_tensorflow_that_has_started_are_refused_from_python_too(tiny_run, tmp_path):
    tf.config.list_logical_devices()
    with pytest.raises(InputError, match=r"`threads` \(=97\) cannot be set now"):
        program.latency_of_run(Run.open(tiny_run), tmp_path / "x", runtime="keras", threads=97)


def test_another_backend_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(InputError, match=r"`KERAS_BACKEND` \(='jax'\) must be tensorflow"):
        program.latency_of_run(Run.open(tiny_run), tmp_path / "x")
