"""Compares search methods on one run: hypervolume after equal trials and equal UNet calls.

    python benchmarks/search_methods.py RUN -o DIR

All methods measure schedules from the same starting noise, so a schedule that two of them try is
sampled once; each is charged for it all the same, and for the importance table if it uses it.
Writes `DIR/search_methods.json`, a table and a plot. Selection flatters what it selects, so the
front of every method is also measured from noise that no search has seen. An interrupted
comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ddsm_tf.cost import macs_per_width
from ddsm_tf.files import atomic_file, write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search import Evolution, ScheduleEvaluator, ScheduleSpace, comparison
from ddsm_tf.search.baselines import (
    FixedSchedules,
    PaperSearch,
    importance_genomes,
    importance_proxy,
    ramp_schedules,
    random_schedules,
)
from ddsm_tf.search.generations import Generations
from ddsm_tf.search.pareto import Entry, front_ranks
from ddsm_tf.search.search import uniform_names
from ddsm_tf.training.evaluate import frechet_distance_of
from ddsm_tf.training.importance import importance_of
from ddsm_tf.training.run import Run
from ddsm_tf.training.search_result import WITH_TABLE, importance_calls

METHODS = ("nsga2", "nsga2-plain", "importance", "random", "ramps", "paper")
FRESH_SEED = 1000


class Measurements:
    """Results of schedules, kept in a file.

    Args:
        evaluate: measures a schedule.
        file: JSON lines.
    """

    def __init__(self, evaluate: ScheduleEvaluator, file: Path) -> None:
        self.evaluate = evaluate
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self._known = {entry.pop("key"): entry for entry in map(json.loads, lines)}

    def __call__(self, schedule: StepSchedule, seed: int) -> dict[str, float]:
        """Measure a schedule, or remember it."""
        key = f"{seed} {' '.join(f'{width:g}' for width in schedule.widths)}"
        if key not in self._known:
            self._known[key] = self.evaluate(schedule, seed)
            with self.file.open("a") as file:
                file.write(json.dumps({"key": key, **self._known[key]}) + "\n")
        return self._known[key]


def run_method(method: Generations, measure: Measurements, trials: int) -> list[Entry]:
    """The trials of a method, in order."""
    results, entries, names = {}, [], uniform_names(method.space)
    while len(results) < trials and (pending := method.pending(results)):
        for genome in pending[: trials - len(results)]:
            schedule = method.space.schedule(genome)
            result = measure(schedule, 0)
            results[genome] = (result["distance"], result["cost"])
            named = {"baseline": names[genome]} if genome in names else {}
            entries.append({"schedule": schedule.to_dict(), **result, **named})
    return entries


def make_method(name: str, space: ScheduleSpace, seed: int, options: Any) -> Generations:
    """A method by name."""
    macs, proxy = options.macs, importance_proxy(space, options.harm)
    uniform = space.uniforms()
    if name == "nsga2":
        room = options.population - len(uniform)
        return Evolution(
            space,
            options.population,
            seed,
            costs=macs,
            children=options.children,
            seeds=importance_genomes(space, proxy, macs, (room + 1) // 2),
            proxy=proxy,
        )
    if name == "nsga2-plain":
        return Evolution(space, options.population, seed, screening=0)
    if name == "importance":
        return FixedSchedules(space, [*uniform, *importance_genomes(space, proxy, macs, 400)])
    if name == "random":
        return random_schedules(space, options.trials, seed)
    if name == "ramps":
        return ramp_schedules(space)
    return PaperSearch(ScheduleSpace(space.steps, space.widths, len(space.steps)), seed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Run.open)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS), type=lambda text: text.split(","))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--segments", type=int, default=10)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--trials", type=int, default=40, help="of both kinds of nsga2 and random")
    parser.add_argument("--paper-trials", type=int, default=400, help="of the paper's search")
    parser.add_argument("--population", type=int, default=13)
    parser.add_argument("--children", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", type=int, default=2, help="noise seeds that no search has seen")
    return parser.parse_args()


def main() -> None:
    """Run the comparison."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    run: Run = options.run
    model = run.load_model()
    options.macs = macs_per_width(model.unet)
    base = run.schedule("full", steps=options.steps)
    space = ScheduleSpace(base, model.unet.widths, options.segments)
    table = importance_of(run, model)
    options.harm = table.harm(base, run.noise_table)
    options.table_calls = importance_calls(table, options.macs)["full_calls"]
    evaluate = ScheduleEvaluator(
        model.denoise,
        run.noise_table,
        model.unet.image_shape,
        frechet_distance_of(run),
        options.macs,
        base,
        images=options.images,
    )
    measure = Measurements(evaluate, options.out / "measurements.jsonl")
    searches: dict[str, list[list[Entry]]] = {}
    for name in options.methods:
        # The lists of fixed schedules are tried to their end.
        is_fixed = name in ("importance", "ramps")
        trials = options.paper_trials if name == "paper" or is_fixed else options.trials
        seeds = range(1 if is_fixed else options.seeds)
        searches[name] = [
            run_method(make_method(name, space, seed, options), measure, trials)
            for seed in tqdm(seeds, name, disable=None)
        ]
    result = summarise(searches, measure, options)
    write_json(options.out / "search_methods.json", result)
    with atomic_file(options.out / "search_methods.png") as temporary:
        plot(result).savefig(temporary, dpi=110)
    print(table(result))


