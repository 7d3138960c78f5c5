"""The search engine: oracle, tuner, resume, choice. Evaluations are stand-ins."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.search import (
    Confirmation,
    Confirmer,
    Evolution,
    ScheduleOracle,
    ScheduleSpace,
    ScheduleTuner,
    choose,
    run_trials,
)
from ddsm_tf.search.search import _best_of_ranges, finished_trials, spaced, uniform_names

WIDTHS = (1.0, 0.75, 0.5, 0.25)
COSTS = {1.0: 16.0, 0.75: 9.0, 0.5: 4.0, 0.25: 1.0}


def make_space(segments=5, steps=10, widths=WIDTHS):
    base = StepSchedule.uniform(1.0, even_timesteps(1000, steps))
    return ScheduleSpace(base, widths, segments)


def evaluate(schedule, seed=0):
    """Narrow steps hurt late in sampling and hardly at its start; the seed adds a little."""
    weights = np.linspace(0.1, 2.0, len(schedule))
    distance = sum(w * (1 - width) for w, width in zip(weights, schedule.widths, strict=True))
    cost = sum(COSTS[width] for width in schedule.widths)
    distance += 5.0 + 0.1 * np.sin(seed)
    full = len(schedule) * COSTS[1.0]
    return {
        "distance": distance,
        "cost": cost,
        "macs": cost,
        "macs_fraction": cost / full,
        "seconds": 0.1,
    }


def make_evolution(seed=0, **options):
    return Evolution(make_space(), 8, seed, costs=COSTS, screening=2, **options)


def objectives(space, genome):
    result = evaluate(space.schedule(genome))
    return result["distance"], result["cost"]


def evolve(evolution, count):
    """Run `count` trials without Keras Tuner; returns the results in order."""
    results = {}
    while len(results) < count and (pending := evolution.pending(results)):
        results[pending[0]] = objectives(evolution.space, pending[0])
    return results


def test_trials_are_counted_exactly_and_baselines_are_named(tmp_path):
    evolution, calls = make_evolution(), []

    def counted(schedule):
        calls.append(schedule.widths)
        return evaluate(schedule)

    names = {**dict.fromkeys(evolution.random_genomes(), "random"), **uniform_names(make_space())}
    entries = run_trials(evolution, counted, trials=20, directory=tmp_path, name_baseline=names.get)
    assert len(calls) == len(set(calls)) == len(entries) == 20
    names = [entry.get("baseline") for entry in entries[:4]]
    assert names == ["full", "uniform:0.75", "uniform:0.5", "uniform:0.25"]
    assert sum(entry.get("baseline") == "random" for entry in entries) == 3
    assert entries[0]["distance"] == pytest.approx(5.0)
    assert entries[0]["macs_fraction"] == 1.0
    assert StepSchedule.from_dict(entries[3]["schedule"]).widths == (0.25,) * 10


def test_keras_tuner_runs_the_trials_that_plain_evolution_would(tmp_path):
    evolution = make_evolution(3)
    entries = run_trials(evolution, evaluate, trials=30, directory=tmp_path)
    expected = evolve(make_evolution(3), 30)
    found = [tuple(entry["schedule"]["widths"]) for entry in entries]
    assert found == [evolution.space.schedule(genome).widths for genome in expected]


def test_an_interrupted_search_repeats_no_finished_trial(tmp_path):
    calls = []

    def failing(schedule):
        calls.append(schedule.widths)
        if len(calls) == 13:
            raise OSError("no space left on device")
        return evaluate(schedule)

    def run(evaluation):
        evolution = make_evolution()
        return run_trials(evolution, evaluation, trials=24, directory=tmp_path / "a")

    with pytest.raises(OSError, match="no space left"):
        run(failing)
    entries = run(failing)
    # The thirteenth failed and ran again; all others ran once.
    assert len(calls) == 25 and len(set(calls)) == 24
    whole = run_trials(make_evolution(), evaluate, trials=24, directory=tmp_path / "b")
    assert entries == whole


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_search import evaluate, make_evolution, run_trials
from keras_tuner.engine import trial as trial_module
import ddsm_tf.search.oracle as oracle

done = []
save_trial = oracle.ScheduleOracle._save_trial

def save_and_die(self, trial):
    save_trial(self, trial)
    # Between the trial's own file and the oracle's, where Keras Tuner would forget the trial.
    if trial.status == "COMPLETED" and len(self.completed()) == 9:
        os.kill(os.getpid(), signal.SIGKILL)

oracle.ScheduleOracle._save_trial = save_and_die
run_trials(make_evolution(), evaluate, trials=20, directory={out!r})
"""


