"""What a trial measures: images of a schedule from common noise, their distance, their cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from ddsm_tf.cost import cost_fraction, schedule_cost
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import Denoiser, sample_images
from ddsm_tf.schedule import StepSchedule

Distance = Callable[[np.ndarray], float]
"""uint8 (N, H, W, C) images → how far they are from the real ones."""


class ScheduleEvaluator:
    """Scores schedules, all from the same starting noise.

    With common noise two schedules differ by what their widths do, not by luck: differences are
    far less noisy than distances.

    Args:
        denoise: `denoise(x, t, width)`.
        noise_table: the forward process.
        image_shape: (H, W, C).
        distance: scores images.
        macs: width → MACs of a step for one image.
        cost: width → cost of a step; `macs` if left out.
        images: how many to sample.
        batch_size: images at a time.
    """

    def __init__(
        self,
        denoise: Denoiser,
        noise_table: NoiseTable,
        image_shape: tuple[int, int, int],
        distance: Distance,
        macs: Mapping[float, float],
        *,
        cost: Mapping[float, float] | None = None,
        images: int = 1024,
        batch_size: int = 256,
    ) -> None:
        self.denoise = denoise
        self.noise_table = noise_table
        self.image_shape = image_shape
        self.distance = distance
        self.macs = macs
        self.cost = cost or macs
        self.images = images
        self.batch_size = batch_size
        for width in macs:
            # The first call compiles; no trial should be charged with that.
            denoise(np.zeros((min(images, batch_size), *image_shape), np.float32), 0, width)

    def __call__(self, schedule: StepSchedule, seed: int = 0) -> dict[str, float]:
        """Distance, cost an image, MACs an image and their share of full width, seconds an image.

        Args:
            schedule: timesteps and widths.
            seed: of the starting noise.
        """
        started = time.perf_counter()
        images = sample_images(
            self.denoise,
            schedule,
            self.noise_table,
            self.image_shape,
            self.images,
            seed=seed,
            batch_size=self.batch_size,
        )
        seconds = time.perf_counter() - started
        return {
            "distance": self.distance(images),
            "cost": schedule_cost(schedule, self.cost),
            "macs": schedule_cost(schedule, self.macs),
            "macs_fraction": cost_fraction(schedule, self.macs),
            "seconds": seconds / self.images,
        }
