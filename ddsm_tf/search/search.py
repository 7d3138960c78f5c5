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
from ddsm_tf.search.oracle import ScheduleOracle
from ddsm_tf.search.pareto import Entry, full_width_entry
from ddsm_tf.search.space import Genome, ScheduleSpace
from ddsm_tf.search.tuner import ScheduleTuner

MAX_CANDIDATES = 8
# Standard errors by which a difference is beyond doubt.
CLEARLY = 3.0


NameBaseline = Callable[[Genome], str | None]
"""A genome → its name as a baseline, None for one that the search found."""


def trial_entries(oracle: ScheduleOracle, name_baseline: NameBaseline) -> list[Entry]:
    """An entry for each finished trial, in order, with all that was measured.

    Args:
        oracle: holds the trials.
        name_baseline: names the baselines among them.
    """
    entries = []
    for trial in oracle.completed():
        metrics = sorted(set(trial.metrics.metrics) - {"multi_objective"})
        numbers = {metric: trial.metrics.get_best_value(metric) for metric in metrics}
        entry = {"schedule": oracle.schedule(trial).to_dict(), **numbers}
        name = name_baseline(oracle.genome(trial))
        entries.append({**entry, "baseline": name} if name else entry)
    return entries


def run_trials(
    proposer: Any,
    evaluate: Callable[[StepSchedule], dict[str, float]],
    *,
    trials: int,
    directory: str | os.PathLike,
    name_baseline: NameBaseline = lambda genome: None,
    fingerprint: str = "",
    on_trial: Callable[[], None] | None = None,
) -> list[Entry]:
    """Run a search; trials that `directory` already holds are not run again.

    Under Keras Tuner's environment variables this process is the chief, which hands trials out, or
    a worker, which runs some of them.

    Args:
        proposer: proposes schedules, such as an `Evolution`.
        evaluate: measures one.
        trials: how many in all, at least one a width, so that the uniform ones are among them.
        directory: keeps the trials.
        name_baseline: names the baselines among the trials.
        fingerprint: of everything that decides what trials measure; workers must have the chief's.
        on_trial: called after each new trial.

    Returns:
        An entry a trial, in order; baselines carry their name. A worker's list is empty.

    Raises:
        InputError: `trials` is too small, or a kept trial is broken or of another search.
    """
    check_trials(trials, proposer.space)
    oracle = ScheduleOracle(proposer, trials, fingerprint=fingerprint)
    ScheduleTuner(oracle, evaluate, directory, on_trial).search()
    return trial_entries(oracle, name_baseline)


def finished_trials(
    proposer: Any, directory: str | os.PathLike, name_baseline: NameBaseline
) -> list[Entry]:
    """The trials that `directory` already holds, as `run_trials` returns them; none is run.

    Raises:
        InputError: a kept trial is broken or of another search.
    """
    oracle = ScheduleOracle(proposer, 1)
    oracle._set_project_dir(str(directory), ScheduleTuner.PROJECT)
    oracle.reload()
    return trial_entries(oracle, name_baseline)


def check_trials(trials: int, space: ScheduleSpace) -> int:
    """`trials`, if that is enough for the uniform baselines."""
    least = len(space.widths)
    if trials < least:
        raise invalid("trials", trials, f"must be at least {least}, one uniform schedule a width")
    return trials


def uniform_names(space: ScheduleSpace) -> dict[Genome, str]:
    """Genome → "full" or "uniform:W" of the uniform schedules."""
    names = {space.uniform(width): f"uniform:{width:g}" for width in space.widths}
    return {**names, space.uniform(space.widths[0]): "full"}


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

    def difference(self, other: Confirmation) -> tuple[float, float]:
        """Mean difference to another schedule's distances from the same seeds; its standard error.

        Schedules that start from the same noise share their luck, so this tells apart what
        `spread` does not.
        """
        differences = np.subtract(self.distances, other.distances)
        error = np.std(differences, ddof=1) / np.sqrt(len(differences))
        return float(differences.mean()), float(error)


