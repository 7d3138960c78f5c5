"""The search: its space, its evolution, its oracle, its choice. Evaluations are stand-ins."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.search import (
    Confirmer,
    Evolution,
    ScheduleOracle,
    ScheduleSpace,
    ScheduleTuner,
    choose,
    run_trials,
)
from ddsm_tf.search.search import spaced

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


def objectives(space, genome):
    result = evaluate(space.schedule(genome))
    return result["distance"], result["cost"]


def evolve(evolution, count):
    """Run `count` trials without Keras Tuner; returns the results in order."""
    results = {}
    while len(results) < count and (pending := evolution.pending(results)):
        results[pending[0]] = objectives(evolution.space, pending[0])
    return results


def test_a_genome_is_a_schedule_and_a_text():
    space = make_space(segments=3, steps=7)
    schedule = space.schedule((0, 2, 3))
    assert schedule.widths == (1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25)
    assert schedule.timesteps == even_timesteps(1000, 7)
    assert space.to_text((0, 2, 3)) == "023"
    assert space.from_text("023") == (0, 2, 3)
    assert space.uniform(0.25) == (3, 3, 3)
    assert space.size == 64


def test_there_are_never_more_segments_than_steps():
    assert make_space(segments=10, steps=4).segments == 4


@pytest.mark.parametrize("text", ["", "01", "0123", "014", "0x1", "0-1"])
def test_a_broken_genome_is_refused(text):
    with pytest.raises(InputError, match="schedule"):
        make_space(segments=3).from_text(text)


def test_no_segments_and_no_widths_are_refused():
    with pytest.raises(InputError, match="segments"):
        make_space(segments=0)
    with pytest.raises(InputError, match="widths"):
        make_space(widths=())


def test_the_first_generation_has_every_uniform_schedule_ramps_and_random_ones():
    evolution = Evolution(make_space(), 16, seed=0)
    first = evolution.first_generation()
    assert first[:4] == [(k,) * 5 for k in range(4)]
    ramps = [g for g in first[4:] if len(set(g[:2])) == 1 and len(set(g[2:])) == 1]
    assert len(ramps) >= 6
    # Noise first, details last: half the steps at a width, then half at the next wider one.
    assert first[4:7] == [(1, 1, 0, 0, 0), (2, 2, 1, 1, 1), (3, 3, 2, 2, 2)]
    assert len(evolution.random_genomes()) == 6
    assert len(set(first)) == 16


def test_evolution_is_a_pure_function_of_seed_and_results():
    runs = [list(evolve(Evolution(make_space(), 8, seed=s), 40)) for s in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    # Results in another order, as many workers would give them, ask for the same genomes.
    results = evolve(Evolution(make_space(), 8, seed=0), 16)
    shuffled = dict(reversed(list(results.items())))
    again = Evolution(make_space(), 8, seed=0)
    assert again.pending(shuffled) == Evolution(make_space(), 8, seed=0).pending(results)


def test_no_schedule_is_proposed_twice_and_the_whole_space_is_walked():
    space = make_space(segments=3)
    results = evolve(Evolution(space, 8, seed=0), 1000)
    assert len(results) == space.size == 64
    assert set(results) == set(itertools.product(range(4), repeat=3))


def test_a_space_smaller_than_a_generation_ends():
    space = make_space(segments=1)
    assert set(evolve(Evolution(space, 16, seed=0), 100)) == {(0,), (1,), (2,), (3,)}


def test_one_width_is_a_space_of_one():
    space = make_space(widths=(1.0,))
    assert list(evolve(Evolution(space, 4, seed=0), 10)) == [(0,) * 5]


def test_evolution_beats_random_search():
    from ddsm_tf.search import hypervolume

    space, reference = make_space(segments=8, steps=8), (20.0, 128.0)
    found = {}
    for seed in range(3):
        evolved = evolve(Evolution(space, 12, seed=seed), 96)
        random = np.random.default_rng(seed).integers(4, size=(96, 8))
        found[seed] = (
            hypervolume(list(evolved.values()), reference),
            hypervolume([objectives(space, tuple(genome)) for genome in random], reference),
        )
    assert all(evolved > 1.1 * random for evolved, random in found.values()), found


def test_survivors_are_the_best_ranked_then_the_least_crowded():
    evolution = Evolution(make_space(segments=1, widths=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5)), 4, seed=0)
    points = [(1, 9), (9, 1), (5, 5), (5.1, 4.9), (6, 6), (9, 9)]
    genomes = [(k,) for k in range(6)]
    results = dict(zip(genomes, points, strict=True))
    survivors = evolution._survivors(genomes, results, 1)
    # Both ends of the front have no neighbour beyond them and stand first.
    assert set(survivors[:2]) == {(0,), (1,)}
    assert set(survivors) == {(0,), (1,), (2,), (3,)}


def test_mutation_moves_one_segment_on_average_to_a_neighbouring_width():
    evolution = Evolution(make_space(segments=10), 4, seed=0)
    random = np.random.default_rng(0)
    for index, expected in ((0, {1: 1.0}), (1, {0: 0.5, 2: 0.5}), (3, {2: 1.0})):
        mutants = np.array([evolution._mutate((index,) * 10, random) for _ in range(2000)])
        moved = mutants[mutants != index]
        assert len(moved) / 2000 == pytest.approx(1.0, abs=0.1)
        shares = {int(width): np.mean(moved == width) for width in np.unique(moved)}
        assert shares == pytest.approx(expected, abs=0.05)


def test_crossover_takes_one_stretch_from_the_father():
    evolution = Evolution(make_space(segments=6), 4, seed=0)
    random = np.random.default_rng(0)
    children = {evolution._cross((0,) * 6, (1,) * 6, random) for _ in range(500)}
    # Every stretch from segment i to segment j, and the mother herself.
    stretches = {tuple(int(i <= k < j) for k in range(6)) for i in range(7) for j in range(i, 7)}
    assert children == stretches


def test_a_population_below_four_is_refused():
    with pytest.raises(InputError, match="population"):
        Evolution(make_space(), 3, seed=0)


def test_trials_are_counted_exactly_and_baselines_are_named(tmp_path):
    evolution, calls = Evolution(make_space(), 8, seed=0), []

    def counted(schedule, seed):
        calls.append(schedule.widths)
        return evaluate(schedule, seed)

    entries = run_trials(evolution, counted, trials=20, seed=0, directory=tmp_path)
    assert len(calls) == len(set(calls)) == len(entries) == 20
    names = [entry.get("baseline") for entry in entries[:4]]
    assert names == ["full", "uniform:0.75", "uniform:0.5", "uniform:0.25"]
    assert sum(entry.get("baseline") == "random" for entry in entries) == 2
    assert entries[0]["distance"] == pytest.approx(5.0)
    assert entries[0]["macs_fraction"] == 1.0
    assert StepSchedule.from_dict(entries[3]["schedule"]).widths == (0.25,) * 10


def test_keras_tuner_runs_the_trials_that_plain_evolution_would(tmp_path):
    evolution = Evolution(make_space(), 8, seed=3)
    entries = run_trials(evolution, evaluate, trials=30, seed=0, directory=tmp_path)
    expected = evolve(Evolution(make_space(), 8, seed=3), 30)
    found = [tuple(entry["schedule"]["widths"]) for entry in entries]
    assert found == [evolution.space.schedule(genome).widths for genome in expected]


def test_an_interrupted_search_repeats_no_finished_trial(tmp_path):
    calls = []

    def failing(schedule, seed):
        calls.append(schedule.widths)
        if len(calls) == 13:
            raise OSError("no space left on device")
        return evaluate(schedule, seed)

    def run(evaluation):
        evolution = Evolution(make_space(), 8, seed=0)
        return run_trials(evolution, evaluation, trials=24, seed=0, directory=tmp_path / "a")

    with pytest.raises(OSError, match="no space left"):
        run(failing)
    entries = run(failing)
    # The thirteenth failed and ran again; all others ran once.
    assert len(calls) == 25 and len(set(calls)) == 24
    whole = run_trials(
        Evolution(make_space(), 8, seed=0), evaluate, trials=24, seed=0, directory=tmp_path / "b"
    )
    assert entries == whole


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_search import Evolution, evaluate, make_space, run_trials
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
run_trials(Evolution(make_space(), 8, seed=0), evaluate, trials=20, seed=0, directory={out!r})
"""


