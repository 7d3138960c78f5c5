"""Pareto fronts, hypervolume, and the file that keeps a front."""

import json

import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search import front_ranks, hypervolume, pareto_entries, read_pareto
from ddsm_tf.search.pareto import write_pareto

SCHEDULE = StepSchedule.uniform(0.5, (500, 0)).to_dict()


def entry(distance, macs, **fields):
    numbers = {"distance": distance, "macs": macs, "macs_fraction": macs / 10, "seconds": 0.1}
    return {"schedule": SCHEDULE, **numbers, **fields}


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


def test_the_front_and_all_baselines_are_kept_in_order_of_cost():
    entries = [
        entry(5.0, 10, baseline="full"),
        entry(9.0, 8, baseline="random"),
        entry(4.0, 6),
        entry(7.0, 7),
        entry(8.0, 1),
    ]
    kept = pareto_entries(entries)
    assert [(e["distance"], e.get("baseline")) for e in kept] == [
        (8.0, None),
        (4.0, None),
        (9.0, "random"),
        (5.0, "full"),
    ]


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
