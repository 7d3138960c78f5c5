"""Widths from an effect table, against every choice there is."""

import functools
import time
from itertools import groupby, product

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.search.allocation import allocate

COST = (16.0, 9.0, 4.0, 1.0)
BUDGETS = (0.1, 0.4, 0.55, 0.7, 0.85, 1.0)


def random_tables(count, widths, steps, seed=0):
    """Effects in any order and costs in any order; the widest is not always the dearest."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield random.exponential(size=(widths, steps)), random.uniform(0.5, 3.0, widths)


def runs(choice):
    return [len(list(run)) for _, run in groupby(choice)]


def weigh(effect, cost, choices, switch_penalty=0.0):
    """(cost, harm) of each choice, (N, 2), by the definition."""
    choices = np.array(choices)
    harm = sum(effect[choices[:, k], k] for k in range(effect.shape[1]))
    harm = harm + switch_penalty * (choices[:, 1:] != choices[:, :-1]).sum(axis=1)
    return np.stack([np.take(cost, choices).sum(axis=1), harm], axis=1)


@functools.cache
def every_choice(widths, steps, min_run=1):
    """All choices that respect `min_run`."""
    choices = product(range(widths), repeat=steps)
    return [choice for choice in choices if min(runs(choice)) >= min_run]


def lower_hull(points):
    """The corners that minimise harm + λ cost for some λ ≥ 0, dearest first.

    From each corner the next is the one that costs the least harm for what it saves.
    """
    best = points[np.lexsort((points[:, 0], points[:, 1]))[0]]
    corners = [best]
    while (cheaper := points[points[:, 0] < corners[-1][0]]).size:
        price = (cheaper[:, 1] - corners[-1][1]) / (corners[-1][0] - cheaper[:, 0])
        # Of equal prices the farthest.
        corners.append(cheaper[np.lexsort((cheaper[:, 0], np.round(price, 12)))[0]])
    return np.array(corners)


def dearest_within(corners, limit):
    """The dearest corner of a hull within the limit, or the cheapest of all."""
    within = corners[corners[:, 0] <= limit * (1 + 1e-9)]
    return within[0] if len(within) else corners[-1]


def test_the_hull_of_known_points():
    # Of (3, 3) the way to (1, 4) is cheaper by way of (2, 3.2); (2, 6) and (2.5, 3.9) lie above.
    points = np.array([(3, 3), (4, 3), (2, 3.2), (1, 4), (2, 6), (2.5, 3.9), (5, 9)])
    assert lower_hull(points).tolist() == [[3, 3], [2, 3.2], [1, 4]]


OPTIONS = [(0.0, 1), (0.1, 1), (0.6, 1), (0.0, 2), (0.1, 3)]


@pytest.mark.parametrize(("switch_penalty", "min_run"), OPTIONS)
def test_no_choice_of_the_hull_is_better_within_the_budget(switch_penalty, min_run):
    mixed = 0
    for effect, cost in random_tables(12, widths=3, steps=8):
        choices = every_choice(3, 8, min_run)
        corners = lower_hull(weigh(effect, cost, choices, switch_penalty))
        for budget in BUDGETS:
            choice = allocate(effect, cost, budget, switch_penalty=switch_penalty, min_run=min_run)
            assert choice in choices
            found = weigh(effect, cost, [choice], switch_penalty)[0]
            expected = dearest_within(corners, budget * 8 * cost[0])
            np.testing.assert_allclose(found, expected, rtol=1e-9)
            mixed += len(set(choice)) > 1
    # Of 72 choices; if all were uniform, nothing would have been shown.
    assert mixed > 15


@pytest.mark.parametrize("min_run", [1, 2, 4, 9])
def test_without_a_budget_the_harm_is_the_least_there_is(min_run):
    for effect, _ in random_tables(20, widths=2, steps=9, seed=2):
        choice = allocate(effect, (2.0, 1.0), 1.0, switch_penalty=0.15, min_run=min_run)
        choices = every_choice(2, 9, min_run)
        assert choice in choices
        least = weigh(effect, (2.0, 1.0), choices, 0.15)[:, 1].min()
        found = weigh(effect, (2.0, 1.0), [choice], 0.15)[0, 1]
        assert found == pytest.approx(least, rel=1e-12)


def test_the_dynamic_program_without_penalty_is_the_choice_of_each_step():
    for effect, cost in random_tables(6, widths=4, steps=10, seed=3):
        plain = allocate(effect, cost, 0.6)
        # A penalty that decides nothing.
        assert allocate(effect, cost, 0.6, switch_penalty=1e-12) == plain


def test_a_choice_by_hand():
    effect = [[0, 0, 0], [1, 5, 2], [3, 9, 8]]
    cost = (4, 2, 1)
    # Prices of a unit saved: 1/2, 5/2, 1, then 2, 4, 6.
    budgets = {1.0: (0, 0, 0), 0.9: (1, 0, 0), 0.7: (1, 0, 1), 0.6: (2, 0, 1), 0.42: (2, 1, 1)}
    assert {budget: allocate(effect, cost, budget) for budget in budgets} == budgets
    assert allocate(effect, cost, 0.34) == (2, 2, 1)
    assert all(type(index) is int for index in allocate(effect, cost, 0.7))


def test_steps_of_more_calls_cost_more():
    # As Heun's: the last step is one call, which costs half of what the others do.
    effect, calls = [[0, 0, 0], [1, 4, 1]], (2, 2, 1)
    # Of 20, narrowing the first saves 6 for a harm of 1, the last 3 for 1, the second 6 for 4.
    assert allocate(effect, (4, 1), 0.56, calls=calls) == (1, 0, 1)
    assert allocate(effect, (4, 1), 0.54, calls=calls) == (1, 1, 1)
    assert allocate(effect, (4, 1), 0.7, calls=calls) == (1, 0, 0)
    # Between steps of equal calls the first and the last are alike.
    assert allocate(effect, (4, 1), 0.7) == (1, 0, 1)
    with pytest.raises(InputError, match=r"`calls` .* must be 3 numbers of 1 or more"):
        allocate(effect, (4, 1), 0.7, calls=(2, 1))


def test_a_budget_that_is_met_exactly_is_met():
    # Half of 4 × 0.3 is 0.6, and 0.1 + 0.1 + 0.1 + 0.3 is more than that by rounding alone.
    assert sum((0.1, 0.1, 0.1, 0.3)) > 0.5 * 4 * 0.3
    assert allocate([[0, 0, 0, 0], [1, 2, 3, 9]], (0.3, 0.1), 0.5) == (1, 1, 1, 0)


@pytest.mark.parametrize("options", [{}, {"switch_penalty": 0.1}, {"min_run": 3}])
def test_a_budget_below_the_cheapest_gives_the_cheapest(options):
    effect = np.random.default_rng(0).random((4, 6))
    assert allocate(effect, COST, 0.01, **options) == (3,) * 6
    # The cheapest need not be the narrowest.
    assert allocate(effect, (16.0, 9.0, 1.0, 4.0), 0.01, **options) == (2,) * 6


@pytest.mark.parametrize("options", [{}, {"switch_penalty": 0.1}, {"min_run": 2}])
def test_a_dear_narrow_width_is_taken_only_for_its_effect(options):
    # Width 1 costs more than the widest and harms more; width 2 is cheap.
    effect = np.array([[0.0] * 4, [0.5] * 4, [0.1, 0.1, 2.0, 2.0]])
    cost = (4.0, 5.0, 1.0)
    assert allocate(effect, cost, 1.0, **options) == (0, 0, 0, 0)
    assert allocate(effect, cost, 0.7, **options) == (2, 2, 0, 0)


@pytest.mark.parametrize("harm", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("options", [{}, {"switch_penalty": 0.1}, {"min_run": 2}])
def test_widths_that_do_the_same_harm_are_told_apart_by_cost(harm, options):
    for scale in (1.0, 1e9, 1e-9):
        cost = np.array(COST) * scale
        assert allocate(np.full((4, 6), harm), cost, 0.5, **options) == (3,) * 6


def test_equal_costs_are_told_apart_by_harm():
    effect = [[1.0, 0.0, 3.0], [0.0, 1.0, 2.0]]
    assert allocate(effect, (2.0, 2.0), 1.0) == (1, 0, 1)
    # No choice is within this budget; all are equally cheap.
    assert allocate(effect, (2.0, 2.0), 0.5) == (1, 0, 1)


def test_one_width_and_one_step():
    assert allocate([[0.3, 0.2]], (5.0,), 0.5) == (0, 0)
    assert allocate([[0.3, 0.2]], (5.0,), 1.0, switch_penalty=1.0, min_run=2) == (0, 0)
    assert allocate([[0.0], [1.0]], (2.0, 1.0), 0.5, min_run=4) == (1,)


def test_a_table_of_a_thousand_steps_takes_no_time():
    effect = np.random.default_rng(0).exponential(size=(4, 1000)) * [[0], [1], [2], [4]]
    started = time.process_time()
    shares = []
    for budget in np.linspace(0.1, 1.0, 20):
        choice = allocate(effect, COST, budget)
        shares.append(np.take(COST, choice).sum() / 16_000)
    assert time.process_time() - started < 2.0
    # Many steps leave little of a budget unspent.
    np.testing.assert_allclose(shares, np.linspace(0.1, 1.0, 20), atol=1e-3)


GOOD = {"effect": np.zeros((2, 3)), "cost": (2.0, 1.0), "budget": 0.5}
BROKEN = [
    ("effect", np.zeros(3)),
    ("effect", np.zeros((3, 3))),
    ("effect", np.zeros((2, 0))),
    ("effect", np.full((2, 3), np.nan)),
    ("effect", np.full((2, 3), np.inf)),
    ("cost", (1.0, -1.0)),
    ("cost", (np.inf, 1.0)),
    ("cost", (np.nan, 1.0)),
    ("budget", 0.0),
    ("budget", 1.01),
    ("budget", np.nan),
    ("switch_penalty", -0.1),
    ("switch_penalty", np.inf),
    ("switch_penalty", np.nan),
    ("min_run", 0),
]


@pytest.mark.parametrize(("argument", "value"), BROKEN)
def test_a_broken_argument_is_refused(argument, value):
    assert len(allocate(**GOOD)) == 3
    with pytest.raises(InputError, match=f"`{argument}`"):
        allocate(**{**GOOD, argument: value})
