"""`ddsm train --strategy`: two workers train what one process does, and survive the loss of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import run_ddsm, set_options

from ddsm_tf.errors import InputError
from ddsm_tf.training import strategy
from ddsm_tf.training.run import Run
from ddsm_tf.training.strategy import Placement, make_placement, restarts_left

SETTINGS = ["base_channels=8", "channel_multipliers=1", "widths=1", "batch_size=8"]
SETTINGS += ["checkpoint_every=4", "sample_every=0", "log_every=4", "warmup_steps=2"]
SETTINGS += ["learning_rate_decay=constant", "learning_rate=1e-3", "attention_resolutions="]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def arguments(out, steps, *options):
    settings = set_options(SETTINGS)
    return ["train", "digits", "--out", str(out), "--steps", str(steps), *settings, *options]


def start_worker(index, ports, out, steps, log, *options):
    config = {
        "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
        "task": {"type": "worker", "index": index},
    }
    environment = {**os.environ, "TF_CONFIG": json.dumps(config), "GRPC_FAIL_FAST": "use_caller"}
    with open(log, "a") as file:
        command = [sys.executable, "-m", "ddsm_tf.cli", *arguments(out, steps, *options)]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def wait_for(condition, what, seconds=150):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def checkpoint_values(run, step):
    with np.load(Run.open(run).checkpoints.file(step)) as archive:
        return [archive[name] for name in sorted(archive.files)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_killed_and_started_again_goes_on(tmp_path):
    out, steps, ports = tmp_path / "two", 60, free_ports(2)
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    workers = [start_worker(index, ports, out, steps, logs[index]) for index in range(2)]
    try:
        wait_for(
            lambda: any((out / "checkpoints").glob("step_*.npz")) or workers[0].poll() is not None,
            "no checkpoint",
        )
        assert [w.poll() for w in workers] == [None, None], [log.read_text() for log in logs]
        workers[1].send_signal(signal.SIGKILL)
        workers[1].wait()
        workers[1] = start_worker(1, ports, out, steps, logs[1], "--resume")
        wait_for(lambda: all(w.poll() is not None for w in workers), "workers hang", 200)
        assert [w.returncode for w in workers] == [0, 0], [log.read_text() for log in logs]
    finally:
        for worker in workers:
            worker.kill()
    single = run_ddsm(*arguments(tmp_path / "one", steps, "--strategy", "single"))
    assert "trained 60 steps" in single.stdout
    text = logs[0].read_text()
    assert "global batch 8 = 2 workers × 1 devices × 4 images; learning rate 0.001" in text
    assert "a worker was lost" in text
    for two, one in zip(
        checkpoint_values(out, steps), checkpoint_values(tmp_path / "one", steps), strict=True
    ):
        np.testing.assert_allclose(two, one, rtol=2e-3, atol=2e-4)
    history = [json.loads(line) for line in (out / "logs" / "history.jsonl").open()]
    assert [entry["step"] for entry in history] == list(range(4, steps + 1, 4))
    last = history[-1]
    assert last["images_per_second_per_device"] == pytest.approx(4 / last["seconds_per_step"])
    assert 0.1 < last["peak_memory_gib"] < 64


# `ddsm` on a host whose CPU stands for two devices, which must be asked for before all else.
TWO_DEVICES = """
import sys
import tensorflow as tf

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from ddsm_tf.cli import main
main(sys.argv[1:])
"""


def test_the_devices_of_a_host_train_as_one(tmp_path):
    classes = ["--set", "num_classes=10"]
    command = arguments(tmp_path / "two", 8, *classes, "--strategy", "mirrored")
    two = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, *command], capture_output=True, text=True, check=False
    )
    assert two.returncode == 0, two.stderr[-3000:]
    assert "global batch 8 = 1 workers × 2 devices × 4 images" in two.stderr
    # A single CPU is no reason for a strategy.
    one = run_ddsm(*arguments(tmp_path / "one", 8, *classes, "--strategy", "mirrored"))
    assert (one.returncode, one.stderr) == (0, "")
    for mirrored, single in zip(
        checkpoint_values(tmp_path / "two", 8), checkpoint_values(tmp_path / "one", 8), strict=True
    ):
        np.testing.assert_allclose(mirrored, single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("nonsense", "TF_CONFIG"),
        ('{"cluster": {}}', "TF_CONFIG"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
            "none of the 1",
        ),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
            "must be a worker",
        ),
    ],
)
def test_a_broken_cluster_is_one_clear_line(text, rule, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match=rule):
        make_placement("auto")


@pytest.mark.parametrize(("kind", "index", "place"), [("chief", 0, 0), ("worker", 1, 2)])
def test_a_chief_comes_before_the_workers(kind, index, place, monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    config = {"cluster": cluster, "task": {"type": kind, "index": index}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert strategy._cluster() == (3, place)


def test_choices(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert make_placement("auto") == make_placement("single") == Placement()
    with pytest.raises(InputError, match="two workers or more"):
        make_placement("multiworker")
    with pytest.raises(InputError, match="must be one of"):
        make_placement("parameter_server")
    placement = Placement(workers=2, replicas=6)
    placement.check_batch(12)
    with pytest.raises(InputError, match=r"`batch_size` \(=10\).*6 devices"):
        placement.check_batch(10)
    assert "2 workers × 3 devices × 2 images" in placement.describe(12, 1e-3)


def test_restarts_end(monkeypatch):
    monkeypatch.setenv("DDSM_RESTARTS", "3")
    assert restarts_left() == 3
    from ddsm_tf.training.strategy import restart_after

    with pytest.raises(InputError, match="start all workers again with --resume"):
        restart_after(RuntimeError("peer gone"), 0)


RESTARTING = """
import sys
from ddsm_tf.training.strategy import restart_after, restarts_left

if restarts_left() > 8:
    restart_after(RuntimeError("peer gone"), restarts_left())
print(sys.argv[1:], restarts_left(), sys.flags.utf8_mode)
"""


def test_a_worker_starts_again_as_it_was_started(tmp_path):
    # A script of another folder, as `ddsm` is: what lies in the working directory is not imported.
    script, here = tmp_path / "bin" / "ddsm", tmp_path / "here"
    script.parent.mkdir()
    script.write_text(RESTARTING)
    here.mkdir()
    (here / "numpy.py").write_text("raise SystemExit('a stranger ran code')")
    done = subprocess.run(
        [sys.executable, "-X", "utf8", script, "train", "--resume", "digits"],
        cwd=here,
        env={**os.environ, "DDSM_RESTARTS": "10", "KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "['train', 'digits', '--resume'] 8 1\n")
    assert done.stderr == "a worker was lost (peer gone); starting again\n" * 2
