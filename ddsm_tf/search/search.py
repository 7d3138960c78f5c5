"""The stages of a search: run the trials, then choose a schedule and confirm it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import read_json, write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.evaluation import ScheduleEvaluator
from ddsm_tf.search.evolution import Evolution
from ddsm_tf.search.oracle import ScheduleOracle
from ddsm_tf.search.pareto import Entry
from ddsm_tf.search.space import Genome, ScheduleSpace
from ddsm_tf.search.tuner import ScheduleTuner

MAX_CANDIDATES = 8


def run_trials(
    evolution: Evolution,
    evaluate: ScheduleEvaluator,
    *,
    trials: int,
    seed: int,
    directory: str | os.PathLike,
    on_trial: Callable[[], None] | None = None,
) -> list[Entry]:
    """Evolve schedules; trials that `directory` already holds are not run again.

    Args:
        evolution: proposes schedules.
        evaluate: measures one.
        trials: how many in all, at least one a width, so that every baseline is among them.
        seed: of the starting noise that all trials share.
        directory: keeps the trials.
        on_trial: called after each new trial.

    Returns:
        An entry a trial, in order; baselines carry their name.

    Raises:
        InputError: `trials` is too small, or a kept trial is broken or of another search.
    """
    check_trials(trials, evolution.space)
    oracle = ScheduleOracle(evolution, trials)
    tuner = ScheduleTuner(oracle, lambda schedule: evaluate(schedule, seed), directory, on_trial)
    tuner.search()
    baselines = baseline_names(evolution)
    return [_entry(oracle, trial, baselines) for trial in oracle.completed()]


def check_trials(trials: int, space: ScheduleSpace) -> int:
    """`trials`, if that is enough for the uniform baselines."""
    least = len(space.widths)
    if trials < least:
        raise invalid("trials", trials, f"must be at least {least}, one uniform schedule a width")
    return trials


def baseline_names(evolution: Evolution) -> dict[Genome, str]:
    """Genomes that are baselines: "full", "uniform:W" and the first generation's "random"."""
    space = evolution.space
    names = dict.fromkeys(evolution.random_genomes(), "random")
    names |= {space.uniform(width): f"uniform:{width:g}" for width in space.widths}
    return names | {space.uniform(space.widths[0]): "full"}


def _entry(oracle: ScheduleOracle, trial: Any, baselines: dict[Genome, str]) -> Entry:
    genome = oracle.genome(trial)
    numbers = {
        name: trial.metrics.get_best_value(name)
        for name in ("distance", "cost", "macs", "macs_fraction", "seconds")
    }
    entry = {"schedule": oracle.evolution.space.schedule(genome).to_dict(), **numbers}
    return {**entry, "baseline": baselines[genome]} if genome in baselines else entry


@dataclass(frozen=True)
class Confirmation:
    """Distances of a schedule from starting noise that the search has not seen.

    Attributes:
        schedule: the schedule.
        distances: one a seed.
    """

    schedule: StepSchedule
    distances: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean distance over the seeds."""
        return float(np.mean(self.distances))

    @property
    def spread(self) -> float:
        """Standard deviation of the distance from seed to seed."""
        return float(np.std(self.distances, ddof=1))


class Confirmer:
    """Measures schedules from several other seeds and keeps what it measured.

    A search picks the luckiest of many noisy distances; only fresh noise tells how good it is.

    Args:
        evaluate: measures a schedule.
        seeds: of the starting noise, at least two.
        file: where measurements are kept; those already there are not made again.
        on_measured: called after each measurement.
    """

    def __init__(
        self,
        evaluate: ScheduleEvaluator,
        seeds: Sequence[int],
        file: str | os.PathLike,
        on_measured: Callable[[], None] | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.seeds = tuple(seeds)
        self.file = Path(file)
        self.on_measured = on_measured
        self._known = _read_measurements(self.file)

    def __call__(self, schedule: StepSchedule) -> Confirmation:
        """Measure a schedule from every seed."""
        return Confirmation(schedule, tuple(self.distance(schedule, seed) for seed in self.seeds))

    def distance(self, schedule: StepSchedule, seed: int) -> float:
        """Measure a schedule from one seed."""
        for known in self._known:
            if known["seed"] == seed and known["schedule"] == schedule.to_dict():
                return known["distance"]
        distance = self.evaluate(schedule, seed)["distance"]
        self._known.append({"schedule": schedule.to_dict(), "seed": seed, "distance": distance})
        write_json(self.file, self._known)
        if self.on_measured:
            self.on_measured()
        return distance


def _read_measurements(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    known = read_json(file, argument="confirmations")
    keys = {"schedule", "seed", "distance"}
    if not isinstance(known, list) or any(not isinstance(m, dict) or set(m) != keys for m in known):
        raise InputError(f"confirmations {file}: must be a list of measurements; delete the file")
    return known


def choose(entries: Sequence[Entry], confirm: Confirmer) -> tuple[Confirmation, Confirmation]:
    """The cheapest schedule that is confirmed to be as good as full width.

    As good means: over the confirming seeds its mean distance exceeds full width's by no more than
    full width's own spread from seed to seed. Candidates are the entries whose distance is within
    two spreads of full width's; at most eight are tried, spaced over the costs.

    Args:
        entries: the Pareto front and the baselines, sorted by cost, "full" among them.
        confirm: measures candidates.

    Returns:
        Full width and the chosen schedule, which is full width where no other held.
    """
    full_entry = next(entry for entry in entries if entry.get("baseline") == "full")
    full = confirm(StepSchedule.from_dict(full_entry["schedule"]))
    limit = full_entry["distance"] + 2.0 * full.spread
    cheaper = [entry for entry in entries if entry["cost"] < full_entry["cost"]]
    candidates = [entry for entry in cheaper if entry["distance"] <= limit]
    for entry in spaced(candidates, MAX_CANDIDATES):
        schedule = StepSchedule.from_dict(entry["schedule"])
        # Distances from the same noise differ little by luck, so one seed weeds out the worst.
        if confirm.distance(schedule, confirm.seeds[0]) > full.distances[0] + full.spread:
            continue
        candidate = confirm(schedule)
        if candidate.mean <= full.mean + full.spread:
            return full, candidate
    return full, full


def spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