def test_kill_between_two_files_loses_no_trial(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-500:]
    calls = []

    def counted(schedule, seed):
        calls.append(schedule.widths)
        return evaluate(schedule, seed)

    evolution = Evolution(make_space(), 8, seed=0)
    entries = run_trials(evolution, counted, trials=20, seed=0, directory=tmp_path)
    assert len(calls) == 11 and len(entries) == 20


def test_a_search_can_be_given_more_trials(tmp_path):
    first = run_trials(
        Evolution(make_space(), 8, seed=0), evaluate, trials=9, seed=0, directory=tmp_path
    )
    more = run_trials(
        Evolution(make_space(), 8, seed=0), evaluate, trials=101, seed=0, directory=tmp_path
    )
    assert more[:9] == first and len(more) == 101


def test_a_broken_trial_file_is_named(tmp_path):
    evolution = Evolution(make_space(), 8, seed=0)
    run_trials(evolution, evaluate, trials=4, seed=0, directory=tmp_path)
    file = next(tmp_path.glob("trials/trial_*/trial.json"))
    file.write_text(file.read_text()[:40])
    with pytest.raises(InputError, match=r"trial.*not valid JSON"):
        run_trials(evolution, evaluate, trials=8, seed=0, directory=tmp_path)


def test_too_few_trials_for_the_baselines_are_refused(tmp_path):
    with pytest.raises(InputError, match="`trials` \\(=3\\) must be at least 4"):
        run_trials(
            Evolution(make_space(), 8, seed=0), evaluate, trials=3, seed=0, directory=tmp_path
        )