def test_kill_between_two_files_loses_no_trial(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-500:]
    calls = []

    def counted(schedule):
        calls.append(schedule.widths)
        return evaluate(schedule)

    evolution = make_evolution()
    entries = run_trials(evolution, counted, trials=20, directory=tmp_path)
    assert len(calls) == 11 and len(entries) == 20


def test_a_search_can_be_given_more_trials(tmp_path):
    first = run_trials(make_evolution(), evaluate, trials=9, directory=tmp_path)
    more = run_trials(make_evolution(), evaluate, trials=101, directory=tmp_path)
    assert more[:9] == first and len(more) == 101


def test_finished_trials_are_read_and_none_is_run(tmp_path):
    entries = run_trials(make_evolution(), evaluate, trials=9, directory=tmp_path)
    assert finished_trials(make_evolution(), tmp_path, {}.get) == entries
    assert finished_trials(make_evolution(), tmp_path / "nothing", {}.get) == []


def test_a_chief_with_nothing_left_to_hand_out_waits_for_nobody(tmp_path, monkeypatch):
    entries = run_trials(make_evolution(), evaluate, trials=9, directory=tmp_path)
    for name, value in (("TUNER_ID", "chief"), ("ORACLE_IP", "127.0.0.1"), ("ORACLE_PORT", "1")):
        monkeypatch.setenv(f"KERASTUNER_{name}", value)
    assert run_trials(make_evolution(), evaluate, trials=9, directory=tmp_path) == entries


def test_a_broken_trial_file_is_named(tmp_path):
    evolution = make_evolution()
    run_trials(evolution, evaluate, trials=4, directory=tmp_path)
    file = next(tmp_path.glob("trials/trial_*/trial.json"))
    file.write_text(file.read_text()[:40])
    with pytest.raises(InputError, match=r"trial.*not valid JSON.*delete .*, and it is run"):
        run_trials(evolution, evaluate, trials=8, directory=tmp_path)


def test_a_deleted_trial_is_run_again_and_no_other_is_lost(tmp_path):
    entries = run_trials(make_evolution(), evaluate, trials=20, directory=tmp_path)
    shutil.rmtree(tmp_path / "trials" / "trial_05")
    shutil.rmtree(tmp_path / "trials" / "trial_02")
    calls = []

    def counted(schedule):
        calls.append(schedule.widths)
        return evaluate(schedule)

    again = run_trials(make_evolution(), counted, trials=24, directory=tmp_path)
    assert calls[:2] == [tuple(entries[place]["schedule"]["widths"]) for place in (2, 5)]
    assert len(calls) == 6 and again[:20] == entries and len(again) == 24


def test_trials_that_cannot_be_proposed_again_are_named(tmp_path):
    run_trials(make_evolution(), evaluate, trials=20, directory=tmp_path)
    # One of the first generation and one that was bred from it.
    for number in ("03", "18"):
        shutil.rmtree(tmp_path / "trials" / f"trial_{number}")
    with pytest.raises(InputError, match="lacks trial 3, on which later ones depend"):
        run_trials(make_evolution(), evaluate, trials=24, directory=tmp_path)


def test_too_few_trials_for_the_baselines_are_refused(tmp_path):
    with pytest.raises(InputError, match="`trials` \\(=3\\) must be at least 4"):
        run_trials(make_evolution(), evaluate, trials=3, directory=tmp_path)


def test_workers_wait_for_a_generation_and_never_share_a_genome(tmp_path):
    oracle = ScheduleOracle(Evolution(make_space(), 4, seed=0, screening=0), max_trials=50)
    ScheduleTuner(oracle, evaluate, tmp_path)
    first = oracle.proposer.first_generation()
    trials = [oracle.create_trial(f"worker{k}") for k in range(len(first) + 1)]
    assert [trial.status for trial in trials] == ["RUNNING"] * len(first) + ["IDLE"]
    assert [oracle.genome(trial) for trial in trials[:-1]] == first
    for trial in trials[:-1]:
        result = objectives(oracle.proposer.space, oracle.genome(trial))
        metrics = {"distance": result[0], "cost": result[1], "multi_objective": sum(result)}
        oracle.update_trial(trial.trial_id, metrics)
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
    assert oracle.create_trial("worker0").status == "RUNNING"
    best = [oracle.genome(trial) for trial in oracle.get_best_trials(2)]
    assert best[0] == (0,) * 5


