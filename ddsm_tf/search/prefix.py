"""Sampling for many schedules that begin alike: what two trajectories share is computed once.

With a deterministic sampler a state depends on the starting noise, the class and the steps taken,
and on nothing else. States are kept in a trie over the steps, so a trajectory starts from the
longest beginning that any earlier one has in common with it. The images are the same to the last
bit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.labels import check_conditional, labels_in_turn, no_class
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import (
    Clip,
    Denoiser,
    clip_to_range,
    finished_images,
    network_calls,
    run_call,
)
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import ImageNoise

Steps = tuple[tuple[int, float, float], ...]
"""The steps that led to a state: timestep, width and unconditional width of each."""

State = tuple[np.ndarray, np.ndarray | None]
"""x_t, and the estimate of the image that the call before it made."""


class PrefixSampler:
    """`sample_images` with a memory.

    Args:
        denoise: `denoise(x, t, width)`.
        noise_table: the forward process.
        image_shape: (H, W, C).
        batch_size: images at a time.
        max_bytes: of all states that are kept; the least recently used go first. 0 keeps none.
        branch_timesteps: states are kept before these timesteps only; None means all. Schedules
            of a space part nowhere else (`ScheduleSpace.branch_timesteps`).
        num_classes: of a model with classes, whose images take them in turn.
        clip, decode: see `ddsm_tf.sampling.sample_images`.

    Attributes:
        calls: width → images that went through the network there.
        reused_calls: width → images that need not, because a state was known.
    """

    def __init__(
        self,
        denoise: Denoiser,
        noise_table: NoiseTable,
        image_shape: tuple[int, int, int],
        *,
        batch_size: int = 256,
        max_bytes: int = 2**30,
        branch_timesteps: Collection[int] | None = None,
        num_classes: int = 0,
        clip: Clip | None = clip_to_range,
        decode: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        if max_bytes < 0:
            raise invalid("max_bytes", max_bytes, "must be 0 or more")
        self.denoise = denoise
        self.noise_table = noise_table
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.branch_timesteps = branch_timesteps
        self.num_classes = num_classes
        self.clip = clip
        self.decode = decode
        self.calls: Counter[float] = Counter()
        self.reused_calls: Counter[float] = Counter()
        self._states: OrderedDict[tuple, State] = OrderedDict()
        self._bytes = 0

    def __call__(self, schedule: StepSchedule, count: int, seed: int) -> np.ndarray:
        """Sample images; see `ddsm_tf.sampling.sample_images`.

        Returns:
            uint8 (count, H, W, C).

        Raises:
            InputError: the network's output is not finite, or `schedule` is of another table.
        """
        schedule.check_model(schedule.call_counts(), self.noise_table.train_timesteps)
        check_conditional(schedule.guidance_scale, self.num_classes)
        batches = []
        for first in range(0, count, self.batch_size):
            size = min(self.batch_size, count - first)
            x = self._sample_batch(schedule, seed, first, size)
            batches.append(finished_images(x, self.decode))
        return np.concatenate(batches)

    def _sample_batch(self, schedule: StepSchedule, seed: int, first: int, size: int) -> np.ndarray:
        calls = network_calls(schedule, self.noise_table)
        noise = ImageNoise(seed, first, size, self.image_shape)
        labels = labels_in_turn(self.num_classes, first, size) if self.num_classes else None
        unconditional = no_class(self.num_classes, size) if schedule.guided else None
        widths = zip(schedule.widths, schedule.unconditional_widths, strict=True)
        steps: Steps = tuple((t, *pair) for t, pair in zip(schedule.timesteps, widths, strict=True))
        # Schedules that differ in nothing but their steps share states.
        batch = (seed, first, size, schedule.with_steps((0,), (1.0,)))
        # Fresh noise at every step would have to be kept as well, and drawn in order.
        remembers = self.max_bytes > 0 and not any(call.row.x_from_noise for call in calls)
        start, state = self._longest(batch, steps) if remembers else (0, None)
        x, previous = state or (noise.draw(), None)
        step = 0
        for call in calls:
            used = (
                [call.width] if call.guidance_width is None else [call.width, call.guidance_width]
            )
            if call.step < start:
                for width in used:
                    self.reused_calls[width] += size
                continue
            if call.step > step:
                step = call.step
                if remembers and step > start and self._may_part_at(steps[step][0]):
                    # Even where this step, a schedule's last, has no use for the estimate, a longer
                    # schedule that begins alike does.
                    kept = previous if schedule.sampler == "dpmpp_2m" else None
                    self._keep((*batch, steps[:step], steps[step][0]), (x, kept))
            x, previous = run_call(
                self.denoise,
                call,
                x,
                previous,
                noise.draw,
                labels,
                unconditional,
                schedule.guidance_scale,
                self.clip,
            )
            for width in used:
                self.calls[width] += size
        return x

    def _may_part_at(self, timestep: int) -> bool:
        return self.branch_timesteps is None or timestep in self.branch_timesteps

    def _longest(self, batch: tuple, steps: Steps) -> tuple[int, State | None]:
        """How many first steps are known, and the state after them."""
        for k in range(len(steps) - 1, 0, -1):
            # Where a step leads depends on the next timestep, so that is part of the key.
            t = steps[k][0]
            key = (*batch, steps[:k], t)
            if self._may_part_at(t) and key in self._states:
                self._states.move_to_end(key)
                return k, self._states[key]
        return 0, None

    def _keep(self, key: tuple, state: State) -> None:
        if key in self._states or _bytes_of(state) > self.max_bytes:
            return
        self._states[key] = state
        self._bytes += _bytes_of(state)
        while self._bytes > self.max_bytes:
            _, oldest = self._states.popitem(last=False)
            self._bytes -= _bytes_of(oldest)


def _bytes_of(state: State) -> int:
    return sum(array.nbytes for array in state if array is not None)
