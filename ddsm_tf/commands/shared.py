"""Options that several commands take, and how a command starts."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import click

from ddsm_tf.console import debugging, without_stderr
from ddsm_tf.schedule import SAMPLERS

schedule_option = click.option(
    "--schedule",
    metavar="FILE|full|uniform:W",
    help="Step schedule; the searched one by default, full width where none was searched.",
)
sampler_option = click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    help="Sampler of every schedule; the run's if left out.",
)
steps_option = click.option(
    "--steps", type=click.IntRange(min=1), help="Sampler steps; the run's default if left out."
)
cost_option = click.option(
    "--cost", default="macs", show_default=True, metavar="macs|parameters|latency:FILE"
)
run_argument = click.argument("run", metavar="RUN")
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True
)
# `ddsm_tf.export.QUANTIZE`; click wants the names before the heavy modules are there.
quantize_option = click.option(
    "--quantize",
    type=click.Choice(["none", "float16", "dynamic", "dynamic-mixed", "int8", "int8-mixed"]),
    default="none",
    show_default=True,
    help="Precision of tflite; mixed keeps the first and last convolution float32.",
)
xla_option = click.option(
    "--xla",
    is_flag=True,
    help="Compile by XLA: seconds for each width and batch size, and faster from then on.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an earlier output.")


def open_run(path: str, threads: int = 0) -> Any:
    from ddsm_tf.training.run import Run

    run = Run.open(path)
    quiet_tensorflow(threads)
    return run


def quiet_tensorflow(threads: int = 0) -> None:
    """Import TensorFlow without its start-up lines, and keep its later warnings quiet.

    Args:
        threads: that it computes with; 0 leaves the number to it.

    Raises:
        InputError: it has started already, with another number.
    """
    quiet_logs()
    without_stderr(lambda: _start_tensorflow(threads))


def quiet_logs() -> None:
    if not debugging():
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        for name in ("absl", "tensorflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def _start_tensorflow(threads: int) -> None:
    try:
        import tensorflow as tf
    except ImportError:
        return
    if threads:
        from ddsm_tf.latency import limit_tensorflow

        limit_tensorflow(threads)
    import keras

    if keras.backend.backend() != "tensorflow":
        # TensorFlow only feeds data then, and would take the memory of GPUs that JAX is to have.
        tf.config.set_visible_devices([], "GPU")
    tf.config.list_logical_devices()
