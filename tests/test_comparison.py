"""How good a search was, against numbers worked out by hand."""

import numpy as np
import pytest

from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.comparison import (
    all_calls,
    at_equal_cost,
    baselines_at_equal_cost,
    cheaper_within,
    hypervolume_at_calls,
    hypervolume_curve,
    hypervolume_reference,
    hypervolume_share,
    points,
    proxy_correlation,
)

STEPS = StepSchedule.uniform(1.0, (500, 0))
REFERENCE = np.array([10.0, 8.0])


def entry(distance, cost, baseline=None, full_calls=3.0, reused=1.0, steps=STEPS):
    named = {} if baseline is None else {"baseline": baseline}
    return {
        "schedule": steps.to_dict(),
        "distance": distance,
        "cost": cost,
        "full_calls": full_calls,
        "reused_full_calls": reused,
        **named,
    }


def test_points_and_calls_of_entries():
    entries = [entry(5.0, 2.0), entry(4.0, 3.0, full_calls=2.5, reused=0.75)]
    assert points(entries) == [(5.0, 2.0), (4.0, 3.0)]
    assert [all_calls(one) for one in entries] == [4.0, 3.25]


def test_the_reference_is_the_worst_of_the_uniform_schedules():
    entries = [
        entry(5.0, 8.0, "full"),
        entry(7.0, 4.0, "uniform:0.5"),
        entry(10.0, 2.0, "uniform:0.25"),
        entry(30.0, 7.0, "random"),
        entry(9.0, 9.0, "ramp:0.5"),
        entry(40.0, 40.0),
    ]
    assert hypervolume_reference(entries).tolist() == [10.0, 8.0]


def test_the_share_is_of_the_whole_area_up_to_the_reference():
    # (4, 6) beats 6 × 2 of 80; (7, 2) adds 3 × 4 below it; (2, 9) is too dear.
    assert hypervolume_share([entry(4.0, 6.0)], REFERENCE) == pytest.approx(12 / 80)
    some = [entry(4.0, 6.0), entry(7.0, 2.0), entry(2.0, 9.0), entry(8.0, 7.0)]
    assert hypervolume_share(some, REFERENCE) == pytest.approx(24 / 80)
    assert hypervolume_share([entry(0.0, 0.0)], REFERENCE) == 1.0


def test_the_curve_has_the_first_trials_of_some_counts_and_all():
    entries = [
        *[entry(9.0, 7.0)] * 4,  # 1 × 1
        entry(4.0, 6.0),  # the fifth: 6 × 2
        *[entry(4.0, 6.0)] * 5,
        entry(7.0, 2.0),  # the eleventh: 3 × 4 more
        entry(1.0, 9.0),
    ]
    curve = hypervolume_curve(entries, REFERENCE)
    assert [row["trials"] for row in curve] == [5, 10, 12]
    assert [row["full_calls"] for row in curve] == [20.0, 40.0, 48.0]
    assert [row["hypervolume"] for row in curve] == pytest.approx([12 / 80, 12 / 80, 24 / 80])
    assert [row["trials"] for row in hypervolume_curve(entries[:5], REFERENCE)] == [5]
    assert [row["trials"] for row in hypervolume_curve(entries[:2], REFERENCE)] == [2]


def test_trials_count_as_long_as_their_calls_do_not_exceed_the_limit():
    entries = [entry(9.0, 7.0), entry(4.0, 6.0, full_calls=0.5, reused=1.5), entry(7.0, 2.0)]
    # Spent after each: 4, 6, 10.
    shares = {3.9: 0.0, 4.0: 1 / 80, 5.9: 1 / 80, 6.0: 12 / 80, 9.9: 12 / 80, 1e9: 24 / 80}
    found = {limit: hypervolume_at_calls(entries, REFERENCE, limit) for limit in shares}
    assert found == pytest.approx(shares)


def test_what_was_spent_before_the_trials_counts():
    entries = [entry(9.0, 7.0), entry(4.0, 6.0), entry(7.0, 2.0)]
    curve = hypervolume_curve(entries, REFERENCE, 5.0)
    assert [row["full_calls"] for row in curve] == [17.0]
    first_two = hypervolume_share(entries[:2], REFERENCE)
    assert hypervolume_at_calls(entries, REFERENCE, 13.0, 5.0) == first_two
    assert hypervolume_at_calls(entries, REFERENCE, 4.9, 5.0) == 0.0


def test_calls_that_differ_by_rounding_are_the_same():
    # 0.1 + 0.2 is more than 0.3 by rounding alone.
    some = [entry(9.0, 7.0, full_calls=0.1, reused=0), entry(4.0, 6.0, full_calls=0.2, reused=0)]
    assert hypervolume_at_calls(some, REFERENCE, 0.3) == pytest.approx(12 / 80)


