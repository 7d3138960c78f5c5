"""What a search reports beside its front: noise, hypervolumes, calls (`search/result.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddsm_tf.cost import schedule_cost
from ddsm_tf.search import comparison
from ddsm_tf.search.importance import ImportanceTable
from ddsm_tf.search.pareto import Entry, full_width_entry
from ddsm_tf.search.search import Confirmation, Confirmer
from ddsm_tf.training.search_problem import SearchProblem

FLOOR_SAMPLES = 4
# The methods that the importance table serves.
WITH_TABLE = ("nsga2", "importance")


def search_result(
    problem: SearchProblem,
    methods: Mapping[str, list[Entry]],
    confirm: Confirmer,
    full: Confirmation,
    chosen: Confirmation,
) -> dict[str, Any]:
    """The content of `result.json`.

    Args:
        problem: what was searched.
        methods: name → its trials.
        confirm: holds what the confirmation measured.
        full, chosen: confirmed.
    """
    every = [entry for entries in methods.values() for entry in entries]
    reference = comparison.hypervolume_reference(every)
    full_cost = full_width_entry(every)["cost"]
    fewest_trials = min(map(len, methods.values()))
    table = importance_calls(problem.importance, problem.macs)
    before = {name: table["full_calls"] if name in WITH_TABLE else 0.0 for name in methods}
    fewest_calls = min(
        before[name] + sum(map(comparison.all_calls, entries)) for name, entries in methods.items()
    )
    found = methods.get("nsga2", [])
    others = [entry for entry in every if "baseline" in entry]
    spent = {name: _calls(entries) for name, entries in methods.items()}
    spent["confirmation"] = _calls(confirm.measurements)
    images = problem.run.load_data().images
    return {
        "distance_name": problem.evaluate.distance.name,
        "cost": problem.options.cost.partition(":")[0],
        "chosen_distance": chosen.mean,
        "chosen_spread": chosen.spread,
        "full_distance": full.mean,
        "full_spread": full.spread,
        "difference": chosen.difference(full)[0],
        "difference_error": chosen.difference(full)[1],
        "cheaper_within": comparison.cheaper_within(
            every, schedule_cost(chosen.schedule, problem.cost)
        ),
        "floor": _floor(problem, images, problem.images),
        "confirm_floor": _floor(problem, images, confirm.images),
        "images": problem.images,
        "confirm_images": confirm.images,
        "confirm_seeds": list(confirm.seeds),
        "trials": [
            {
                "distance": entry["distance"],
                "cost_fraction": entry["cost"] / full_cost,
                "method": name,
            }
            for name, entries in methods.items()
            for entry in entries
        ],
        "hypervolume": {
            name: comparison.hypervolume_curve(entries, reference, before[name])
            for name, entries in methods.items()
        },
        "equal_trials": {
            "trials": fewest_trials,
            "hypervolume": {
                name: comparison.hypervolume_share(entries[:fewest_trials], reference)
                for name, entries in methods.items()
            },
        },
        "equal_calls": {
            "full_calls": fewest_calls,
            "hypervolume": {
                name: comparison.hypervolume_at_calls(
                    entries, reference, fewest_calls, before[name]
                )
                for name, entries in methods.items()
            },
        },
        "equal_cost": comparison.baselines_at_equal_cost(found, others),
        "proxy_rank_correlation": comparison.proxy_correlation(
            every, problem.harm, problem.base, problem.model.unet.widths
        ),
        "calls": {**spent, "importance": table},
    }


def cheaper_note(result: Mapping[str, Any]) -> str:
    """What a tolerance would save beyond the choice, in words; empty where there is nothing."""
    some = result.get("cheaper_within", [])
    if not some:
        return ""
    offers = ", ".join(
        f"{100 * (1 - offer['cost_fraction']):.0f} % within {100 * offer['tolerance']:.0f} %"
        for offer in some
    )
    return (
        f"more of the cost can be saved farther from full width, by the trials alone: {offers}; "
        "`--resume --tolerance SHARE` confirms and chooses it"
    )


def _calls(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Sums of calls over trials or confirmations."""
    keys = ("calls", "reused_calls", "full_calls", "reused_full_calls")
    return {key: sum(entry[key] for entry in entries) for key in keys}


def importance_calls(table: ImportanceTable, macs: Mapping[float, float]) -> dict[str, float]:
    """What measuring a table took, in calls of the network and weighted by their MACs."""
    each = table.images * len(table.timesteps)
    full = sum(each * macs[width] / macs[max(macs)] for width in table.widths)
    calls = float(each * len(table.widths))
    return {"calls": calls, "reused_calls": 0.0, "full_calls": full, "reused_full_calls": 0.0}


def _floor(problem: SearchProblem, images: np.ndarray, count: int) -> float:
    """The distance of so many real images: no schedule can be expected below it with as many.

    Drawn with replacement, for the set may be smaller.
    """
    distances = []
    for sample in range(FLOOR_SAMPLES):
        random = np.random.default_rng([problem.options.seed, sample])
        rows = random.choice(len(images), size=count)
        distances.append(problem.evaluate.distance(images[rows]))
    return float(np.mean(distances))