def entry(width, **fields):
    schedule = StepSchedule.uniform(width, even_timesteps(1000, 10))
    return {"schedule": schedule.to_dict(), **evaluate(schedule), **fields}


def confirmer(distances, tmp_path, calls=None):
    """Distances by width; the seeds 1 to 4 spread them by ±0.1."""

    def measure(schedule, seed, images):
        if calls is not None:
            calls.append((schedule.widths[0], seed))
        counted = dict.fromkeys(
            ("calls", "reused_calls", "full_calls", "reused_full_calls"), images
        )
        return {"distance": distances[schedule.widths[0]] + (-0.1 if seed % 2 else 0.1), **counted}

    return Confirmer(measure, (1, 2, 3, 4), 10, tmp_path / "confirmations.json")


def test_the_cheapest_confirmed_schedule_is_chosen(tmp_path):
    entries = [
        entry(0.25, distance=9.0),  # too far to be a candidate
        entry(0.5, distance=5.0),  # was lucky: the other seeds say 6, the first of them does
        entry(0.75, distance=5.1),
        entry(1.0, distance=5.0, baseline="full"),
    ]
    calls = []
    distances = {0.25: 5.0, 0.5: 6.0, 0.75: 4.99, 1.0: 5.0}
    full, chosen = choose(entries, confirmer(distances, tmp_path, calls))
    assert chosen.schedule.widths[0] == 0.75
    assert full.mean == pytest.approx(5.0)
    assert full.spread == pytest.approx(0.2 / np.sqrt(3))
    assert [width for width, _ in calls] == [1.0] * 4 + [0.5] + [0.75] * 4


@pytest.mark.parametrize(("apart", "width"), [((0.06, 0.02), 1.0), ((0.08, -0.06), 0.75)])
def test_schedules_are_compared_with_full_width_seed_by_seed(tmp_path, apart, width):
    # Full width varies from seed to seed by 0.8; the differences are known far better.
    def measure(schedule, seed, images):
        worse = apart[seed % 2] if schedule.widths[0] < 1.0 else 0.0
        counted = dict.fromkeys(
            ("calls", "reused_calls", "full_calls", "reused_full_calls"), images
        )
        return {"distance": (4.0, 5.0, 6.0, 5.0)[seed % 4] + worse, **counted}

    confirm = Confirmer(measure, (1, 2, 3, 4), 10, tmp_path / "confirmations.json")
    entries = [entry(0.75, distance=5.0), entry(1.0, distance=5.0, baseline="full")]
    full, chosen = choose(entries, confirm)
    assert len(confirm.measurements) == 8
    assert full.spread == pytest.approx(np.sqrt(2 / 3))
    assert chosen.schedule.widths[0] == width


@pytest.mark.parametrize(("tolerance", "width"), [(0.0, 1.0), (0.03, 0.75), (0.1, 0.5)])
def test_a_tolerance_lets_schedules_be_worse(tmp_path, tolerance, width):
    entries = [entry(width, distance=5.0) for width in (0.25, 0.5, 0.75)]
    entries.append(entry(1.0, distance=5.0, baseline="full"))
    distances = {0.25: 6.0, 0.5: 5.4, 0.75: 5.1, 1.0: 5.0}
    _, chosen = choose(entries, confirmer(distances, tmp_path), tolerance=tolerance)
    assert chosen.schedule.widths[0] == width


def test_what_is_clearly_worse_is_not_measured_from_every_seed(tmp_path):
    calls, distances = [], {0.5: 5.05, 0.75: 4.95, 1.0: 5.0}
    entries = [entry(width, distance=5.0) for width in (0.5, 0.75)]
    entries.append(entry(1.0, distance=5.0, baseline="full"))
    _, chosen = choose(entries, confirmer(distances, tmp_path, calls))
    assert chosen.schedule.widths[0] == 0.75
    assert [seed for width, seed in calls if width == 0.5] == [1, 2]


def test_a_lucky_schedule_does_not_hide_those_it_dominates(tmp_path):
    entries = [
        entry(1.0, distance=5.0, baseline="full"),
        entry(0.75, distance=5.1),
        entry(0.25, distance=4.5),  # dominates all, by luck
        entry(0.5, distance=4.9),
    ]
    distances = {0.25: 8.0, 0.5: 6.0, 0.75: 4.95, 1.0: 5.0}
    _, chosen = choose(entries, confirmer(distances, tmp_path))
    assert chosen.schedule.widths[0] == 0.75


