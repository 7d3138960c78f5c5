"""An oracle that is called as its chief's servicer would: what is issued, lost, repeated, kept."""

import json
import time

import pytest
from keras_tuner.src.distribute import oracle_chief
from keras_tuner.src.engine import oracle as oracle_module
from search_stand_ins import Climber, Few, contents, lose, make_oracle, measure, report

from ddsm_tf.errors import InputError
from ddsm_tf.search import ScheduleTuner, distribution

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def oracle(tmp_path):
    """An oracle of two trials."""
    return make_oracle(tmp_path, max_trials=2)


@pytest.mark.parametrize("proposer", [Climber(), Few()])
def test_somebody_waits_till_the_last_trial_has_ended(tmp_path, proposer):
    # Either the trials or the space is used up.
    oracle = make_oracle(tmp_path, 2 if isinstance(proposer, Climber) else 9, proposer)
    first, last = oracle.create_trial("a"), oracle.create_trial("b")
    report(oracle, first)
    assert oracle.create_trial("a").status == "IDLE"
    assert oracle.tuner_ids == {"a", "b"}
    lose(oracle, "b")
    again = oracle.create_trial("a")
    assert (again.trial_id, again.status) == (last.trial_id, "RUNNING")
    report(oracle, again)
    assert oracle.create_trial("a").status == "STOPPED"
    assert oracle_chief.exit_chief(oracle)


def test_only_the_silent_are_lost(oracle):
    running, waiting = oracle.create_trial("a"), oracle.create_trial("b")
    for _ in range(20):
        oracle.count_silence(2.0, 30.0)
        oracle.get_trial(running.trial_id)
    assert oracle.tuner_ids == {"a"} and list(oracle.ongoing_trials) == ["a"]
    assert oracle.create_trial("c").trial_id == waiting.trial_id


def test_a_search_alone_loses_nobody(oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(distribution, "TICK", 0.01)
    counted = []
    monkeypatch.setattr(oracle, "count_silence", lambda *_: counted.append(1))
    tuner = ScheduleTuner(oracle, lambda s: time.sleep(0.1) or measure(s), tmp_path)
    tuner.search()
    assert len(contents(tmp_path)) == 2 and not counted


def test_who_returns_from_the_dead_is_counted_once(oracle):
    trial = oracle.create_trial("a")
    lose(oracle, "a")
    assert oracle.create_trial("b").trial_id == trial.trial_id
    # Both have run it before either has reported.
    oracle.update_trial(trial.trial_id, {"distance": 9.0, "cost": 9.0})
    report(oracle, trial)
    measured = measure(oracle.schedule(trial))
    assert oracle.results() == {oracle.genome(trial): (measured["distance"], measured["cost"])}
    recorded = json.dumps(trial.get_state())
    report(oracle, trial)
    assert oracle.end_order == [trial.trial_id] and oracle._retry_queue == []
    assert json.dumps(oracle.trials[trial.trial_id].get_state()) == recorded
    assert oracle.create_trial("b").trial_id != trial.trial_id


def test_who_returns_before_another_took_the_trial_has_ended_it(oracle):
    trial = oracle.create_trial("a")
    lose(oracle, "a")
    report(oracle, trial)
    assert oracle._retry_queue == [] and oracle.end_order == [trial.trial_id]
    assert oracle.create_trial("b").trial_id != trial.trial_id


def test_a_restarted_worker_gets_its_own_trial_again(oracle):
    trial = oracle.create_trial("a")
    assert oracle.create_trial("a") is trial
    report(oracle, trial)
    report(oracle, trial)
    assert oracle.end_order == [trial.trial_id]
    assert oracle.create_trial("a").trial_id != trial.trial_id


def test_a_reloaded_oracle_takes_the_result_of_a_trial_that_still_runs(oracle, tmp_path):
    trial = oracle.create_trial("a")
    reloaded = make_oracle(tmp_path, max_trials=2)
    assert reloaded._retry_queue == [trial.trial_id]
    report(reloaded, trial)
    report(reloaded, trial)
    assert reloaded._retry_queue == [] and reloaded.end_order == [trial.trial_id]
    assert reloaded.create_trial("a").trial_id != trial.trial_id


def test_an_unknown_trial_is_passed_over(oracle):
    unknown = oracle_module.trial_module.Trial(oracle.get_space(), "7", "COMPLETED")
    assert not oracle.get_trial("7").metrics.exists("distance")
    oracle.update_trial("7", {"distance": 1.0, "cost": 1.0})
    oracle.end_trial(unknown)
    assert oracle.trials == {} and oracle.end_order == []


def test_a_trial_cut_short_by_a_full_disk_ends_and_keeps_no_lock(oracle, monkeypatch):
    trial = oracle.create_trial("a")

    def full(trial):
        if trial.status == "COMPLETED":
            raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(oracle, "_save_trial", full)
        with pytest.raises(OSError, match="no space"):
            report(oracle, trial)
    assert not oracle_module.LOCKS[oracle].locked()
    assert oracle_module.THREADS[oracle] is None
    report(oracle, trial)
    assert oracle.end_order == [trial.trial_id]
    assert oracle.create_trial("a").trial_id != trial.trial_id


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"distance": 1.0}, "must return a `cost`"),
        ({"distance": float("nan"), "cost": 1.0}, "`distance` \\(=nan\\) must be finite"),
    ],
)
def test_a_broken_measurement_ends_the_search(oracle, tmp_path, result, message):
    with pytest.raises(InputError, match=message):
        ScheduleTuner(oracle, lambda schedule: result, tmp_path).search()


def test_distance_and_cost_are_all_that_a_trial_needs(oracle, tmp_path):
    ScheduleTuner(oracle, lambda schedule: {"distance": 1, "cost": 2}, tmp_path).search()
    assert list(oracle.results().values()) == [(1.0, 2.0)] * 2
