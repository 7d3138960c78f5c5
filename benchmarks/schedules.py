"""What step schedules save on a trained model: searched ones beside full width and the baselines.

    ddsm train fashion_mnist --out run --data npz:fashion_mnist.npz:x_train
    python benchmarks/schedules.py run -o results

For each sampler a search is run as `ddsm search` runs it. What it chose is then measured from noise
that neither the search nor its confirmation has seen, beside the nearest that it found for a half
and for two fifths of the MACs, every uniform width, and random schedules and two-stage ones that
cost as much as the last of these. Each schedule starts from the same noise, so it is
compared with full width seed by seed. Writes `DIR/schedules_PRESET.json`, a Pareto plot and a grid
of images for each sampler; an interrupted run goes on where it stopped, the search at its trial.

`--precision mixed_bfloat16` samples in half the time where the processor has AMX.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from measuring import Stages

from ddsm_tf.cost import cost_fraction
from ddsm_tf.files import read_json
from ddsm_tf.images import image_grid, save_png
from ddsm_tf.latency import limit_tensorflow
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search import ScheduleSpace
from ddsm_tf.search.baselines import ramp_schedules
from ddsm_tf.search.generations import random_genome
from ddsm_tf.search.pareto import read_pareto
from ddsm_tf.search.search import Confirmer
from ddsm_tf.search.space import Genome
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run
from ddsm_tf.training.search import search
from ddsm_tf.training.search_problem import SearchOptions, SearchProblem

LIBRARIES = ("tensorflow", "keras", "keras-tuner", "pymoo", "numpy")
# What a search needs of a run.
KEPT = ("config.json", "weights.keras", "classifier.keras", "importance.json")
# Seeds that neither the search (0) nor its confirmation (1 to 4) takes.
FRESH_SEED = 1000
# Where the images lie says nothing about the network, and how often it was looked at neither.
IRRELEVANT = ("data", "checkpoint_every", "log_every", "sample_every")
PRECISIONS = ("float32", "mixed_bfloat16")
BUDGETS = (0.5, 0.4)
SHOWN = ("full", "searched", f"searched, {BUDGETS[-1]:.0%}")
DRAWN = 2000
RANDOM = 2
GRID_IMAGES = 16


class Plan(NamedTuple):
    """A sampler, its steps, and how much a search may sample.

    Attributes:
        sampler, steps: of every schedule.
        trials, images: of the search, and images a trial.
        fresh_images: from each seed that measures what was found.
        precision: that the network computes in.
    """

    sampler: str
    steps: int
    trials: int
    images: int
    fresh_images: int
    precision: str = PRECISIONS[0]

    @property
    def name(self) -> str:
        """Such as `ddim-50`."""
        return f"{self.sampler}-{self.steps}"


PLANS = (
    Plan("ddim", 10, 48, 1024, 2048),
    Plan("ddim", 20, 48, 1024, 2048),
    Plan("ddim", 50, 48, 1024, 2048),
    Plan("ddim", 100, 32, 1024, 2048),
    Plan("ddpm", 1000, 16, 256, 512),
)


def main() -> None:
    """Search and measure what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder")
    parser.add_argument("-o", "--out", type=Path, required=True)
    names = [plan.name for plan in PLANS]
    parser.add_argument("--samplers", nargs="+", choices=names, default=names)
    parser.add_argument("--trials", type=int, help="of each search; the plan's if left out")
    parser.add_argument("--images", type=int, help="a trial; the plan's if left out")
    parser.add_argument("--fresh-images", type=int, help="a fresh seed; the plan's if left out")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--seeds", type=int, default=4, help="that every schedule is measured from")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if keras.backend.backend() == "tensorflow":
        limit_tensorflow(options.threads)
    run = Run.open(options.run)
    name = f"schedules_{run.config.preset}"
    stages = Stages(options.out / f"{name}.json", LIBRARIES)
    stages.settle("run", about(run))
    given = {key: getattr(options, key) for key in ("trials", "images", "fresh_images")}
    given = {key: value for key, value in given.items() if value}
    for plan in PLANS:
        if plan.name in options.samplers:
            plan = plan._replace(**given, precision=options.precision)
            pictures = options.out / f"{name}_{plan.name}"
            stages.measure(
                plan.name, lambda p=plan, to=pictures: measure(run, p, options.seeds, to)
            )


def about(run: Run) -> dict[str, Any]:
    """What was trained, for how long, and how it differs from its preset."""
    config, preset = run.config, get_preset(run.config.preset)
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in IRRELEVANT
        and getattr(config, field.name) != getattr(preset, field.name)
    }
    return {
        "preset": config.preset,
        "image_size": config.image_size,
        "base_channels": config.base_channels,
        "middle_widths": config.middle_widths,
        "batch_size": config.batch_size,
        "training_steps": config.steps,
        "changed": changed,
    }


