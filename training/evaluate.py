"""Evaluation of a run: distance to the real images and what a schedule costs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddsm_tf.cost import macs_per_width, schedule_cost
from ddsm_tf.labels import labels_in_turn
from ddsm_tf.metrics import FeatureNetwork, FrechetDistance, train_classifier
from ddsm_tf.metrics.inception import InceptionNetwork
from ddsm_tf.metrics.suite import MetricSuite, check_metrics
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.training.data import ImageSet
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run
from ddsm_tf.training.sample import BATCH_SIZE, sample_with_bar


def frechet_distance_of(run: Run) -> FrechetDistance:
    """The run's distance: features of a classifier of its own images, trained once and kept."""
    data = run.load_data()
    return FrechetDistance(classifier_of(run, data), data.images)


def classifier_of(run: Run, data: ImageSet) -> FeatureNetwork:
    """The classifier of the run's images, trained once and kept."""
    path = run.path / "classifier.keras"
    if path.exists():
        return FeatureNetwork.load(path)
    with progress_bar(0, "classifier") as bar:
        network = train_classifier(
            np.asarray(data.images),
            data.labels,
            seed=run.config.seed,
            on_step=lambda step: bar.update(),
        )
    network.save(path)
    return network


def suite_of(run: Run, inception: str | os.PathLike | None = None) -> MetricSuite:
    """The run's metrics, on Inception's features or on those of the run's own classifier.

    Args:
        run: a run.
        inception: file of `ddsm metrics convert-inception`; None takes the classifier.
    """
    data = run.load_data()
    if inception is None:
        network = classifier_of(run, data)
        about = ("classifier features", False, network.digest())
    else:
        network = InceptionNetwork.load(inception)
        published = network.is_published
        name = "Inception features" if published else "features of other Inception weights"
        about = (name, published, network.digest)
    name, published, digest = about
    return MetricSuite(
        network.features_and_logits,
        name,
        published,
        data.images,
        data.labels,
        cache=run.path / "metrics",
        network_digest=digest,
    )


def evaluate_run(
    run: Run,
    schedule: StepSchedule,
    count: int | None,
    seed: int,
    *,
    metrics: Sequence[str] = (),
    inception: str | os.PathLike | None = None,
    xla: bool = False,
) -> dict[str, Any]:
    """Sample with a schedule and compare with the real images; classes are taken in turn.

    Args:
        count: images; None takes the configuration's `search_images`.
        seed: of the first image's noise.
        metrics: further ones, of `ddsm_tf.metrics.suite.METRICS`.
        inception: see `suite_of`.
        xla: see `Run.load_model`.

    Returns:
        Distance and its name, MACs an image (all steps), share of full width's (for the schedule
        that the run's search chose, of all steps that it was given), seconds an image; under
        `metrics` what was asked for.
    """
    # Before hours of sampling and not after.
    check_metrics(metrics, with_classes=bool(run.config.num_classes))
    suite = suite_of(run, inception) if metrics else None
    distance = frechet_distance_of(run)
    count = count or run.config.search_images
    model = run.load_model(xla=xla)
    macs = macs_per_width(model.unet)
    cost = schedule_cost(schedule, macs)
    _warm_up(model, schedule, count)
    started = time.perf_counter()
    images = sample_with_bar(model, schedule, count, seed)
    seconds = (time.perf_counter() - started) / count
    judged = {}
    if suite is not None:
        labels = (
            labels_in_turn(run.config.num_classes, 0, count) if run.config.num_classes else None
        )
        judged = {"metrics": suite(images, metrics, labels)}
    return {
        "distance": distance(images),
        "distance_name": distance.name,
        "images": count,
        "seed": seed,
        "macs": int(cost),
        "macs_fraction": cost / schedule_cost(run.full_schedule(schedule), macs),
        "seconds": seconds,
        "steps": len(schedule),
        "sampler": schedule.sampler,
        "width_counts": {f"{w:g}": n for w, n in schedule.width_counts().items()},
        **judged,
    }


def _warm_up(model: Any, schedule: StepSchedule, count: int) -> None:
    """Compile every width of a schedule, so that sampling is timed and not tracing.

    XLA compiles for each size of a batch: there is a last one that may be smaller.
    """
    timesteps = even_timesteps(schedule.train_timesteps, 1)
    sizes = {min(count, BATCH_SIZE), count % BATCH_SIZE or BATCH_SIZE}
    for width in schedule.call_counts():
        uniform = StepSchedule.uniform(
            width,
            timesteps,
            train_timesteps=schedule.train_timesteps,
            guidance_scale=schedule.guidance_scale,
        )
        for size in sizes:
            model.sample(uniform, size)
