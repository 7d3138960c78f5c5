"""Networks for benchmarks that need no trained weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from names import PAPER_STEPS

from ddsm_tf.schedule import StepSchedule


def random_weights(unet: Any) -> Any:
    """Give kernels a scale that keeps activations as large as they are in a trained network."""
    random = np.random.default_rng(0)
    for variable in unet.trainable_variables:
        if variable.path.endswith("kernel"):
            scale = np.prod(variable.shape[:-1]) ** -0.5
            variable.assign(scale * random.standard_normal(variable.shape))
    return unet


def paper_schedule() -> StepSchedule:
    """The paper's numbers of steps; which step has which width does not change what they cost."""
    widths = [width for width, count in PAPER_STEPS.items() for _ in range(count)]
    timesteps = range(len(widths))[::-1]
    return StepSchedule(timesteps, widths, sampler="ddim", train_timesteps=len(widths))
