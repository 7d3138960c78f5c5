"""What training a network on for one schedule gives, beside training it on for full width.

    ddsm tune run --schedule half.json --out tuned
    ddsm tune run --schedule full --out full
    python benchmarks/tuning.py run tuned full -o results

Every schedule that a network was tuned for is measured before and after, from the same noise, with
the classifier of the network that was there first as the judge. Writes `DIR/tuning_PRESET.json` and
a row of images of each; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
from measuring import Stages
from schedules import FRESH_SEED, GRID_IMAGES, save_rows

from ddsm_tf.cost import cost_fraction, macs_per_width
from ddsm_tf.latency import limit_tensorflow
from ddsm_tf.metrics import FrechetDistance
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.evaluate import frechet_distance_of
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run

LIBRARIES = ("tensorflow", "keras", "numpy")
BATCH_SIZE = 256
UNTUNED = "untuned"


class Subject(NamedTuple):
    """A network, and a schedule that it samples with."""

    network: str
    run: Run
    schedule: StepSchedule


def main() -> None:
    """Measure what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of the network before")
    parser.add_argument("tuned", nargs="+", help="run folders that `ddsm tune` made of it")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024, help="from each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if keras.backend.backend() == "tensorflow":
        limit_tensorflow(options.threads)
    run = Run.open(options.run)
    tuned = {Path(folder).name: Run.open(folder) for folder in options.tuned}
    stages = Stages(options.out / f"tuning_{run.config.preset}.json", LIBRARIES)
    macs = macs_per_width(run.load_unet())
    stages.settle("run", about(run))
    for name, each in tuned.items():
        stages.measure(f"training {name}", lambda r=each: training(r, macs))
    distance = None
    for subject in subjects(run, tuned):
        stage = f"{subject.network} at {subject.schedule.describe()}"
        if stage not in stages.content:
            distance = distance or frechet_distance_of(run)
            stages.measure(stage, lambda s=subject, d=distance: measure(s, d, macs, options))
    draw(subjects(run, tuned), options.out / f"tuning_{run.config.preset}_samples.png")


def about(run: Run) -> dict[str, Any]:
    """The network before."""
    config = run.config
    return {
        "preset": config.preset,
        "sampler": config.sampler,
        "image_size": config.image_size,
        "training_steps": config.steps,
        "batch_size": config.batch_size,
        "weighting": config.weighting,
    }


def training(run: Run, macs: Mapping[float, float]) -> dict[str, Any]:
    """How a network was tuned, and the MACs of a mean step beside one of full width."""
    config, schedule = run.config, run.tuned_schedule
    shares = run.model_to_train().width_probabilities
    return {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weighting": config.weighting,
        "schedule": schedule.describe(),
        "step_macs": sum(macs[width] * share for width, share in shares.items())
        / max(macs.values()),
    }


def subjects(run: Run, tuned: Mapping[str, Run]) -> Iterator[Subject]:
    """Full width before, every schedule before, and every schedule with its own network."""
    seen = set()
    for schedule in (run.schedule("full"), *(each.tuned_schedule for each in tuned.values())):
        if schedule not in seen:
            seen.add(schedule)
            yield Subject(UNTUNED, run, schedule)
    for name, each in tuned.items():
        yield Subject(name, each, each.tuned_schedule)


def measure(
    subject: Subject,
    distance: FrechetDistance,
    macs: Mapping[float, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Distances from fresh noise, a seed after the other."""
    model = subject.run.load_model()
    found = []
    with progress_bar(options.seeds, f"{subject.network}, fresh noise") as bar:
        for seed in range(FRESH_SEED, FRESH_SEED + options.seeds):
            images = model.sample(
                subject.schedule, options.images, seed=seed, batch_size=BATCH_SIZE
            )
            found.append(distance(images))
            bar.update()
    return {
        "network": subject.network,
        "widths": subject.schedule.describe(),
        "macs_fraction": cost_fraction(subject.schedule, macs),
        "images": options.images,
        "distances": found,
    }


def draw(subjects: Iterable[Subject], path: Path) -> None:
    """A row of images of each, from the same noise."""
    rows = [
        subject.run.load_model().sample(subject.schedule, GRID_IMAGES, seed=FRESH_SEED)
        for subject in subjects
    ]
    save_rows(rows, path)


if __name__ == "__main__":
    main()
