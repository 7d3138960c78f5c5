"""What sampling costs on this device: time at each width, time of a schedule, memory."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ddsm_tf.cost import cost_fraction
from ddsm_tf.edge.bundle import Bundle
from ddsm_tf.edge.memory import peak_memory
from ddsm_tf.edge.sampler import EdgeSampler
from ddsm_tf.latency import WARM_UP, latency_content, summary, time_widths
from ddsm_tf.sampling import clip_to_range, sample_images
from ddsm_tf.schedule import StepSchedule

# What LiteRT's interpreter takes where it is not told; it starts no thread of its own then.
DEFAULT_THREADS = 1
# Steps of the trajectories that are timed, about.
SHORT_STEPS = 12


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
        bundle.widths,
        bundle.image_shape,
        batch=batch,
        rounds=rounds,
        t=bundle.noise_table.train_timesteps // 2,
        num_classes=bundle.num_classes,
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


def benchmark_decoder(
    sampler: EdgeSampler,
    *,
    batch: int = 1,
    rounds: int = 30,
    on_round: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Time the decoder of latents, which runs once an image whatever the schedule.

    Args:
        sampler: a bundle with a decoder.
        batch: latents at a time.
        rounds: timed calls, after `WARM_UP` that are not.
        on_round: called after each call, those that warm up included.

    Returns:
        See `ddsm_tf.latency.summary`.

    Raises:
        InputError: the bundle has no decoder.
    """
    shape = (batch, *sampler.bundle.image_shape)
    latents = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    milliseconds = []
    for _ in range(WARM_UP + rounds):
        started = time.perf_counter()
        sampler.decode(latents)
        milliseconds.append(1000.0 * (time.perf_counter() - started))
        if on_round:
            on_round()
    return summary(milliseconds[WARM_UP:])