def test_workers_wait_for_a_generation_and_never_share_a_genome(tmp_path):
    oracle = ScheduleOracle(Evolution(make_space(), 4, seed=0), max_trials=50)
    ScheduleTuner(oracle, evaluate, tmp_path)
    first = oracle.evolution.first_generation()
    trials = [oracle.create_trial(f"worker{k}") for k in range(len(first) + 1)]
    assert [trial.status for trial in trials] == ["RUNNING"] * len(first) + ["IDLE"]
    assert [oracle.genome(trial) for trial in trials[:-1]] == first
    for trial in trials[:-1]:
        result = objectives(oracle.evolution.space, oracle.genome(trial))
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

    def measure(schedule, seed):
        if calls is not None:
            calls.append((schedule.widths[0], seed))
        return {"distance": distances[schedule.widths[0]] + (-0.1 if seed % 2 else 0.1)}

    return Confirmer(measure, (1, 2, 3, 4), tmp_path / "confirmations.json")


def test_the_cheapest_confirmed_schedule_is_chosen(tmp_path):
    entries = [
        entry(0.25, distance=9.0),  # too far to be a candidate
        entry(0.5, distance=5.0),  # was lucky: the other seeds say 6, the first of them does
        entry(0.75, distance=5.1),
        entry(1.0, distance=5.0, baseline="full"),
    ]
    calls = []
    distances = {0.25: 5.0, 0.5: 6.0, 0.75: 5.1, 1.0: 5.0}
    full, chosen = choose(entries, confirmer(distances, tmp_path, calls))
    assert chosen.schedule.widths[0] == 0.75
    assert full.mean == pytest.approx(5.0)
    assert full.spread == pytest.approx(0.2 / np.sqrt(3))
    assert [width for width, _ in calls] == [1.0] * 4 + [0.5] + [0.75] * 4


def test_full_width_is_chosen_where_nothing_else_holds(tmp_path):
    entries = [entry(0.5, distance=5.0), entry(1.0, distance=5.0, baseline="full")]
    full, chosen = choose(entries, confirmer({0.5: 5.12, 1.0: 5.0}, tmp_path))
    assert chosen is full and chosen.schedule.widths[0] == 1.0


def test_confirmations_are_kept_and_not_made_again(tmp_path):
    schedule, calls = StepSchedule.uniform(0.5, (10, 0)), []
    first = confirmer({0.5: 3.0}, tmp_path, calls)(schedule)
    again = confirmer({0.5: 99.0}, tmp_path, calls)(schedule)
    assert first.distances == again.distances == pytest.approx((2.9, 3.1, 2.9, 3.1))
    assert calls == [(0.5, seed) for seed in (1, 2, 3, 4)]
    (tmp_path / "confirmations.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="delete the file"):
        confirmer({0.5: 3.0}, tmp_path)


def test_spaced_keeps_both_ends():
    assert spaced(range(5), 8) == [0, 1, 2, 3, 4]
    assert spaced(range(15), 8) == [0, 2, 4, 6, 8, 10, 12, 14]
