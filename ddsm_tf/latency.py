"""How long a denoising step takes at each width on the machine at hand.

`ddsm latency` and `ddsm-edge benchmark` both time with `time_widths` and write `latency_content`;
`ddsm_tf.cost.read_latency` reads it. Only `limit_tensorflow` imports more than NumPy.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.labels import labels_in_turn

FORMAT = "ddsm-latency"
VERSION = 1
# Rounds that are not counted: the first builds each width's graph, the next ones its caches.
WARM_UP = 3

Denoise = Callable[..., np.ndarray]


def time_widths(
    denoise: Denoise,
    widths: Sequence[float],
    image_shape: tuple[int, int, int],
    *,
    batch: int,
    rounds: int,
    t: int,
    num_classes: int = 0,
    on_round: Callable[[], Any] | None = None,
) -> dict[float, list[float]]:
    """Time one step of every width, as a sampler calls it: NumPy in, NumPy out.

    The widths take turns within each round, so that a machine that slows down while it is
    measured slows all of them alike. A turn is two steps and the second is timed: a schedule keeps
    its width for many steps, so a step mostly finds its own weights in the caches and not those
    of another width. (A small network's quarter width took 0.11 ms right after another width, and
    0.06 ms after its own.)

    Args:
        denoise: `(x, t, width) → ε`, or of `(x, t, width, labels)` for a model with classes; it
            must not return before ε is there.
        widths: to be timed, in this order.
        image_shape: (H, W, C).
        batch: images a step.
        rounds: timed steps a width, after `WARM_UP` that are not.
        t: timestep of every image.
        num_classes: of a model with classes, which also takes labels.
        on_round: called after each round, those that warm up included.

    Returns:
        Width → milliseconds of its step in every round, for the whole batch.
    """
    x = np.random.RandomState(0).standard_normal((batch, *image_shape)).astype(np.float32)
    labels = (labels_in_turn(num_classes, 0, batch),) if num_classes else ()
    milliseconds: dict[float, list[float]] = {width: [] for width in widths}
    for round_number in range(WARM_UP + rounds):
        for width, times in milliseconds.items():
            denoise(x, t, width, *labels)
            started = time.perf_counter()
            denoise(x, t, width, *labels)
            elapsed = time.perf_counter() - started
            if round_number >= WARM_UP:
                times.append(1000.0 * elapsed)
        if on_round:
            on_round()
    return milliseconds


def summary(times: Sequence[float]) -> dict[str, float]:
    """`median_ms`, `spread_ms` (between the quartiles), `min_ms` and `max_ms` of milliseconds."""
    low, median, high = np.percentile(times, (25, 50, 75))
    return {
        "median_ms": float(median),
        "spread_ms": float(high - low),
        "min_ms": min(times),
        "max_ms": max(times),
    }


def latency_content(
    times: Mapping[float, Sequence[float]],
    *,
    runtime: str,
    versions: Mapping[str, str],
    batch: int,
    threads: int,
    rounds: int,
    quantize: str = "none",
    xla: bool = False,
    accelerators: Sequence[str] = (),
) -> dict[str, Any]:
    """What a latency file says.

    Args:
        times: what `time_widths` gave.
        runtime: what ran the network.
        versions: library → version, of that runtime.
        batch: images a step.
        threads: CPU threads that the runtime was given.
        rounds: timed steps a width.
        quantize: how the network's weights were quantised.
        xla: whether XLA compiled the network.
        accelerators: names of the devices beside the CPU that the runtime could use.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "runtime": runtime,
        "versions": dict(versions),
        "quantize": quantize,
        "xla": xla,
        "batch": batch,
        "threads": threads,
        "rounds": rounds,
        # What tells machines of different speed apart, and nothing that tells whose it is.
        "machine": {
            "architecture": platform.machine(),
            "cpu_count": os.cpu_count(),
            "accelerators": list(accelerators),
        },
        "widths": {str(width): summary(found) for width, found in times.items()},
    }


def limit_tensorflow(threads: int) -> None:
    """Have TensorFlow compute with so many CPU threads: as many for the parts of an operation
    (intra-op) as for operations side by side (inter-op), as its own choice would.

    Raises:
        InputError: TensorFlow has started with another number, and cannot change it.
    """
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    except RuntimeError as error:
        rule = "cannot be set now: TensorFlow has started; measure in a process of its own"
        raise invalid("threads", threads, rule) from error
