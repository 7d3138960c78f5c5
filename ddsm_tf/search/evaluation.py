"""What a trial measures: images of a schedule from common noise, their distance, their cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

import numpy as np

from ddsm_tf.cost import schedule_cost
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import Clip, Denoiser, clip_to_range
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.prefix import PrefixSampler

Distance = Callable[[np.ndarray], float]
"""uint8 (N, H, W, C) images → how far they are from the real ones."""


class ScheduleEvaluator:
    """Scores schedules, all from the same starting noise.

    With common noise two schedules differ by what their widths do, not by luck: differences are
    far less noisy than distances. Schedules that begin alike share the states of their beginning.

    Args:
        denoise: `denoise(x, t, width)`.
        noise_table: the forward process.
        image_shape: (H, W, C).
        distance: scores images.
        macs: width → MACs of a step for one image.
        full: the schedule that skips no step; its widths do not matter.
        cost: width → cost of a step; `macs` if left out.
        seconds: width → seconds of a step for one image, or None where they were not measured.
        images: how many to sample, unless a call says otherwise.
        batch_size: images at a time.
        max_bytes: memory for shared states; 0 shares none.
        branch_timesteps, num_classes, clip, decode: see `PrefixSampler`.
    """

    def __init__(
        self,
        denoise: Denoiser,
        noise_table: NoiseTable,
        image_shape: tuple[int, int, int],
        distance: Distance,
        macs: Mapping[float, float],
        full: StepSchedule,
        *,
        cost: Mapping[float, float] | None = None,
        seconds: Mapping[float, float] | None = None,
        images: int = 1024,
        batch_size: int = 256,
        max_bytes: int = 2**30,
        branch_timesteps: Collection[int] | None = None,
        num_classes: int = 0,
        clip: Clip | None = clip_to_range,
        decode: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.distance = distance
        self.macs = macs
        self.full_macs = schedule_cost(full.at_width(max(macs)), macs)
        self.cost = cost or macs
        self.seconds = seconds
        self.images = images
        self.sampler = PrefixSampler(
            denoise,
            noise_table,
            image_shape,
            batch_size=batch_size,
            max_bytes=max_bytes,
            branch_timesteps=branch_timesteps,
            num_classes=num_classes,
            clip=clip,
            decode=decode,
        )

    def __call__(
        self, schedule: StepSchedule, seed: int = 0, images: int | None = None
    ) -> dict[str, float]:
        """Measure a schedule.

        Args:
            schedule: timesteps and widths.
            seed: of the starting noise.
            images: None takes the evaluator's.

        Returns:
            `distance`; `cost`, `macs` and `seconds` an image; `macs_fraction` of full width's;
            `calls`, how many images went through the network; `reused_calls`, how many more would
            have without shared states; `full_calls` and `reused_full_calls`, the same weighted by
            MACs, in calls at full width.
        """
        sampler = self.sampler
        calls, reused = sampler.calls.copy(), sampler.reused_calls.copy()
        sampled = sampler(schedule, images or self.images, seed)
        calls, reused = sampler.calls - calls, sampler.reused_calls - reused
        macs = schedule_cost(schedule, self.macs)
        return {
            "distance": self.distance(sampled),
            "cost": schedule_cost(schedule, self.cost),
            "macs": macs,
            "macs_fraction": macs / self.full_macs,
            "seconds": schedule_cost(schedule, self.seconds) if self.seconds else 0.0,
            "calls": float(calls.total()),
            "reused_calls": float(reused.total()),
            "full_calls": self._full_calls(calls),
            "reused_full_calls": self._full_calls(reused),
        }

    @property
    def _full_macs(self) -> float:
        return self.macs[max(self.macs)]

    def _full_calls(self, calls: Counter[float]) -> float:
        return sum(count * self.macs[width] / self._full_macs for width, count in calls.items())
