"""The Pareto front of a search: what it is, its file, and the choice of one schedule from it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError
from ddsm_tf.files import read_json, write_json
from ddsm_tf.schedule import StepSchedule

NUMBERS = ("distance", "macs", "macs_fraction", "seconds")

Entry = dict[str, Any]
"""An object of `pareto.json`: `schedule` (as `StepSchedule.to_dict` gives it), `distance`, `macs`
an image, `macs_fraction` of full width, `seconds` an image, and `baseline` for a baseline."""


def front_ranks(objectives: Sequence[Sequence[float]]) -> list[int]:
    """The front each point belongs to: 0 if no other is at least as good in all and better in one.

    Args:
        objectives: N points of D numbers; less is better.
    """
    if not len(objectives):
        return []
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    ranks = np.empty(len(objectives), int)
    for rank, front in enumerate(NonDominatedSorting().do(np.asarray(objectives, float))):
        ranks[front] = rank
    return ranks.tolist()


def hypervolume(objectives: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The area (D = 2) that the points beat, up to `reference`; more is better.

    Points that do not beat the reference in every objective add nothing.
    """
    from pymoo.indicators.hv import HV

    return float(HV(ref_point=np.asarray(reference, float))(np.asarray(objectives, float)))


def hypervolume_gain(
    points: np.ndarray, front: np.ndarray, reference: Sequence[float]
) -> np.ndarray:
    """By how much each point alone would enlarge the area that `front` beats, float (N,).

    Args:
        points: (N, 2); less is better.
        front: (M, 2), dominated points allowed.
        reference: (2,).
    """
    points = np.asarray(points, float)
    order = np.lexsort((front[:, 0], front[:, 1]))
    # A staircase over the second objective: from `left` to `right` the front is at `level`.
    left = np.append(-np.inf, front[order, 1])
    right = np.minimum(np.append(front[order, 1], np.inf), reference[1])
    level = np.minimum.accumulate(np.append(reference[0], front[order, 0]))
    length = np.maximum(right - np.maximum(left, points[:, 1:]), 0.0)
    return (np.maximum(level - points[:, :1], 0.0) * length).sum(axis=1)


def pick_by_hypervolume(points: np.ndarray, found: np.ndarray, count: int) -> list[int]:
    """Indices of at most `count` points that enlarge what `found` beats, one after the other.

    Args:
        points: (N, 2) candidates; less is better.
        found: (M, 2), what is there already; its worst values are the reference.
        count: how many to pick; fewer where no other point adds anything.
    """
    reference, front = found.max(axis=0), found
    picked: list[int] = []
    while len(picked) < count:
        gains = hypervolume_gain(points, front, reference)
        best = int(gains.argmax())
        if gains[best] <= 0.0:
            break
        picked.append(best)
        front = np.concatenate([front, points[best : best + 1]])
    return picked


def pareto_entries(entries: Sequence[Entry], cost: str = "macs") -> list[Entry]:
    """The non-dominated entries and the best of every baseline, sorted by cost.

    Of a kind of baseline (the name up to a colon) those are kept that no other of the kind
    dominates; the uniform schedules all. A schedule that was measured twice is kept once.

    Args:
        entries: all that were measured.
        cost: which number is the cost beside `distance`.
    """
    kept: list[Entry] = []
    kinds: dict[str, list[Entry]] = {"": list(entries)}
    for entry in entries:
        name = entry.get("baseline", "")
        if name == "full" or name.startswith("uniform:"):
            kept.append(entry)
        elif name:
            kinds.setdefault(name.split(":")[0], []).append(entry)
    for some in kinds.values():
        ranks = front_ranks([(entry["distance"], entry[cost]) for entry in some])
        kept += [entry for entry, rank in zip(some, ranks, strict=True) if not rank]
    # Names are kept over none: the first entry of a schedule wins.
    unique: list[Entry] = []
    for entry in sorted(kept, key=lambda entry: "baseline" not in entry):
        if all(entry["schedule"] != other["schedule"] for other in unique):
            unique.append(entry)
    return sorted(unique, key=lambda entry: (entry[cost], entry["distance"]))


def full_width_entry(entries: Sequence[Entry]) -> Entry:
    """The baseline that all others are compared with: every step at full width.

    Raises:
        InputError: it is not there.
    """
    for entry in entries:
        if entry.get("baseline") == "full":
            return entry
    raise InputError("pareto: has no entry of full width; search again")


def write_pareto(path: str | os.PathLike, entries: Sequence[Entry]) -> None:
    """Write `pareto.json`, atomically."""
    write_json(path, list(entries))


def read_pareto(path: str | os.PathLike) -> list[Entry]:
    """Read a `pareto.json`.

    Raises:
        InputError: it cannot be read, or an entry lacks a number or has a broken schedule.
    """
    entries = read_json(path, argument="pareto")
    if not isinstance(entries, list):
        raise InputError(f"pareto {path}: must be a list")
    for index, entry in enumerate(entries):
        try:
            _check_entry(entry)
        except InputError as error:
            raise InputError(f"pareto {path}, entry {index}: {error}") from error
    return entries


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise InputError("must be an object")
    for key in NUMBERS:
        value = entry.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise InputError(f"`{key}` (={value!r}) must be a number of 0 or more")
    if not isinstance(entry.get("baseline", ""), str):
        raise InputError(f"`baseline` (={entry['baseline']!r}) must be a text")
    StepSchedule.from_dict(entry.get("schedule"))
