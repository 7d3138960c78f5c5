"""Pareto fronts, hypervolume, and the file that keeps a front."""

import json

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search import front_ranks, hypervolume, pareto_entries, read_pareto
from ddsm_tf.search.pareto import hypervolume_gain, pick_by_hypervolume, write_pareto

SCHEDULE = StepSchedule.uniform(0.5, (500, 0)).to_dict()


def entry(distance, macs, **fields):
    """An entry with a schedule of its own, unless one is given."""
    numbers = {"distance": distance, "macs": macs, "macs_fraction": macs / 10, "seconds": 0.1}
    own = StepSchedule.uniform(0.5, (100 + int(10 * distance), int(macs))).to_dict()
    return {"schedule": own, **numbers, **fields}


def names(entries):
    return [(e["distance"], e.get("baseline")) for e in entries]


def test_front_ranks_of_a_known_set():
    points = [(1, 5), (2, 2), (5, 1), (3, 3), (4, 4), (2, 5)]
    assert front_ranks(points) == [0, 0, 0, 1, 2, 1]
    assert front_ranks([]) == []


def test_equal_points_share_a_front():
    assert front_ranks([(1, 1), (1, 1), (2, 2)]) == [0, 0, 1]


def test_hypervolume_is_the_area_that_the_points_beat():
    # (1, 3) beats 3 × 1 up to (4, 4); (2, 1) adds 2 × 2 below it.
    assert hypervolume([(1, 3), (2, 1)], (4, 4)) == pytest.approx(3 * 1 + 2 * 2)
    assert hypervolume([(5, 0)], (4, 4)) == 0.0


@pytest.mark.parametrize("size", [1, 2, 12])
def test_the_gain_is_what_a_point_adds_to_the_hypervolume(size):
    random = np.random.default_rng(size)
    gaining = 0
    for _ in range(20):
        # Some of the front and of the points lie beyond the reference, some coincide.
        front = random.uniform(0.0, 4.5, (size, 2)).round(1)
        points = np.concatenate([random.uniform(0.0, 4.5, (15, 2)).round(1), front])
        reference = random.uniform(3.0, 4.0, 2)
        before = hypervolume(front, reference)
        expected = [hypervolume([*front, point], reference) - before for point in points]
        found = hypervolume_gain(points, front, reference)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        # What is there already adds exactly nothing.
        assert not found[15:].any()
        gaining += np.count_nonzero(found)
    assert gaining > 40


def test_the_gain_over_no_front_is_the_area_up_to_the_reference():
    gains = hypervolume_gain(np.array([(1, 3), (2, 1), (5, 0)]), np.empty((0, 2)), (4, 4))
    assert gains.tolist() == [3.0, 6.0, 0.0]


def greedy(points, found, count):
    """Picks one after the other by the hypervolume itself."""
    picked, reference = [], found.max(axis=0)
    while len(picked) < count:
        before = hypervolume([*found, *points[picked]], reference)
        areas = [
            hypervolume([*found, *points[[*picked, k]]], reference) for k in range(len(points))
        ]
        if max(areas) - before < 1e-12:
            break
        picked.append(int(np.argmax(areas)))
    return picked


@pytest.mark.parametrize("count", [1, 4, 30])
def test_points_are_picked_one_after_the_other(count):
    random, picks = np.random.default_rng(7), 0
    for _ in range(8):
        points, found = random.uniform(0.0, 3.0, (25, 2)), random.uniform(1.0, 4.0, (6, 2))
        picked = pick_by_hypervolume(points, found, count)
        assert picked == greedy(points, found, count)
        picks += len(picked)
        # Thirty of twenty-five there are not; it stops where nothing adds anything.
        assert len(picked) < 15
    assert picks >= 8 * min(count, 2)


def test_a_point_that_another_pick_covers_is_passed_over():
    found = np.array([(4.0, 0.0), (0.0, 4.0)])
    # The second alone would add more than the third, but lies behind the first.
    points = np.array([(1.0, 1.0), (1.1, 1.1), (3.0, 0.5)])
    assert hypervolume_gain(points, found, (4, 4)).tolist() == pytest.approx([9, 2.9**2, 3.5])
    assert pick_by_hypervolume(points, found, 3) == [0, 2]
    assert pick_by_hypervolume(points[[1, 1]], found, 5) == [0]
    assert pick_by_hypervolume(np.array([(5.0, 1.0), (4.0, 4.0)]), found, 2) == []
    assert pick_by_hypervolume(points, found, 0) == []