class Confirmer:
    """Measures schedules from several other seeds and keeps what it measured.

    A search picks the luckiest of many noisy distances; only fresh noise tells how good it is.

    Args:
        evaluate: measures a schedule.
        seeds: of the starting noise, at least two.
        images: how many a seed.
        file: where measurements are kept; those already there are not made again.
        on_measured: called after each measurement.
    """

    def __init__(
        self,
        evaluate: ScheduleEvaluator,
        seeds: Sequence[int],
        images: int,
        file: str | os.PathLike,
        on_measured: Callable[[], None] | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.seeds = tuple(seeds)
        self.images = images
        self.file = Path(file)
        self.on_measured = on_measured
        self.measurements = _read_measurements(self.file)

    def __call__(self, schedule: StepSchedule) -> Confirmation:
        """Measure a schedule from every seed."""
        return Confirmation(schedule, tuple(self.distance(schedule, seed) for seed in self.seeds))

    def distance(self, schedule: StepSchedule, seed: int) -> float:
        """Measure a schedule from one seed."""
        what = {"schedule": schedule.to_dict(), "seed": seed, "images": self.images}
        for known in self.measurements:
            if all(known[key] == value for key, value in what.items()):
                return known["distance"]
        result = self.evaluate(schedule, seed, self.images)
        self.measurements.append({**what, **{key: result[key] for key in _MEASURED}})
        write_json(self.file, self.measurements)
        if self.on_measured:
            self.on_measured()
        return result["distance"]


_MEASURED = ("distance", "calls", "reused_calls", "full_calls", "reused_full_calls")


def _read_measurements(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    known = read_json(file, argument="confirmations")
    keys = {"schedule", "seed", "images", *_MEASURED}
    if not isinstance(known, list) or any(not isinstance(m, dict) or set(m) != keys for m in known):
        raise InputError(f"confirmations {file}: must be a list of measurements; delete the file")
    return known


def choose(
    entries: Sequence[Entry],
    confirm: Confirmer,
    *,
    budget: float | None = None,
    max_distance: float | None = None,
    tolerance: float = 0.0,
) -> tuple[Confirmation, Confirmation]:
    """Choose a schedule and confirm it on noise that the search has not seen.

    By default the cheapest that is as good as full width. Schedules that start from the same noise
    share their luck, so they are compared seed by seed: the mean difference must not exceed its
    standard error (nor full width's own spread), or the tolerance. At most eight candidates are
    confirmed. They need not lie on the Pareto front: one lucky schedule dominates all costlier
    ones, and where it does not hold those are needed.

    Args:
        entries: all that were measured, in any order, the baseline "full" among them.
        confirm: measures candidates.
        budget: choose the best whose cost is at most this share of full width's instead.
        max_distance: choose the cheapest whose mean distance is at most this instead.
        tolerance: by which share of full width's distance a schedule may be worse.

    Returns:
        Full width and the chosen schedule.

    Raises:
        InputError: no schedule holds to `budget` or `max_distance`.
    """
    full_entry = full_width_entry(entries)
    full = confirm(StepSchedule.from_dict(full_entry["schedule"]))
    if budget is not None:
        return full, _best_within(entries, confirm, budget, full_entry["cost"])
    # Distances from the same noise differ little by luck, those from other noise by `spread`.
    allowed = tolerance * full.mean
    if max_distance is None:
        limit, margin = full.mean + max(full.spread, allowed), 0.0
    else:
        limit, margin = max_distance, 2.0 * full.spread

    def hopeful(distance: float, full_distance: float) -> bool:
        return distance - full_distance + full.mean <= limit + margin

    promising = [
        entry
        for entry in entries
        if entry["cost"] < full_entry["cost"] and hopeful(entry["distance"], full_entry["distance"])
    ]
    for entry in _best_of_ranges(promising, MAX_CANDIDATES):
        schedule = StepSchedule.from_dict(entry["schedule"])
        # One seed weeds out the worst.
        if not hopeful(confirm.distance(schedule, confirm.seeds[0]), full.distances[0]):
            continue
        if max_distance is None and not _as_good(schedule, full, confirm, allowed):
            continue
        candidate = confirm(schedule)
        if candidate.mean <= limit:
            return full, candidate
    if full.mean > limit:
        rule = f"is below all that was found; full width has {full.mean:.4g}"
        raise invalid("max_distance", max_distance, rule)
    return full, full


def _as_good(
    schedule: StepSchedule, full: Confirmation, confirm: Confirmer, allowed: float
) -> bool:
    """Whether a schedule is no worse than full width as far as their seeds can tell, or allowed.

    Where it is clearly worse after some of the seeds, the others are not measured.
    """
    for count in range(2, len(confirm.seeds) + 1):
        measured = (confirm.distance(schedule, seed) for seed in confirm.seeds[:count])
        candidate = Confirmation(schedule, tuple(measured))
        so_far = Confirmation(full.schedule, full.distances[:count])
        difference, error = candidate.difference(so_far)
        if difference > allowed + CLEARLY * error:
            return False
    return difference <= max(error, allowed)


def _best_of_ranges(entries: Sequence[Entry], count: int) -> list[Entry]:
    """The nearest of each of at most `count` ranges of cost, cheapest first."""
    by_cost = sorted(entries, key=lambda entry: entry["cost"])
    ranges = np.array_split(np.arange(len(by_cost)), min(count, len(by_cost)) or 1)
    return [
        min((by_cost[place] for place in places), key=lambda entry: entry["distance"])
        for places in ranges
        if len(places)
    ]


def _best_within(
    entries: Sequence[Entry], confirm: Confirmer, budget: float, full_cost: float
) -> Confirmation:
    """The best of the most hopeful entries within a budget."""
    affordable = [entry for entry in entries if entry["cost"] <= budget * full_cost * (1 + 1e-9)]
    if not affordable:
        cheapest = min(entry["cost"] for entry in entries) / full_cost
        raise invalid("budget", budget, f"is below the cheapest schedule's share ({cheapest:.3g})")
    affordable.sort(key=lambda entry: entry["distance"])
    # Several methods may have tried the same schedule.
    schedules = dict.fromkeys(StepSchedule.from_dict(entry["schedule"]) for entry in affordable)
    found = [confirm(schedule) for schedule in list(schedules)[: MAX_CANDIDATES // 2]]
    return min(found, key=lambda confirmation: confirmation.mean)


def spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