def measure(run: Run, plan: Plan, seeds: int, pictures: Path) -> dict[str, Any]:
    """Search with a sampler, then measure the choice and its baselines from fresh noise."""
    problem = problem_of(copy_of(run, plan), plan)
    searched = problem.run
    print(search(problem))
    chosen = StepSchedule.load(searched.schedule_path)
    schedules = dict(compared(problem, chosen))
    fresh = range(FRESH_SEED, FRESH_SEED + seeds)
    with progress_bar(len(schedules) * seeds, f"{plan.name}: fresh noise") as bar:
        confirm = Confirmer(
            problem.evaluate,
            fresh,
            plan.fresh_images,
            searched.search_path / "fresh.json",
            on_measured=bar.update,
        )
        rows = [row(name, schedule, confirm, problem.macs) for name, schedule in schedules.items()]
    draw(problem, [schedules[name] for name in SHOWN], pictures)
    result = read_json(searched.search_path / "result.json", argument="search result")
    return {
        "trials": problem.trials,
        "images": plan.images,
        "fresh_images": plan.fresh_images,
        "precision": plan.precision,
        "distance_name": result["distance_name"],
        "floor": result["floor"],
        "search_calls": sum(spent["full_calls"] for spent in result["calls"].values()),
        "rows": rows,
    }


def problem_of(run: Run, plan: Plan) -> SearchProblem:
    """The search of a plan, with a network that computes in its precision."""
    options = SearchOptions(
        sampler=plan.sampler,
        steps=plan.steps,
        trials=plan.trials,
        images=plan.images,
        confirm_images=plan.fresh_images,
    )
    keras.config.set_dtype_policy(plan.precision)
    try:
        return SearchProblem(run, options)
    finally:
        # The classifier that judges is not part of what is judged.
        keras.config.set_dtype_policy("float32")


def copy_of(run: Run, plan: Plan) -> Run:
    """A run folder with the same weights, for the search of one sampler."""
    folder = run.path / "schedules" / plan.precision / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (run.path / name).exists() and not (folder / name).exists():
            shutil.copy(run.path / name, folder / name)
    return Run.open(folder)


def row(
    name: str, schedule: StepSchedule, confirm: Confirmer, macs: Mapping[float, float]
) -> dict[str, Any]:
    """A schedule in words, its share of full width's MACs, and its distance from each seed."""
    return {
        "name": name,
        "widths": schedule.describe(),
        "macs_fraction": cost_fraction(schedule, macs),
        "distances": list(confirm(schedule).distances),
    }


def compared(problem: SearchProblem, chosen: StepSchedule) -> Iterator[tuple[str, StepSchedule]]:
    """Name → schedule: every uniform width, what was found, and baselines of the least budget."""
    for width in problem.model.unet.widths:
        name = "full" if width == max(problem.model.unet.widths) else f"uniform:{width:g}"
        yield name, problem.base.at_width(width)
    yield "searched", chosen
    entries = read_pareto(problem.run.search_path / "pareto.json")
    for budget in BUDGETS:
        affordable = [entry for entry in entries if entry["macs_fraction"] <= budget]
        best = min(affordable, key=lambda entry: entry["distance"])
        cheapest = StepSchedule.from_dict(best["schedule"])
        yield f"searched, {budget:.0%}", cheapest
    space = problem.space("nsga2")
    random = np.random.default_rng(FRESH_SEED)
    drawn = [random_genome(space, random) for _ in range(DRAWN)]
    for number, genome in enumerate(nearest(space, drawn, cheapest, problem.macs)[:RANDOM]):
        yield f"random {number + 1}", space.schedule(genome)
    two_stage = ramp_schedules(space).genomes
    rising = [genome for genome in two_stage if genome[0] > genome[-1]]
    falling = [genome for genome in two_stage if genome[0] < genome[-1]]
    for kind in (rising, falling):
        genome = nearest(space, kind, cheapest, problem.macs)[0]
        schedule = space.schedule(genome)
        first, last = schedule.widths[0], schedule.widths[-1]
        switch = schedule.widths.index(last)
        yield f"two-stage {first:g} → {last:g} after {switch}", schedule


def nearest(
    space: ScheduleSpace,
    genomes: Sequence[Genome],
    schedule: StepSchedule,
    macs: Mapping[float, float],
) -> list[Genome]:
    """The genomes, those first whose cost is nearest to a schedule's."""
    costs = space.relative_costs(np.array(genomes), dict(macs))
    order = np.argsort(np.abs(costs - cost_fraction(schedule, macs)), kind="stable")
    return [genomes[place] for place in order]


def draw(problem: SearchProblem, schedules: Sequence[StepSchedule], pictures: Path) -> None:
    """The search's Pareto plot, and a row of images for each schedule, from the same noise."""
    shutil.copy(problem.run.search_path / "pareto.png", f"{pictures}_pareto.png")
    images = [
        problem.model.sample(schedule, GRID_IMAGES, seed=FRESH_SEED) for schedule in schedules
    ]
    save_rows(images, f"{pictures}_samples.png")


def save_rows(images: Sequence[np.ndarray], path: str | Path) -> None:
    """A picture with a row of `GRID_IMAGES` images of each schedule."""
    grid = image_grid(np.concatenate(images), columns=GRID_IMAGES)
    save_png(grid, path, scale=max(2, 64 // images[0].shape[1]))


if __name__ == "__main__":
    main()
