"""Compares search methods on one run: hypervolume after equal trials and equal UNet calls.

    python benchmarks/search_methods.py RUN -o DIR

All methods measure schedules from the same starting noise, so a schedule that two of them try is
sampled once; each is charged for it all the same. Writes `DIR/search_methods.json`, a table and a
plot. The front of each method is also measured from noise that no search has seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ddsm_tf.cost import macs_per_width
from ddsm_tf.errors import InputError
from ddsm_tf.files import atomic_file, write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search import Evolution, ScheduleEvaluator, ScheduleSpace
from ddsm_tf.search.baselines import (
    FixedSchedules,
    PaperSearch,
    importance_genomes,
    importance_proxy,
    ramp_schedules,
    random_schedules,
)
from ddsm_tf.search.generations import Generations
from ddsm_tf.search.pareto import front_ranks, hypervolume
from ddsm_tf.training.evaluate import frechet_distance_of
from ddsm_tf.training.importance import importance_of
from ddsm_tf.training.run import Run

METHODS = ("nsga2", "nsga2-plain", "importance", "random", "ramps", "paper")
FRESH_SEED = 1000


class Measurements:
    """Results of schedules, kept in a file, so that an interrupted comparison goes on."""

    def __init__(self, evaluate: ScheduleEvaluator, file: Path) -> None:
        self.evaluate = evaluate
        self.file = file
        self._known: dict[str, dict[str, float]] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                self._known[entry.pop("key")] = entry

    def __call__(self, schedule: StepSchedule, seed: int = 0) -> dict[str, float]:
        """Measure a schedule, or remember it."""
        key = f"{seed} {' '.join(f'{w:g}' for w in schedule.widths)} {schedule.timesteps}"
        if key not in self._known:
            self._known[key] = self.evaluate(schedule, seed)
            with self.file.open("a") as file:
                file.write(json.dumps({"key": key, **self._known[key]}) + "\n")
        return self._known[key]


def run_method(
    method: Generations, measure: Callable[[StepSchedule], dict[str, float]], trials: int
) -> list[dict[str, Any]]:
    """The trials of a method, in order."""
    results, entries = {}, []
    while len(results) < trials and (pending := method.pending(results)):
        for genome in pending[: trials - len(results)]:
            schedule = method.space.schedule(genome)
            result = measure(schedule)
            results[genome] = (result["distance"], result["cost"])
            full_calls = result["full_calls"] + result["reused_full_calls"]
            entries.append(
                {
                    "distance": result["distance"],
                    "macs_fraction": result["macs_fraction"],
                    "full_calls": full_calls,
                    "schedule": schedule,
                }
            )
    return entries


def points(entries: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(distance, share of full MACs) of each."""
    return [(entry["distance"], entry["macs_fraction"]) for entry in entries]


