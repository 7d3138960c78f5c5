"""How long a step takes at each width on this device."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from ddsm_tf.edge.sampler import EdgeSampler
from ddsm_tf.latency import latency_content, time_widths

# What LiteRT's interpreter takes where it is not told; it starts no thread of its own then.
DEFAULT_THREADS = 1


def benchmark(
    sampler: EdgeSampler,
    *,
    batch: int = 1,
    rounds: int = 30,
    on_round: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Time one step of every width.

    Args:
        sampler: the bundle and its interpreters.
        batch: images a step.
        rounds: timed steps a width, after `WARM_UP` that are not.
        on_round: called after each round, those that warm up included.

    Returns:
        The content of a latency file: see `ddsm_tf.latency`.
    """
    bundle = sampler.bundle
    times = time_widths(
        sampler.denoise,
        list(bundle.files),
        bundle.image_shape,
        batch=batch,
        rounds=rounds,
        t=bundle.noise_table.train_timesteps // 2,
        on_round=on_round,
    )
    return latency_content(
        times,
        runtime="litert",
        versions={"ai_edge_litert": importlib.metadata.version("ai_edge_litert")},
        batch=batch,
        threads=sampler.threads or DEFAULT_THREADS,
        rounds=rounds,
        quantize=bundle.quantize,
    )