def summarise(
    searches: dict[str, list[list[Entry]]], measure: Measurements, options: Any
) -> dict[str, Any]:
    """Hypervolume curves of every method and seed, and fronts on fresh noise."""
    every = [entry for runs in searches.values() for entries in runs for entry in entries]
    reference = comparison.hypervolume_reference(every)
    spent = measure.evaluate.sampler
    main_runs = searches.get("nsga2", [])
    return {
        "preset": options.run.config.preset,
        "training_steps": options.run.config.steps,
        "steps": options.steps,
        "segments": options.segments,
        "images": options.images,
        "reference": reference.tolist(),
        "calls": {"made": spent.calls.total(), "reused": spent.reused_calls.total()},
        "proxy_rank_correlation": comparison.proxy_correlation(
            every,
            options.harm,
            options.run.schedule("full", steps=options.steps),
            list(options.macs),
        ),
        "equal_cost": {
            name: [
                comparison.baselines_at_equal_cost(
                    found, [{**entry, "baseline": name} for entry in runs[0]]
                )[name]
                for found in main_runs
            ]
            for name, runs in searches.items()
            if name != "nsga2"
        },
        "methods": {
            name: {
                "curves": [
                    comparison.hypervolume_curve(
                        entries, reference, options.table_calls if name in WITH_TABLE else 0.0
                    )
                    for entries in runs
                ],
                "fresh": [
                    fresh_hypervolume(entries, measure, options.fresh, reference)
                    for entries in runs
                ],
                "front": front(runs[0]),
            }
            for name, runs in searches.items()
        },
    }


def front(entries: list[Entry]) -> list[Entry]:
    """The entries that no other beats, cheapest first."""
    ranks = front_ranks(comparison.points(entries))
    kept = [entry for entry, rank in zip(entries, ranks, strict=True) if not rank]
    return sorted(kept, key=lambda entry: entry["cost"])


def fresh_hypervolume(
    entries: list[Entry], measure: Measurements, seeds: int, reference: np.ndarray
) -> float | None:
    """Hypervolume of a front as measured from other noise."""
    if not seeds:
        return None
    fresh = []
    for entry in front(entries):
        schedule = StepSchedule.from_dict(entry["schedule"])
        found = [measure(schedule, FRESH_SEED + seed)["distance"] for seed in range(seeds)]
        fresh.append({"distance": float(np.mean(found)), "cost": entry["cost"]})
    return comparison.hypervolume_share(fresh, reference)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| method | trials | calls at full width | hypervolume | its front on fresh noise |",
        "|---|---|---|---|---|",
    ]
    for name, method in result["methods"].items():
        for points in zip(*method["curves"], strict=False):
            last = points[0] is method["curves"][0][-1]
            calls = np.mean([point["full_calls"] for point in points])
            found = _mean([point["hypervolume"] for point in points])
            fresh = _mean(method["fresh"]) if last else ""
            lines.append(f"| {name} | {points[0]['trials']} | {calls:,.0f} | {found} | {fresh} |")
    return "\n".join(lines)


def _mean(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def plot(result: dict[str, Any]) -> Figure:
    """Left: hypervolume over trials, the band from seed to seed. Right: fronts of one seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, method in result["methods"].items():
        rows = list(zip(*method["curves"], strict=False))
        counts = [points[0]["trials"] for points in rows]
        values = np.array([[point["hypervolume"] for point in points] for points in rows])
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
