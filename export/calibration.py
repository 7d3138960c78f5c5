"""Calibration samples: the states that each width meets in the schedule that it will run in.

Integers of eight bits need to know the range of every activation beforehand, and what a network
sees changes over a trajectory: pure noise at first, an image at the end. So ranges are taken from
real trajectories, and a width that a schedule runs at its noisy steps only is not given the range
of an image. No data set is needed; the states come from the model's own sampler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.labels import labels_in_turn, no_class
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import Denoiser, NetworkCall, clip_to_range, network_calls, sample
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import ImageNoise

COUNT = 192
TRAJECTORIES = 16

State = tuple[int, int]
"""A timestep and the number of the trajectory."""


class Samples(NamedTuple):
    """What a network is called with while its ranges are taken.

    Attributes:
        x: states x_t, float32 (N, H, W, C).
        t: their timesteps, float32 (N,).
        labels: their classes, int32 (N,), for a model with classes; else None.
    """

    x: np.ndarray
    t: np.ndarray
    labels: np.ndarray | None = None


def calibration_samples(
    denoise: Denoiser,
    schedule: StepSchedule,
    noise_table: NoiseTable,
    image_shape: tuple[int, int, int],
    widths: Sequence[float],
    *,
    num_classes: int = 0,
    clip: bool = True,
    count: int = COUNT,
    seed: int = 0,
) -> dict[float, Samples]:
    """Samples for every width, drawn along trajectories of a schedule.

    A width's timesteps are its own share of the schedule, each as often as any other to within
    one, or all timesteps of the schedule where it never runs. The order is mixed, so that every
    batch holds timesteps from the whole share.

    Args:
        denoise: the network, at every width of the schedule.
        schedule: what the trajectories follow.
        noise_table: the forward process.
        image_shape: (H, W, C).
        widths: to be calibrated.
        num_classes: of a model with classes, which trajectories take in turn.
        clip: whether samples lie in [-1, 1]; latents do not.
        count: samples a width; fewer where its share has less than count / `TRAJECTORIES` steps.
        seed: fixes the trajectories and the choice.

    Returns:
        Width → samples.

    Raises:
        InputError: `count` is below 1, or the schedule was made for another noise table.
    """
    if count < 1:
        raise invalid("count", count, "must be at least 1")
    calls = network_calls(schedule, noise_table)
    plans = {width: _plan(own_timesteps(calls, width), count) for width in widths}
    options = {"num_classes": num_classes, "clip": clip, "seed": seed}
    states = _states(denoise, schedule, noise_table, image_shape, plans, **options)
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return {width: _gather(plan, states, num_classes, random) for width, plan in plans.items()}


def samples_of_all(
    denoise: Denoiser,
    schedules: Sequence[StepSchedule],
    noise_table: NoiseTable,
    image_shape: tuple[int, int, int],
    widths: Sequence[float],
    **options: Any,
) -> dict[float, Samples]:
    """Samples along several schedules, each width's from those that run it.

    The first schedule stands in for a width that none of them runs. Arguments are those of
    `calibration_samples`, which gives as many samples from each schedule.
    """
    found: dict[float, list[Samples]] = {width: [] for width in widths}
    unused = set(widths).difference(*(schedule.call_counts() for schedule in schedules))
    for schedule in schedules:
        own = [width for width in widths if width in schedule.call_counts() or width in unused]
        unused = set()
        for width, samples in calibration_samples(
            denoise, schedule, noise_table, image_shape, own, **options
        ).items():
            found[width].append(samples)
    return {width: _joined(parts) for width, parts in found.items()}


def _joined(parts: Sequence[Samples]) -> Samples:
    labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])
    x, t = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "t"))
    return Samples(x, t, labels)


def own_timesteps(calls: Sequence[NetworkCall], width: float) -> tuple[int, ...]:
    """The timesteps at which a schedule runs a width; all of them if it never does."""
    own = [call.timestep for call in calls if width in (call.width, call.guidance_width)]
    # Heun's method may call the network twice at one.
    return tuple(dict.fromkeys(own or [call.timestep for call in calls]))


def _plan(timesteps: Sequence[int], count: int) -> list[State]:
    """Which states to take: every timestep equally often, from different trajectories."""
    count = min(count, len(timesteps) * TRAJECTORIES)
    return [(timesteps[i * len(timesteps) // count], i % TRAJECTORIES) for i in range(count)]


def _states(
    denoise: Denoiser,
    schedule: StepSchedule,
    noise_table: NoiseTable,
    image_shape: tuple[int, int, int],
    plans: Mapping[float, Sequence[State]],
    num_classes: int,
    clip: bool,
    seed: int,
) -> dict[State, np.ndarray]:
    """The states that the plans name, read off as the sampler calls the network."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for t, trajectory in (state for plan in plans.values() for state in plan):
        wanted[t].add(trajectory)
    states = {}

    def recorded(x: Any, t: int, width: float, *labels: Any) -> Any:
        states.update({(t, trajectory): np.array(x[trajectory]) for trajectory in wanted[t]})
        return denoise(x, t, width, *labels)

    sample(
        recorded,
        schedule,
        noise_table,
        ImageNoise(seed, 0, TRAJECTORIES, image_shape),
        labels=labels_in_turn(num_classes, 0, TRAJECTORIES) if num_classes else None,
        unconditional=no_class(num_classes, TRAJECTORIES) if schedule.guided else None,
        clip=clip_to_range if clip else None,
    )
    return states


def _gather(
    plan: Sequence[State],
    states: Mapping[State, np.ndarray],
    num_classes: int,
    random: np.random.RandomState,
) -> Samples:
    mixed = [plan[index] for index in random.permutation(len(plan))]
    x = np.stack([states[state] for state in mixed]).astype(np.float32)
    t = np.array([t for t, _ in mixed], np.float32)
    # Every second state as the unconditional branch sees it.
    labels = [trajectory % num_classes for _, trajectory in mixed] if num_classes else None
    if labels is not None:
        labels = np.where(np.arange(len(mixed)) % 2, num_classes, labels).astype(np.int32)
    return Samples(x, t, labels)
