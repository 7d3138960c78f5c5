"""Sampling from a run."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from ddsm_tf.images import save_images
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run

BATCH_SIZE = 64


def sample_with_bar(
    model: Any,
    schedule: StepSchedule,
    count: int,
    seed: int,
    *,
    labels: np.ndarray | None = None,
    label: str = "sample",
) -> np.ndarray:
    """Sample uint8 (count, H, W, C) images from a `DiffusionModel`, with a progress bar."""
    bar = progress_bar(len(schedule) * math.ceil(count / BATCH_SIZE), label)
    with bar:
        return model.sample(
            schedule,
            count,
            seed,
            batch_size=BATCH_SIZE,
            labels=labels,
            on_step=lambda step: bar.update(),
        )


def sample_to_file(
    run: Run,
    schedule: StepSchedule,
    count: int,
    seed: int,
    out: str | os.PathLike,
    *,
    labels: np.ndarray | None = None,
    xla: bool = False,
) -> None:
    """Sample and write a `.png` grid or a `.npy` array, atomically."""
    images = sample_with_bar(run.load_model(xla=xla), schedule, count, seed, labels=labels)
    save_images(images, out)
