"""Sampling for many schedules that begin alike: what two trajectories share is computed once.

With a deterministic sampler a state depends on the starting noise and on the steps taken, and on
nothing else. States are kept in a trie over the steps, so a trajectory starts from the longest
beginning that any earlier one has in common with it. The images are the same to the last bit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection

import numpy as np

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.images import to_uint8
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import Denoiser, clip_to_range, step_coefficients, take_step
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import ImageNoise

State = tuple[tuple[int, float], ...]
"""The steps that led to a state: (timestep, width) of each."""


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
    ) -> None:
        if max_bytes < 0:
            raise invalid("max_bytes", max_bytes, "must be 0 or more")
        self.denoise = denoise
        self.noise_table = noise_table
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.branch_timesteps = branch_timesteps
        self.calls: Counter[float] = Counter()
        self.reused_calls: Counter[float] = Counter()
        self._states: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __call__(self, schedule: StepSchedule, count: int, seed: int) -> np.ndarray:
        """Sample images; see `ddsm_tf.sampling.sample_images`.

        Returns:
            uint8 (count, H, W, C).

        Raises:
            InputError: the network's output is not finite, or `schedule` is of another table.
        """
        schedule.check_model(schedule.widths, self.noise_table.train_timesteps)
        batches = []
        for first in range(0, count, self.batch_size):
            size = min(self.batch_size, count - first)
            x = np.asarray(self._sample_batch(schedule, seed, first, size))
            if not np.isfinite(x).all():
                raise InputError("`denoise` gave NaN or infinity; the weights are broken")
            batches.append(to_uint8(x))
        return np.concatenate(batches)

    def _sample_batch(self, schedule: StepSchedule, seed: int, first: int, size: int) -> np.ndarray:
        rows = step_coefficients(schedule, self.noise_table)
        noise = ImageNoise(seed, first, size, self.image_shape)
        steps: State = tuple(zip(schedule.timesteps, schedule.widths, strict=True))
        # Fresh noise at every step would have to be kept as well, and drawn in order.
        remembers = self.max_bytes > 0 and not any(row.x_from_noise for row in rows)
        start, x = self._longest((seed, first, size), steps) if remembers else (0, None)
        x = noise.draw() if x is None else x
        for _, width in steps[:start]:
            self.reused_calls[width] += size
        for k in range(start, len(steps)):
            t, width = steps[k]
            if remembers and k > start and self._may_part_at(t):
                self._keep((seed, first, size, steps[:k], t), x)
            fresh = noise.draw() if rows[k].x_from_noise else None
            x = take_step(x, self.denoise(x, t, width), fresh, rows[k], clip_to_range)
            self.calls[width] += size
        return x

    def _may_part_at(self, timestep: int) -> bool:
        return self.branch_timesteps is None or timestep in self.branch_timesteps

    def _longest(self, batch: tuple, steps: State) -> tuple[int, np.ndarray | None]:
        """How many first steps are known, and the state after them."""
        for k in range(len(steps) - 1, 0, -1):
            # Where a step leads depends on the next timestep, so that is part of the key.
            t = steps[k][0]
            key = (*batch, steps[:k], t)
            if self._may_part_at(t) and key in self._states:
                self._states.move_to_end(key)
                return k, self._states[key]
        return 0, None

    def _keep(self, key: tuple, x: np.ndarray) -> None:
        if key in self._states or x.nbytes > self.max_bytes:
            return
        self._states[key] = x
        self._bytes += x.nbytes
        while self._bytes > self.max_bytes:
            _, oldest = self._states.popitem(last=False)
            self._bytes -= oldest.nbytes