FOUND = [entry(8.0, 2.0), entry(6.0, 4.0), entry(6.5, 5.0), entry(3.0, 7.0)]


def test_at_equal_cost_the_best_that_is_no_dearer_counts():
    assert at_equal_cost(FOUND, entry(10.0, 5.5)) == 0.6
    assert at_equal_cost(FOUND, entry(10.0, 4.0)) == 0.6
    assert at_equal_cost(FOUND, entry(10.0, 3.999)) == 0.8
    assert at_equal_cost(FOUND, entry(2.0, 9.0)) == 1.5
    assert at_equal_cost(FOUND, entry(10.0, 1.9)) is None
    # Sums of the same costs in another order.
    assert at_equal_cost([entry(1.0, 0.1 + 0.2)], entry(2.0, 0.3)) == 0.5


def test_baselines_are_compared_by_kind():
    baselines = [
        entry(6.0, 9.0, "full"),  # left out
        entry(10.0, 1.0, "uniform:0.25"),  # nothing found is as cheap
        entry(6.0, 4.0, "uniform:0.5"),  # 6 / 6: not beaten
        entry(12.0, 6.0, "random"),  # 6 / 12
        entry(10.0, 2.5, "random"),  # 8 / 10
        entry(4.0, 2.0, "random"),  # 8 / 4
        entry(7.0, 5.0, "ramp:0.5"),
        entry(5.0, 4.0, "ramp:0.25"),
    ]
    assert baselines_at_equal_cost(FOUND, baselines) == {
        "uniform": {"count": 1, "beaten": 0.0, "median_ratio": 1.0},
        "random": {"count": 3, "beaten": pytest.approx(2 / 3), "median_ratio": 0.8},
        "ramp": {"count": 2, "beaten": 0.5, "median_ratio": pytest.approx((6 / 7 + 6 / 5) / 2)},
    }


EFFECT = np.array([[0.0, 0.0], [1.0, 10.0], [2.0, 30.0]])
WIDTHS = (1.0, 0.5, 0.25)


def correlation(distances, *, effect=EFFECT, also=()):
    # Proxies 0, 1, 10, 11 and 32.
    some = [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (0.25, 0.25)]
    entries = [
        entry(distance, 1.0, steps=STEPS.with_widths(widths))
        for distance, widths in zip(distances, some, strict=False)
    ]
    return proxy_correlation([*entries, *also], effect, STEPS, WIDTHS)


def test_what_a_tolerance_would_save_is_listed_where_it_saves_more():
    entries = [
        entry(10.0, 8.0, "full"),
        entry(9.0, 7.0),
        entry(10.1, 6.0),
        entry(10.3, 4.0),
        entry(11.5, 2.0, "uniform:0.5"),
        entry(30.0, 1.0),
    ]
    # 1 % takes the third, 2 % nothing more, 5 % the fourth, 10 % nothing more, 20 % the fifth.
    assert cheaper_within(entries, 7.0) == [
        {"tolerance": 0.01, "cost_fraction": 0.75},
        {"tolerance": 0.05, "cost_fraction": 0.5},
        {"tolerance": 0.2, "cost_fraction": 0.25},
    ]
    assert [each["tolerance"] for each in cheaper_within(entries, 4.0)] == [0.2]
    assert cheaper_within(entries, 2.0) == []
    assert cheaper_within(entries, 8.0, (0.0, 0.02)) == [
        {"tolerance": 0.0, "cost_fraction": 0.875},
        {"tolerance": 0.02, "cost_fraction": 0.75},
    ]


def test_the_proxys_rank_correlation():
    assert correlation([1, 2, 3, 4, 5]) == pytest.approx(1.0)
    assert correlation([5, 4, 3, 2, 1]) == pytest.approx(-1.0)
    # Spearman: 1 - 6 Σd² / (n (n² - 1)), here with d = 1, -1, 0, 0, 0.
    assert correlation([20, 10, 300, 301, 1e6]) == pytest.approx(1 - 6 * 2 / (5 * 24))
    # An effect that matters at the other step orders them 0, 10, 1, 11, 32.
    assert correlation([1, 2, 3, 4, 5], effect=EFFECT[:, ::-1]) == pytest.approx(0.9)


def test_schedules_that_skip_steps_have_no_proxy():
    skipping = [entry(0.1, 1.0, steps=STEPS.with_steps((500,), (0.25,)))] * 3
    assert correlation([1, 2, 3, 4, 5], also=skipping) == pytest.approx(1.0)
    assert correlation([1, 2], also=skipping) is None


def test_too_few_or_equal_numbers_have_no_correlation():
    assert correlation([1, 2, 3]) == pytest.approx(1.0)
    assert correlation([1, 2]) is None
    assert correlation([7, 7, 7, 7]) is None
    assert correlation([1, 2, 3, 4], effect=np.zeros((3, 2))) is None
