"""Training on two devices and in two processes takes the steps of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import randomise

ROWS = 8


def train(strategy=None):
    """Three steps on one batch; returns the log of each and the weights after."""
    import contextlib

    import tensorflow as tf

    from ddsm_tf.models import SGD, DiffusionModel, SlimmableUNet
    from ddsm_tf.noise import NoiseTable

    images = np.random.default_rng(0).uniform(-1, 1, (ROWS, 4, 4, 1)).astype(np.float32)
    data = tf.data.Dataset.from_tensors(images)
    with strategy.scope() if strategy else contextlib.nullcontext():
        unet = SlimmableUNet(
            image_size=4,
            channels=1,
            base_channels=8,
            channel_multipliers=(1,),
            attention_resolutions=(),
            blocks_per_level=1,
            widths=(1.0,),
        )
        model = DiffusionModel(randomise(unet), NoiseTable.linear(1000), seed=2)
        # The limit is far below the gradient's norm, so every step is clipped.
        model.compile(SGD(2.0, global_clipnorm=0.05), jit_compile=False)
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        data = strategy.distribute_datasets_from_function(
            lambda context: rows_of_worker(images, context)
        )
    history = model.fit(data, steps_per_epoch=1, epochs=3, shuffle=False, verbose=0).history
    logs = [np.ravel(history[name]) for name in ("loss", "loss_1")]
    weights = [weight.numpy().ravel() for weight in model.trainable_variables]
    return np.stack(logs), np.concatenate(weights)


def rows_of_worker(images, context):
    """A worker's half of the global batch, in order: worker 0 has the first rows."""
    import tensorflow as tf

    rows = ROWS // context.num_input_pipelines
    first = rows * context.input_pipeline_id
    return tf.data.Dataset.from_tensors(images[first : first + rows]).repeat()


def train_mirrored(out):
    """In a process of its own: two logical devices must be asked for before all else."""
    import tensorflow as tf

    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    error = compile_with_plain_optimizer(strategy)
    logs, weights = train(strategy)
    np.savez(out, logs=logs, weights=weights, error=error)


def train_worker(out):
    """In a process of its own, which `TF_CONFIG` makes one of two."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == 2
    logs, weights = train(strategy)
    np.savez(out, logs=logs, weights=weights)


def compile_with_plain_optimizer(strategy):
    """The error message that a Keras optimizer with a clip is refused with."""
    import keras

    from ddsm_tf.errors import InputError
    from ddsm_tf.models import DiffusionModel, SlimmableUNet
    from ddsm_tf.noise import NoiseTable

    with strategy.scope():
        unet = SlimmableUNet(4, 1, 4, (1,), (), widths=(1.0,))
        model = DiffusionModel(unet, NoiseTable.linear(10))
        model.compile(keras.optimizers.SGD(0.1))  # without a clip there is nothing to refuse
        try:
            model.compile(keras.optimizers.SGD(0.1, global_clipnorm=1.0))
        except InputError as error:
            return str(error)
    return ""


def start(function, out, **environment):
    """Run a function of this file in a process of its own."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"import test_distribute; test_distribute.{function}({str(out)!r})"
    # A file and not a pipe, since nobody reads while the process runs.
    with open(out.with_suffix(".txt"), "w") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, **environment}, stderr=errors
        )


def finish(process, out):
    """Wait for the process; returns what it saved."""
    process.wait(timeout=240)
    assert process.returncode == 0, out.with_suffix(".txt").read_text()[-3000:]
    return np.load(out)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Name → (process, its output), all started at once."""
    folder = tmp_path_factory.mktemp("distribute")
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    environments = {"mirrored": {}}
    for index in range(2):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": addresses}, "task": task}
        environments[f"worker{index}"] = {"TF_CONFIG": json.dumps(config)}
    processes = {}
    try:
        for name, environment in environments.items():
            function = "train_mirrored" if name == "mirrored" else "train_worker"
            out = folder / f"{name}.npz"
            processes[name] = start(function, out, **environment), out
        yield processes
    finally:
        for process, _ in processes.values():
            process.kill()


@pytest.fixture(scope="module")
def single(processes):
    """What one device does, while the others are at work."""
    logs, weights = train()
    # Each step changes the loss by far more than the tolerance below.
    assert np.abs(np.diff(logs[0])).min() > 1e-2
    return logs, weights


@pytest.mark.parametrize("name", ["mirrored", "worker0", "worker1"])
def test_training_is_that_of_one_device(processes, single, name):
    found = finish(*processes[name])
    logs, weights = single
    np.testing.assert_allclose(found["logs"], logs, atol=1e-5)
    np.testing.assert_allclose(found["weights"], weights, atol=1e-5)


def test_plain_optimizer_with_a_clip_is_refused(processes):
    error = str(finish(*processes["mirrored"])["error"])
    assert error.startswith("`global_clipnorm` of a Keras optimizer")