def test_the_front_and_all_baselines_are_kept_in_order_of_cost():
    entries = [
        entry(5.0, 10, baseline="full"),
        entry(9.0, 8, baseline="random"),
        entry(4.0, 6),
        entry(7.0, 7),
        entry(8.0, 1),
    ]
    assert names(pareto_entries(entries)) == [
        (8.0, None),
        (4.0, None),
        (9.0, "random"),
        (5.0, "full"),
    ]


def test_of_a_kind_of_baseline_the_front_is_kept_and_of_uniform_ones_all():
    entries = [
        entry(1.0, 1),  # dominates all others
        entry(5.0, 10, baseline="full"),
        entry(6.0, 11, baseline="uniform:0.5"),  # dominated by full, and kept
        entry(7.0, 12, baseline="uniform:0.25"),
        entry(8.0, 4, baseline="random"),
        entry(9.0, 5, baseline="random"),  # dominated by its own kind
        entry(7.0, 6, baseline="random"),
        entry(9.5, 5.5, baseline="ramp:0.5"),  # dominated by another kind only
        entry(9.6, 6.5, baseline="ramp:0.25"),  # a kind is the name up to the colon
        entry(2.0, 2),
    ]
    assert names(pareto_entries(entries)) == [
        (1.0, None),
        (8.0, "random"),
        (9.5, "ramp:0.5"),
        (7.0, "random"),
        (5.0, "full"),
        (6.0, "uniform:0.5"),
        (7.0, "uniform:0.25"),
    ]


def test_a_schedule_is_kept_once_and_with_its_name():
    entries = [
        entry(4.0, 6, schedule=SCHEDULE),
        entry(4.0, 6, schedule=SCHEDULE, baseline="random"),
        entry(4.0, 6, schedule=SCHEDULE),
        entry(3.0, 7),
    ]
    for some in (entries, entries[::-1]):
        assert names(pareto_entries(some)) == [(4.0, "random"), (3.0, None)]
    # Measured twice, with other noise: the baseline's numbers stand.
    again = [entry(3.5, 6, schedule=SCHEDULE), *entries[1:2]]
    assert names(pareto_entries(again)) == [(4.0, "random")]
    named = [entry(5.0, 9, schedule=SCHEDULE, baseline=name) for name in ("ramp:0.5", "full")]
    assert names(pareto_entries(named)) == [(5.0, "full")]


def test_a_front_member_that_is_a_baseline_is_kept_once():
    entries = [entry(4.0, 6, baseline="random"), entry(5.0, 9, baseline="full"), entry(8.0, 8)]
    assert names(pareto_entries(entries)) == [(4.0, "random"), (5.0, "full")]


def test_equal_costs_stand_in_order_of_distance():
    entries = [
        entry(6.0, 5, baseline="uniform:0.5"),
        entry(4.0, 5),
        entry(5.0, 5, baseline="full"),
        entry(9.0, 2),
    ]
    assert [e["distance"] for e in pareto_entries(entries)] == [9.0, 4.0, 5.0, 6.0]
    assert pareto_entries([]) == []


def test_another_cost_makes_another_front():
    entries = [entry(4.0, 6, cost=9.0), entry(5.0, 7, cost=1.0)]
    assert len(pareto_entries(entries)) == 1
    assert [e["distance"] for e in pareto_entries(entries, "cost")] == [5.0, 4.0]


def test_the_file_is_read_as_written(tmp_path):
    entries = [entry(8.0, 1), entry(5.0, 10, baseline="full")]
    write_pareto(tmp_path / "pareto.json", entries)
    assert read_pareto(tmp_path / "pareto.json") == entries


BROKEN = {
    "not a list": {"a": 1},
    "object": [3],
    "distance": [{**entry(1.0, 1), "distance": "low"}],
    "macs_fraction": [{**entry(1.0, 1), "macs_fraction": -0.1}],
    "seconds": [{key: value for key, value in entry(1.0, 1).items() if key != "seconds"}],
    "baseline": [entry(1.0, 1, baseline=3)],
    "timesteps": [entry(1.0, 1, schedule={**SCHEDULE, "timesteps": [0, 500]})],
    "schedule": [entry(1.0, 1, schedule=None)],
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_file_is_refused(tmp_path, rule):
    path = tmp_path / "pareto.json"
    path.write_text(json.dumps(BROKEN[rule]))
    with pytest.raises(InputError, match=rule.removeprefix("not a ")):
        read_pareto(path)