def front(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that no other beats, cheapest first."""
    kept = [e for e, rank in zip(entries, front_ranks(points(entries)), strict=True) if not rank]
    return sorted(kept, key=lambda entry: entry["macs_fraction"])


def make_method(name: str, space: ScheduleSpace, seed: int, options: Any) -> Generations:
    """A method by name."""
    macs, effect = options.macs, options.effect
    proxy = importance_proxy(space, effect)
    seeds = importance_genomes(space, proxy, macs, options.population // 2)
    if name == "nsga2":
        return Evolution(
            space,
            options.population,
            seed,
            costs=macs,
            children=options.children,
            seeds=seeds,
            proxy=proxy,
        )
    if name == "nsga2-plain":
        return Evolution(space, options.population, seed, screening=0)
    if name == "importance":
        uniform = [space.uniform(width) for width in space.widths]
        return FixedSchedules(space, [*uniform, *importance_genomes(space, proxy, macs, 200)])
    if name == "random":
        return random_schedules(space, options.paper_trials, seed)
    if name == "ramps":
        return ramp_schedules(space)
    return PaperSearch(ScheduleSpace(space.steps, space.widths, len(space.steps)), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Run.open)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS), type=lambda text: text.split(","))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--segments", type=int, default=10)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--paper-trials", type=int, default=400)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--children", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", type=int, default=2, help="noise seeds that no search has seen")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    run: Run = options.run
    model = run.load_model()
    options.macs = macs_per_width(model.unet)
    base = run.schedule("full", steps=options.steps)
    space = ScheduleSpace(base, model.unet.widths, options.segments)
    options.effect = importance_of(run, model).sample_effect(base, run.noise_table)
    evaluate = ScheduleEvaluator(
        model.denoise,
        run.noise_table,
        model.unet.image_shape,
        frechet_distance_of(run),
        options.macs,
        len(base),
        images=options.images,
    )
    measure = Measurements(evaluate, options.out / "measurements.jsonl")
    searches: dict[str, list[list[dict[str, Any]]]] = {}
    for name in options.methods:
        fixed = name in ("importance", "ramps")
        trials = options.paper_trials if name in ("paper", "random", "ramps") else options.trials
        searches[name] = [
            run_method(make_method(name, space, seed, options), measure, trials)
            for seed in tqdm(range(1 if fixed else options.seeds), name, disable=None)
        ]
    result = summarise(searches, measure, options)
    write_json(options.out / "search_methods.json", result)
    with atomic_file(options.out / "search_methods.png") as temporary:
        plot(result).savefig(temporary, dpi=110)
    print(table(result))


def summarise(
    searches: dict[str, list[list[dict[str, Any]]]], measure: Measurements, options: Any
) -> dict[str, Any]:
    """Hypervolumes, as shares of the box between the best of all and the worst uniform."""
    every = [entry for runs in searches.values() for entries in runs for entry in entries]
    uniform = [e for e in every if len(set(e["schedule"].widths)) == 1]
    if not uniform:
        raise InputError("`--methods` must hold one that tries the uniform schedules")
    reference = np.max(points(uniform), axis=0)
    ideal = np.min(points(every), axis=0)
    box = float(np.prod(reference - ideal))
    methods = {}
    for name, runs in searches.items():
        counts = [n for n in (10, 20, 40, 80, 160, 400, 1000) if n <= len(runs[0])]
        counts = sorted({*counts, len(runs[0])})
        methods[name] = {
            "trials": [
                {
                    "count": count,
                    "hypervolume": [
                        hypervolume(points(entries[:count]), reference) / box for entries in runs
                    ],
                    "full_calls": [
                        sum(entry["full_calls"] for entry in entries[:count]) for entries in runs
                    ],
                }
                for count in counts
            ],
            "fresh_hypervolume": [
                fresh_hypervolume(entries[: options.trials], measure, options.fresh, reference, box)
                for entries in runs
            ],
            "front": [
                {**entry, "schedule": entry["schedule"].to_dict()} for entry in front(runs[0])
            ],
        }
    return {
        "run": str(options.run.config.preset),
        "steps": options.steps,
        "segments": options.segments,
        "images": options.images,
        "reference": reference.tolist(),
        "ideal": ideal.tolist(),
        "methods": methods,
    }


def fresh_hypervolume(
    entries: list[dict[str, Any]],
    measure: Measurements,
    seeds: int,
    reference: np.ndarray,
    box: float,
) -> float | None:
    """Hypervolume of a front as measured from other noise: selection cannot flatter it."""
    if not seeds:
        return None
    fresh = []
    for entry in front(entries):
        found = [measure(entry["schedule"], FRESH_SEED + seed)["distance"] for seed in range(seeds)]
        fresh.append((float(np.mean(found)), entry["macs_fraction"]))
    return hypervolume(fresh, reference) / box


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| method | trials | full-width calls | hypervolume | on fresh noise |",
        "|---|---|---|---|---|",
    ]
    for name, method in result["methods"].items():
        for row in method["trials"]:
            last = row is method["trials"][-1]
            fresh = _mean(method["fresh_hypervolume"]) if last else ""
            lines.append(
                f"| {name} | {row['count']} | {np.mean(row['full_calls']):,.0f} | "
                f"{_mean(row['hypervolume'])} | {fresh} |"
            )
    return "\n".join(lines)


def _mean(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def plot(result: dict[str, Any]) -> Figure:
    """Left: hypervolume over trials. Right: the fronts of the first seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, method in result["methods"].items():
        counts = [row["count"] for row in method["trials"]]
        values = np.array([row["hypervolume"] for row in method["trials"]])
        line = left.plot(counts, values.mean(axis=1), "o-", label=name)[0]
        left.fill_between(
            counts, values.min(axis=1), values.max(axis=1), alpha=0.2, color=line.get_color()
        )
        fractions = [entry["macs_fraction"] for entry in method["front"]]
        right.plot(fractions, [entry["distance"] for entry in method["front"]], ".-", label=name)
    left.set(xscale="log", xlabel="trials", ylabel="hypervolume")
    right.set(xlabel="share of full-width MACs", ylabel="distance")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


if __name__ == "__main__":
    main()
