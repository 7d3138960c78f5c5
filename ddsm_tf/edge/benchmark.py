"""How long a step takes at each width on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ddsm_tf.edge.sampler import EdgeSampler

WARM_UP = 3


def benchmark(
    sampler: EdgeSampler,
    *,
    batch: int = 1,
    rounds: int = 30,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Time one step of every width.

    The widths take turns within each round, so that a device that slows down while it is measured
    slows all of them alike.

    Args:
        sampler: the bundle and its interpreters.
        batch: images a step.
        rounds: timed steps a width, after three that are not.
        on_round: called after each round.

    Returns:
        `widths`: width → `median_ms`, `min_ms`, `max_ms` of a step; and the settings.
    """
    bundle = sampler.bundle
    x = np.random.RandomState(0).standard_normal((batch, *bundle.image_shape)).astype(np.float32)
    t = bundle.noise_table.train_timesteps // 2
    milliseconds: dict[float, list[float]] = {width: [] for width in bundle.files}
    for round_number in range(WARM_UP + rounds):
        for width, times in milliseconds.items():
            started = time.perf_counter()
            sampler.denoise(x, t, width)
            if round_number >= WARM_UP:
                times.append(1000.0 * (time.perf_counter() - started))
        if on_round:
            on_round()
    return {
        "widths": {
            str(width): {
                "median_ms": float(np.median(times)),
                "min_ms": min(times),
                "max_ms": max(times),
            }
            for width, times in milliseconds.items()
        },
        "batch": batch,
        "threads": sampler.threads,
        "rounds": rounds,
        "quantize": bundle.quantize,
    }
