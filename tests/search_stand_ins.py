"""Stand-ins for a search: proposers, a measurement, and what a worker tells the oracle."""

import itertools
import json
from pathlib import Path

import numpy as np
from keras_tuner.src.engine import oracle as oracle_module
from test_search import evaluate, make_space

from ddsm_tf.search import ScheduleOracle, ScheduleTuner

TRIALS, GENERATION = 20, 5


class Climber:
    """Generations of five, bred from the best of all before them. It is no `Evolution`."""

    def __init__(self, seed=3):
        self.space = make_space()
        self.seed = seed

    def pending(self, results):
        known = {}
        for number in itertools.count():
            generation = self.generation(known, number)
            if missing := [genome for genome in generation if genome not in results]:
                return missing
            known |= {genome: results[genome] for genome in generation}

    def generation(self, known, number):
        random, genomes = np.random.default_rng([self.seed, number]), []
        best = min(known, key=lambda genome: sum(known[genome]), default=())
        while len(genomes) < GENERATION:
            tail = tuple(map(int, random.integers(4, size=5)))
            kept = best[: random.integers(4)]
            genome = (*kept, *tail[len(kept) :])
            if genome not in known and genome not in genomes:
                genomes.append(genome)
        return genomes


class Few:
    """All there is to propose are two genomes."""

    space = make_space()

    def pending(self, results):
        return [genome for genome in [(0,) * 5, (1,) * 5] if genome not in results]


def measure(schedule):
    """Numbers that only a float64 holds."""
    return {**evaluate(schedule), "third": schedule.widths[0] / 3}


def contents(folder):
    """Trial number → its genome and what was measured, of a search's folder."""
    found = {}
    for file in sorted(Path(folder).glob("trials/trial_*/trial.json")):
        trial = json.loads(file.read_text())
        assert trial["status"] == "COMPLETED"
        metrics = {
            name: [observed["value"] for observed in metric["observations"]]
            for name, metric in trial["metrics"]["metrics"].items()
        }
        found[trial["trial_id"]] = trial["hyperparameters"]["values"]["schedule"], metrics
    return found


def make_oracle(folder, max_trials, proposer=None, **options):
    oracle = ScheduleOracle(proposer or Climber(), max_trials, **options)
    ScheduleTuner(oracle, measure, folder).oracle.verbose = 0
    return oracle


def report(oracle, trial):
    """What a worker does when it has run a trial."""
    result = measure(oracle.schedule(trial))
    oracle.update_trial(trial.trial_id, {**result, "multi_objective": 0.0})
    finished = oracle_module.trial_module.Trial(trial.hyperparameters, trial.trial_id, "COMPLETED")
    oracle.end_trial(finished)


def lose(oracle, tuner_id):
    """Let a worker, and no other, be silent for too long."""
    oracle._silence[tuner_id] = 30.0
    oracle.count_silence(1.0, 30.0)
