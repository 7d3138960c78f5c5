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


def pareto_entries(entries: Sequence[Entry], cost: str = "macs") -> list[Entry]:
    """The non-dominated entries and every baseline, sorted by cost.

    Args:
        entries: all that were measured.
        cost: which number is the cost beside `distance`.
    """
    ranks = front_ranks([(entry["distance"], entry[cost]) for entry in entries])
    kept = [
        entry for entry, rank in zip(entries, ranks, strict=True) if not rank or "baseline" in entry
    ]
    return sorted(kept, key=lambda entry: (entry[cost], entry["distance"]))


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
