"""How good a search was: hypervolume over trials and calls, baselines at equal cost, proxies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.pareto import Entry, full_width_entry, hypervolume

# Shares of full width's distance that somebody may be willing to lose.
TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2)
COUNTS = (5, 10, 20, 40, 80, 160, 320, 640, 1280)


def points(entries: Sequence[Entry]) -> list[tuple[float, float]]:
    """(distance, cost) of each entry."""
    return [(entry["distance"], entry["cost"]) for entry in entries]


def all_calls(entry: Entry) -> float:
    """What a trial costs in calls at full width if it shares no states with others."""
    return entry["full_calls"] + entry["reused_full_calls"]


def hypervolume_reference(entries: Sequence[Entry]) -> np.ndarray:
    """The worst distance and the worst cost of the uniform schedules, float64 (2,)."""
    uniform = [e for e in entries if e.get("baseline", "").split(":")[0] in ("full", "uniform")]
    return np.max(points(uniform), axis=0)


def hypervolume_share(entries: Sequence[Entry], reference: np.ndarray) -> float:
    """The area that entries beat, as a share of what distance 0 at no cost would beat."""
    return hypervolume(points(entries), reference) / float(np.prod(reference))


def hypervolume_curve(
    entries: Sequence[Entry], reference: np.ndarray, spent_before: float = 0.0
) -> list[dict[str, float]]:
    """`hypervolume` after some numbers of `trials`, and the `full_calls` spent by then.

    Args:
        entries: the trials of one method, in order.
        reference: see `hypervolume_reference`.
        spent_before: calls at full width before the first trial, such as the importance table's.
    """
    counts = sorted({count for count in COUNTS if count < len(entries)} | {len(entries)})
    return [
        {
            "trials": count,
            "full_calls": spent_before + sum(map(all_calls, entries[:count])),
            "hypervolume": hypervolume_share(entries[:count], reference),
        }
        for count in counts
    ]


def hypervolume_at_calls(
    entries: Sequence[Entry], reference: np.ndarray, full_calls: float, spent_before: float = 0.0
) -> float:
    """Hypervolume of the first trials that, with what came before, cost at most `full_calls`."""
    spent = spent_before + np.cumsum([all_calls(entry) for entry in entries])
    count = int(np.searchsorted(spent, full_calls * (1 + 1e-9), side="right"))
    return hypervolume_share(entries[:count], reference) if count else 0.0


def at_equal_cost(found: Sequence[Entry], baseline: Entry) -> float | None:
    """The best distance found at no more than a baseline's cost, over the baseline's distance.

    Below 1 the search is better; None where it found nothing as cheap.
    """
    affordable = [e["distance"] for e in found if e["cost"] <= baseline["cost"] * (1 + 1e-9)]
    return min(affordable) / baseline["distance"] if affordable else None


def baselines_at_equal_cost(
    found: Sequence[Entry], baselines: Sequence[Entry]
) -> dict[str, dict[str, float]]:
    """For each kind of baseline but full width, how it compares with what was found at equal cost.

    Args:
        found: the trials of the search.
        baselines: entries with a `baseline`.

    Returns:
        Kind → `count`; `beaten`, the share that the search beats; `median_ratio` of the distances.
    """
    kinds: dict[str, list[float]] = {}
    for baseline in baselines:
        ratio = at_equal_cost(found, baseline)
        if ratio is not None and baseline["baseline"] != "full":
            kinds.setdefault(baseline["baseline"].split(":")[0], []).append(ratio)
    return {
        kind: {
            "count": len(ratios),
            "beaten": float(np.mean(np.array(ratios) < 1.0)),
            "median_ratio": float(np.median(ratios)),
        }
        for kind, ratios in kinds.items()
    }


def cheaper_within(
    entries: Sequence[Entry], chosen_cost: float, tolerances: Sequence[float] = TOLERANCES
) -> list[dict[str, float]]:
    """What trials cost that are cheaper than the choice and farther than full width by some share.

    Args:
        entries: the trials, the baseline "full" among them.
        chosen_cost: what has been chosen already costs.
        tolerances: shares of full width's distance, rising.

    Returns:
        `tolerance` and `cost_fraction` of full width's, for each tolerance that allows a cheaper
        trial than the one before. One noise and no confirmation stand behind it.
    """
    full = full_width_entry(entries)
    found, cheapest = [], chosen_cost
    for tolerance in tolerances:
        limit = (1.0 + tolerance) * full["distance"]
        cost = min(entry["cost"] for entry in entries if entry["distance"] <= limit)
        if cost < cheapest * (1 - 1e-9):
            found.append({"tolerance": tolerance, "cost_fraction": cost / full["cost"]})
            cheapest = cost
    return found


def proxy_correlation(
    entries: Sequence[Entry], harm: np.ndarray, steps: StepSchedule, widths: Sequence[float]
) -> float | None:
    """Spearman's rank correlation of the importance proxy with the distance.

    Args:
        entries: trials.
        harm: float (W, steps), of `ImportanceTable.harm`, or (W, 2 · steps), of `guided_harm`.
        steps: the schedule that `harm` is of.
        widths: the model's, widest first.

    Returns:
        In [-1, 1]; None where fewer than three schedules skip no step, or all are alike.
    """
    from scipy.stats import spearmanr

    proxies, distances = [], []
    for entry in entries:
        schedule: dict[str, Any] = entry["schedule"]
        if tuple(schedule["timesteps"]) == steps.timesteps:
            chosen = list(schedule["widths"])
            if harm.shape[1] > len(chosen):
                chosen += schedule.get("guidance_widths", chosen)
            rows = [widths.index(width) for width in chosen]
            proxies.append(float(harm[rows, np.arange(len(rows))].sum()))
            distances.append(entry["distance"])
    if len(set(proxies)) < 3 or len(set(distances)) < 3:
        return None
    return float(spearmanr(proxies, distances).statistic)
