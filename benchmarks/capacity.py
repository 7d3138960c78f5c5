"""What the size of a network has to do with what schedules save: several sizes, one data set.

    ddsm train cifar10_16 --out b32 --set image_size=8 …
    ddsm train cifar10_16 --out b64 --set image_size=8 … --set base_channels=64
    python benchmarks/capacity.py b32 b64 -o results

The runs may differ in their base channels alone. Each is searched and measured as `schedules.py`
does it, on features of the first run's classifier. Writes `DIR/capacity_PRESET.json` and, of each
size, a Pareto plot and rows of images; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from measuring import Stages
from schedules import IRRELEVANT, LIBRARIES, PLANS, Plan, about, measure

from ddsm_tf.cost import macs_per_width
from ddsm_tf.errors import invalid
from ddsm_tf.files import copy_file
from ddsm_tf.latency import limit_tensorflow
from ddsm_tf.training.evaluate import classifier_of
from ddsm_tf.training.run import Run

VARIED = "base_channels"


def main() -> None:
    """Search and measure the sizes that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders; the first one's classifier judges")
    parser.add_argument("-o", "--out", type=Path, required=True)
    plans = {plan.name: plan for plan in PLANS}
    parser.add_argument("--sampler", choices=plans, default="ddim-20")
    parser.add_argument("--trials", type=int, default=30, help="of each search")
    parser.add_argument("--images", type=int, default=512, help="a trial")
    parser.add_argument("--fresh-images", type=int, default=1024, help="a fresh seed")
    parser.add_argument("--seeds", type=int, default=3, help="that every schedule is measured from")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if keras.backend.backend() == "tensorflow":
        limit_tensorflow(options.threads)
    runs = [Run.open(folder) for folder in options.runs]
    check_alike(runs)
    share_classifier(runs)
    name = f"capacity_{runs[0].config.preset}"
    stages = Stages(options.out / f"{name}.json", LIBRARIES)
    plan = plans[options.sampler]._replace(
        trials=options.trials, images=options.images, fresh_images=options.fresh_images
    )
    for run in runs:
        base = run.config.base_channels
        pictures = options.out / f"{name}_{base}"
        stages.measure(f"base {base}", lambda r=run, to=pictures: size(r, plan, options.seeds, to))


def size(run: Run, plan: Plan, seeds: int, pictures: Path) -> dict[str, Any]:
    """What was trained, what its widths cost, and what schedules save on it."""
    macs = macs_per_width(run.new_unet())
    return {
        **about(run),
        "macs": {f"{width:g}": cost for width, cost in macs.items()},
        "sampler": plan.name,
        **measure(run, plan, seeds, pictures),
    }


def check_alike(runs: Sequence[Run]) -> None:
    """Check that nothing but the size can explain a difference.

    Raises:
        InputError: two runs differ in more than their base channels.
    """
    first = dataclasses.asdict(runs[0].config)
    for run in runs[1:]:
        for name, value in dataclasses.asdict(run.config).items():
            if name not in (VARIED, *IRRELEVANT) and value != first[name]:
                rule = f"must be {first[name]}, as in {runs[0].path}: only {VARIED} may differ"
                raise invalid(f"{name} of {run.path}", value, rule)


def share_classifier(runs: Sequence[Run]) -> None:
    """Give every run the first one's classifier, or their distances would not compare."""
    first, *others = runs
    classifier_of(first, first.load_data())
    judge = first.path / "classifier.keras"
    for run in others:
        copy_file(judge, run.path / judge.name)
        for earlier in run.path.glob(f"schedules/*/*/{judge.name}"):
            if earlier.read_bytes() != judge.read_bytes():
                rule = f"has an earlier search with another classifier; delete {earlier.parent}"
                raise invalid("RUN", str(run.path), rule)


if __name__ == "__main__":
    main()
