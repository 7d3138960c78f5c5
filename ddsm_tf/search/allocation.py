"""Schedules straight from an effect table: the least harm for a given cost, without sampling.

Minimises Σ_k effect[w_k, k] + λ Σ_k cost[w_k] for a Lagrange multiplier λ, which a bisection fits
to the budget. Steps are independent unless switching widths has a price or runs have a least
length; then the minimum is found by dynamic programming over the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ddsm_tf.errors import invalid

BISECTIONS = 60


def allocate(
    effect: np.ndarray,
    cost: Sequence[float],
    budget: float,
    *,
    calls: Sequence[int] | None = None,
    switch_penalty: float = 0.0,
    min_run: int = 1,
) -> tuple[int, ...]:
    """The width of each step that does the least harm within a budget.

    Args:
        effect: float (W, K), harm of width w at step k; a row a width, widest first.
        cost: (W,), cost of a call at each width.
        budget: share of the cost of K steps at the widest width, in (0, 1].
        calls: (K,), calls of each step; one if left out.
        switch_penalty: harm added for each change of width.
        min_run: fewest steps at one width before it may change.

    Returns:
        (K,) indices of widths. Where even the cheapest choice is over the budget, that choice. It
        does the least harm of all that cost no more, but may leave some of the budget unspent:
        steps whose effects are equal change together.

    Raises:
        InputError: shapes do not fit, or an argument leaves its range.
    """
    effect, cost = np.asarray(effect, float), np.asarray(cost, float)
    calls = np.ones(effect.shape[-1]) if calls is None else np.asarray(calls, float)
    _check(effect, cost, budget, calls, switch_penalty, min_run)
    costs = np.outer(cost, calls)
    # What no choice can avoid changes nothing and would drown small differences in rounding.
    effect = effect - effect.min(axis=0)
    limit = budget * costs[0].sum()
    tolerance = 1e-9 * limit

    def solve(multiplier: float) -> tuple[int, ...]:
        harm = effect + multiplier * costs
        if switch_penalty == 0.0 and min_run == 1:
            return tuple(map(int, harm.argmin(axis=0)))
        return _shortest_path(harm, switch_penalty, min(min_run, effect.shape[1]))

    def is_within(choice: tuple[int, ...]) -> bool:
        return costs[list(choice), np.arange(len(choice))].sum() <= limit + tolerance

    best = solve(0.0)
    if is_within(best):
        return best
    # Beyond this multiplier the cheapest width wins at every step.
    high = 2.0 * (np.ptp(effect) + switch_penalty) * effect.shape[1] / _least_saving(cost)
    # Where all widths do the same harm, any multiplier will do.
    low, high = 0.0, high or 1.0
    best = solve(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        choice = solve(middle)
        if is_within(choice):
            high, best = middle, choice
        else:
            low = middle
    return best


def _least_saving(cost: np.ndarray) -> float:
    """The smallest positive difference between two costs."""
    differences = np.abs(cost[:, None] - cost[None, :])
    return float(differences[differences > 0].min(initial=np.inf)) if len(cost) > 1 else 1.0


def _shortest_path(harm: np.ndarray, switch_penalty: float, min_run: int) -> tuple[int, ...]:
    """Least harm plus switching over all choices whose runs are at least `min_run` steps long.

    `total[w, k]` is the least harm of steps 0 … k when step k runs at w and its run may end there.
    A run either goes on by one step, or is new and `min_run` steps long.
    """
    widths, steps = harm.shape
    sums = np.concatenate([np.zeros((widths, 1)), np.cumsum(harm, axis=1)], axis=1)
    total = np.full((widths, steps), np.inf)
    # From where the run that ends at step k started: its first step, and the width before it.
    came_from = np.full((widths, steps, 2), -1)
    for k in range(min_run - 1, steps):
        first = k - min_run + 1
        new_run = sums[:, k + 1] - sums[:, first]
        previous = np.full(widths, -1)
        if first > 0:
            # For the best width itself this is no switch, but going on is then no worse.
            best = total[:, first - 1].argmin()
            previous[:] = best
            new_run = new_run + total[best, first - 1] + switch_penalty
        going_on = total[:, k - 1] + harm[:, k] if k else np.full(widths, np.inf)
        goes_on = going_on <= new_run
        total[:, k] = np.where(goes_on, going_on, new_run)
        starts = np.stack([np.full(widths, first), previous], axis=1)
        came_from[:, k] = np.where(goes_on[:, None], came_from[:, k - 1], starts)
    return _trace_back(came_from, int(total[:, -1].argmin()))


def _trace_back(came_from: np.ndarray, width: int) -> tuple[int, ...]:
    end, runs = came_from.shape[1], []
    while end > 0:
        first, previous = came_from[width, end - 1]
        runs.append([width] * (end - first))
        end, width = int(first), int(previous)
    return tuple(index for run in reversed(runs) for index in run)


def _check(
    effect: np.ndarray,
    cost: np.ndarray,
    budget: float,
    calls: np.ndarray,
    switch_penalty: float,
    min_run: int,
) -> None:
    if effect.ndim != 2 or 0 in effect.shape or cost.shape != effect.shape[:1]:
        rule = f"must have the shape (widths, steps), with {cost.size} widths as `cost` has"
        raise invalid("effect", f"shape {effect.shape}", rule)
    if not np.isfinite(effect).all():
        raise invalid("effect", f"shape {effect.shape}", "must be finite")
    if not (np.isfinite(cost) & (cost >= 0)).all():
        raise invalid("cost", cost.tolist(), "must be finite numbers of 0 or more")
    if calls.shape != effect.shape[1:] or not (np.isfinite(calls) & (calls >= 1)).all():
        rule = f"must be {effect.shape[1]} numbers of 1 or more, one for each step"
        raise invalid("calls", calls.tolist(), rule)
    if not 0.0 < budget <= 1.0:
        raise invalid("budget", budget, "must lie in (0, 1]")
    if not 0.0 <= switch_penalty < np.inf:
        raise invalid("switch_penalty", switch_penalty, "must be a number of 0 or more")
    if min_run < 1:
        raise invalid("min_run", min_run, "must be at least 1")
