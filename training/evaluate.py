"""Evaluation of a run: distance to the real images and what a schedule costs."""

from __future__ import annotations

import time
from typing import Any

from ddsm_tf.cost import cost_fraction, macs_per_width, schedule_cost
from ddsm_tf.metrics import FeatureNetwork, FrechetDistance, train_classifier
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run
from ddsm_tf.training.sample import sample_with_bar


def frechet_distance_of(run: Run) -> FrechetDistance:
    """The run's distance: features of a classifier of its own images, trained once and kept."""
    data = run.load_data()
    path = run.path / "classifier.keras"
    if path.exists():
        network = FeatureNetwork.load(path)
    else:
        with progress_bar(0, "classifier") as bar:
            network = train_classifier(
                data.images, data.labels, seed=run.config.seed, on_step=lambda step: bar.update()
            )
        network.save(path)
    return FrechetDistance(network, data.images)


def evaluate_run(run: Run, schedule: StepSchedule, count: int | None, seed: int) -> dict[str, Any]:
    """Sample with a schedule and compare with the real images.

    Args:
        count: images; None takes the configuration's `search_images`.
        seed: of the first image's noise.

    Returns:
        Distance and its name, MACs an image (all steps), share of full width's, seconds an image.
    """
    distance = frechet_distance_of(run)
    count = count or run.config.search_images
    macs = macs_per_width(run.load_unet())
    started = time.perf_counter()
    images = sample_with_bar(run, schedule, count, seed)
    seconds = (time.perf_counter() - started) / count
    return {
        "distance": distance(images),
        "distance_name": distance.name,
        "images": count,
        "seed": seed,
        "macs": int(schedule_cost(schedule, macs)),
        "macs_fraction": cost_fraction(schedule, macs),
        "seconds": seconds,
        "steps": len(schedule),
        "sampler": schedule.sampler,
        "width_counts": {f"{w:g}": n for w, n in schedule.width_counts().items()},
    }