def test_candidates_are_the_nearest_of_each_range_of_cost():
    distances = [9, 3, 5, 4, 8, 2, 7, 1, 6, 0]
    entries = [{"cost": cost, "distance": d} for cost, d in enumerate(distances)]
    for some in (entries, entries[::-1]):
        found = _best_of_ranges(some, 4)
        assert [each["cost"] for each in found] == [1, 5, 7, 9]
    assert _best_of_ranges(entries[:3], 8) == entries[:3] and _best_of_ranges([], 8) == []


def test_differences_are_taken_seed_by_seed():
    first = Confirmation(StepSchedule.uniform(0.5, (10, 0)), (5.0, 7.0, 9.0, 11.0))
    second = Confirmation(StepSchedule.uniform(1.0, (10, 0)), (4.0, 6.5, 7.5, 10.0))
    assert first.difference(second) == pytest.approx((1.0, np.sqrt(1 / 6) / 2))


def test_full_width_is_chosen_where_nothing_else_holds(tmp_path):
    entries = [entry(0.5, distance=5.0), entry(1.0, distance=5.0, baseline="full")]
    full, chosen = choose(entries, confirmer({0.5: 5.12, 1.0: 5.0}, tmp_path))
    assert chosen is full and chosen.schedule.widths[0] == 1.0


def test_a_budget_chooses_the_best_that_is_affordable(tmp_path):
    entries = [
        entry(0.25, distance=5.4),  # looks better than it is
        entry(0.5, distance=5.5),
        entry(0.75, distance=5.1),
        entry(1.0, distance=5.0, baseline="full"),
    ]
    distances = {0.25: 7.0, 0.5: 5.6, 0.75: 5.0, 1.0: 5.0}
    full, chosen = choose(entries, confirmer(distances, tmp_path), budget=0.3)
    assert (full.schedule.widths[0], chosen.schedule.widths[0]) == (1.0, 0.5)
    with pytest.raises(InputError, match=r"`budget` \(=0.01\) is below .*0.0625"):
        choose(entries, confirmer(distances, tmp_path), budget=0.01)


def test_a_schedule_that_several_methods_tried_is_one_finalist(tmp_path):
    lucky = [entry(0.25, distance=5.1)] * 5
    entries = [*lucky, entry(0.5, distance=5.5), entry(1.0, distance=5.0, baseline="full")]
    _, chosen = choose(entries, confirmer({0.25: 7.0, 0.5: 5.6, 1.0: 5.0}, tmp_path), budget=0.3)
    assert chosen.schedule.widths[0] == 0.5


def test_a_greatest_distance_chooses_the_cheapest_within_it(tmp_path):
    entries = [
        entry(0.25, distance=9.0),
        entry(0.5, distance=6.0),
        entry(0.75, distance=5.1),
        entry(1.0, distance=5.0, baseline="full"),
    ]
    distances = {0.25: 9.0, 0.5: 6.0, 0.75: 5.1, 1.0: 5.0}
    for limit, width in ((9.5, 0.25), (6.5, 0.5), (5.5, 0.75), (5.05, 1.0)):
        _, chosen = choose(entries, confirmer(distances, tmp_path), max_distance=limit)
        assert chosen.schedule.widths[0] == width
    with pytest.raises(InputError, match=r"`max_distance` \(=4.0\) .* full width has 5"):
        choose(entries, confirmer(distances, tmp_path), max_distance=4.0)


def test_confirmations_are_kept_and_not_made_again(tmp_path):
    schedule, calls = StepSchedule.uniform(0.5, (10, 0)), []
    first = confirmer({0.5: 3.0}, tmp_path, calls)(schedule)
    again = confirmer({0.5: 99.0}, tmp_path, calls)(schedule)
    assert first.distances == again.distances == pytest.approx((2.9, 3.1, 2.9, 3.1))
    assert calls == [(0.5, seed) for seed in (1, 2, 3, 4)]
    kept = json.loads((tmp_path / "confirmations.json").read_text())
    assert sum(measurement["calls"] for measurement in kept) == 40
    (tmp_path / "confirmations.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="delete the file"):
        confirmer({0.5: 3.0}, tmp_path)


def test_spaced_keeps_both_ends():
    assert spaced(range(5), 8) == [0, 1, 2, 3, 4]
    assert spaced(range(15), 8) == [0, 2, 4, 6, 8, 10, 12, 14]
