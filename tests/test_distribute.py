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
            widths=(1.0, 0.5),
        )
        model = DiffusionModel(randomise(unet), NoiseTable.linear(1000), seed=2)
        # The limit is far below the gradient's norm, so every step is clipped.
        model.compile(SGD(2.0, global_clipnorm=0.05), jit_compile=False)
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        data = strategy.distribute_datasets_from_function(
            lambda context: rows_of_worker(images, context)
        )
    history = model.fit(data, steps_per_epoch=1, epochs=3, shuffle=False, verbose=0).history
    logs = [np.ravel(history[name]) for name in ("loss", "loss_1", "loss_0.5")]
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
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script += f"import test_distribute; test_distribute.{function}({str(out)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def single():
    """What one device does."""
    logs, weights = train()
    # Each step changes the loss by far more than the tolerance below.
    assert np.abs(np.diff(logs[0])).min() > 1e-2
    return {"logs": logs, "weights": weights}


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    out = tmp_path_factory.mktemp("mirrored") / "out.npz"
    finish(start("train_mirrored", out))
    return np.load(out)


def assert_same_training(found, expected):
    np.testing.assert_allclose(found["logs"], expected["logs"], atol=1e-5)
    np.testing.assert_allclose(found["weights"], expected["weights"], atol=1e-5)


def test_mirrored_strategy(mirrored, single):
    assert_same_training(mirrored, single)


def test_plain_optimizer_with_a_clip_is_refused(mirrored):
    assert str(mirrored["error"]).startswith("`global_clipnorm` of a Keras optimizer")


def test_multi_worker_strategy(single, tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    outs = [tmp_path / f"worker{index}.npz" for index in range(2)]
    processes = []
    for index, out in enumerate(outs):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        processes.append(start("train_worker", out, TF_CONFIG=config))
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
    for out in outs:
        assert_same_training(np.load(out), single)