def benchmark_schedule(
    sampler: EdgeSampler,
    schedule: StepSchedule,
    medians: Mapping[float, float],
    *,
    batch: int = 1,
    pairs: int = 5,
    on_pair: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Compare a schedule with its own steps all run at the widest width.

    Latents are not decoded: that takes both the same time, see `benchmark_decoder`.

    Args:
        sampler: the bundle and its interpreters.
        schedule: widths of the bundle.
        medians: width → milliseconds a step, from `benchmark`.
        batch: images a step.
        pairs: timed pairs of trajectories, after one that is not.
        on_pair: called after each pair, the first included.

    Returns:
        `steps`, `width_counts`; as shares of full width: `macs_ratio`, `predicted_time_ratio`
        (from the medians), and under `measured` the medians over pairs of short trajectories:
        their `steps`, `time_ratio`, `spread` (between the quartiles) and the
        `predicted_time_ratio` of just these steps; `time_saved` and `macs_saved`, the rest to 1,
        with time as measured.
    """
    short = shortened(schedule, SHORT_STEPS)
    ratios = _time_ratios(sampler, short, batch, pairs, on_pair)
    low, ratio, high = map(float, np.percentile(ratios, (25, 50, 75)))
    macs_ratio = macs_fraction(sampler.bundle.networks, schedule)
    return {
        "steps": len(schedule),
        "width_counts": {str(width): n for width, n in schedule.width_counts().items()},
        "macs_ratio": macs_ratio,
        "macs_saved": 1.0 - macs_ratio,
        "predicted_time_ratio": cost_fraction(schedule, medians),
        "time_saved": 1.0 - ratio,
        "measured": {
            "steps": len(short),
            "pairs": pairs,
            "time_ratio": ratio,
            "spread": high - low,
            "predicted_time_ratio": cost_fraction(short, medians),
        },
    }


def benchmark_memory(
    sampler: EdgeSampler,
    schedule: StepSchedule,
    *,
    batch: int = 1,
    on_process: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Peak memory of sampling, each number from a fresh process; see `peak_memory`.

    Args:
        sampler: says which bundle, threads and `max_resident`.
        schedule: widths of the bundle.
        batch: images a step.
        on_process: called after each process; there are as many as `memory_processes` says.

    Returns:
        In megabytes: `widths`, each width alone; `widest`, that of the widest; `decoder`, that of
        latents alone, if there is one; `schedule`, a process that meets the schedule's widths and
        decodes, with the sampler's `max_resident`.
    """

    def peak(stages: list[float | None], max_resident: int | None = None) -> float | None:
        found = peak_memory(
            sampler.bundle,
            stages,
            batch=batch,
            threads=sampler.threads,
            max_resident=max_resident,
        )
        if on_process:
            on_process()
        return found

    alone = {width: peak([width]) for width in sampler.bundle.widths}
    decoder = {"decoder": peak([None])} if sampler.bundle.decoder else {}
    return {
        "widths": {str(width): found for width, found in alone.items()},
        "widest": alone[sampler.bundle.widths[0]],
        **decoder,
        "schedule": peak(_stages(sampler.bundle, schedule), sampler.max_resident),
        "max_resident": sampler.max_resident,
    }


def memory_processes(bundle: Bundle) -> int:
    """How many processes `benchmark_memory` starts: one a width, the decoder's, the schedule's."""
    return len(bundle.widths) + bool(bundle.decoder) + 1


def _stages(bundle: Bundle, schedule: StepSchedule) -> list[float | None]:
    """Every kind of change that sampling one batch after another makes, for `peak_memory`."""
    branches = (schedule.widths, schedule.unconditional_widths)
    visited = [width for pair in zip(*branches, strict=True) for width in pair]
    # Each width as the schedule first meets it, decoding after the last step, and the next batch.
    decoding = [visited[-1], None] if bundle.decoder else []
    return [*dict.fromkeys(visited), *decoding, visited[0]]


def macs_fraction(networks: Mapping[float, Any], schedule: StepSchedule) -> float:
    """A schedule's MACs as a share of full width's."""
    macs = {width: network.macs for width, network in networks.items()}
    return cost_fraction(schedule, macs)


def shortened(schedule: StepSchedule, steps: int) -> StepSchedule:
    """About `steps` of a schedule's steps, each width with its share of them and at least one."""
    if len(schedule) <= steps:
        return schedule
    chosen: list[int] = []
    for width, count in schedule.width_counts().items():
        places = [i for i, each in enumerate(schedule.widths) if each == width]
        wanted = max(1, round(count * steps / len(schedule)))
        chosen += [places[(2 * k + 1) * count // (2 * wanted)] for k in range(wanted)]
    chosen.sort()
    guidance = schedule.guidance_widths
    return schedule.with_steps(
        [schedule.timesteps[i] for i in chosen],
        [schedule.widths[i] for i in chosen],
        guidance and [guidance[i] for i in chosen],
    )


def _time_ratios(
    sampler: EdgeSampler,
    schedule: StepSchedule,
    batch: int,
    pairs: int,
    on_pair: Callable[[], Any] | None,
) -> list[float]:
    """Seconds of the schedule over seconds of full width, pair by pair."""
    full = schedule.at_width(sampler.bundle.widths[0])

    def seconds(which: StepSchedule) -> float:
        started = time.perf_counter()
        _denoise(sampler, which, batch)
        return time.perf_counter() - started

    ratios = []
    for pair in range(pairs + 1):
        # They take turns at going first, so that a drift of the machine's speed cancels out.
        order = (schedule, full) if pair % 2 else (full, schedule)
        times = {id(which): seconds(which) for which in order}
        ratios.append(times[id(schedule)] / times[id(full)])
        if on_pair:
            on_pair()
    return ratios[1:]


def _denoise(sampler: EdgeSampler, schedule: StepSchedule, batch: int) -> None:
    """What `EdgeSampler.sample` does, but for decoding."""
    bundle = sampler.bundle
    sample_images(
        sampler.denoise,
        schedule,
        bundle.noise_table,
        bundle.image_shape,
        batch,
        batch_size=batch,
        num_classes=bundle.num_classes,
        clip=None if bundle.decoder else clip_to_range,
    )
