"""The Keras Tuner oracle that evolves step schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras_tuner
from keras_tuner.engine import trial as trial_module

from ddsm_tf.errors import invalid
from ddsm_tf.files import read_json, write_json
from ddsm_tf.search.evolution import Evolution, Objectives
from ddsm_tf.search.pareto import front_ranks
from ddsm_tf.search.space import Genome

PARAMETER = "schedule"
DISTANCE, COST = "distance", "cost"

_Status = trial_module.TrialStatus


class ScheduleOracle(keras_tuner.Oracle):
    """Proposes schedules by NSGA-II and keeps what trials measured.

    A trial's one hyperparameter, `schedule`, is a genome's text. Trials report `distance` and
    `cost`; Keras Tuner also wants their sum as `multi_objective`, which plays no part. Generations
    are synchronous: with many workers, some are idle at a generation's end, and the result is
    that of one worker.

    All state is in the trials' own files, written atomically: a killed search forgets none that
    finished, and repeats at most those that were running.

    Args:
        evolution: proposes genomes.
        max_trials: how many schedules to try.
    """

    def __init__(self, evolution: Evolution, max_trials: int) -> None:
        if max_trials < 1:
            raise invalid("max_trials", max_trials, "must be at least 1")
        parameters = keras_tuner.HyperParameters()
        parameters.Fixed(PARAMETER, "")
        objectives = [keras_tuner.Objective(name, "min") for name in (DISTANCE, COST)]
        # Keras Tuner's own seed goes unused; it would replace a seed of 0 by a random one.
        super().__init__(objectives, max_trials, parameters, seed=1)
        self.evolution = evolution

    def results(self) -> dict[Genome, Objectives]:
        """Genome → (distance, cost) of every finished trial."""
        return {self.genome(trial): _objectives(trial) for trial in self.completed()}

    def completed(self) -> list[trial_module.Trial]:
        """Finished trials in the order of their numbers."""
        trials = (self.trials[trial_id] for trial_id in sorted(self.trials, key=int))
        return [trial for trial in trials if trial.status == _Status.COMPLETED]

    def genome(self, trial: trial_module.Trial) -> Genome:
        """The genome that a trial runs."""
        return self.evolution.space.from_text(trial.hyperparameters.values[PARAMETER])

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The next genome; idle while the generation's last ones run on other workers."""
        pending = self.evolution.pending(self.results())
        running = {self.genome(trial) for trial in self.ongoing_trials.values()}
        free = [genome for genome in pending if genome not in running]
        if free:
            text = self.evolution.space.to_text(free[0])
            return {"status": _Status.RUNNING, "values": {PARAMETER: text}}
        return {"status": _Status.IDLE if pending else _Status.STOPPED}

    def score_trial(self, trial: trial_module.Trial) -> None:
        """The score is the distance; `get_best_trials` ranks by both objectives."""
        trial.score, trial.best_step = _objectives(trial)[0], 0

    def get_best_trials(self, num_trials: int = 1) -> list[trial_module.Trial]:
        """Finished trials: those that no other beats in both objectives first."""
        trials = self.completed()
        ranks = front_ranks([_objectives(trial) for trial in trials])
        order = sorted(range(len(trials)), key=lambda i: (ranks[i], trials[i].score))
        return [trials[i] for i in order[:num_trials]]

    def save(self) -> None:
        """Write `oracle.json`, atomically."""
        write_json(self._get_oracle_fname(), self.get_state())

    def _save_trial(self, trial: trial_module.Trial) -> None:
        # Keras Tuner writes in place, so a kill could leave half a file.
        write_json(Path(self._get_trial_dir(trial.trial_id)) / "trial.json", trial.get_state())

    def reload(self) -> None:
        """Rebuild everything from the trials' files; unfinished trials are run again.

        `oracle.json` is older than the last trial's file if the kill came between the two, and
        Keras Tuner would then repeat that trial.
        """
        for file in sorted(Path(self._project_dir).glob("trial_*/trial.json")):
            state = read_json(file, argument="trial")
            try:
                trial = trial_module.Trial.from_state(state)
                self.genome(trial)
            except (KeyError, TypeError, AttributeError) as error:
                raise invalid("trial", str(file), f"is broken: {error!r}") from error
            self.trials[trial.trial_id] = trial
        self.start_order = sorted(self.trials, key=int)
        self.end_order = [trial.trial_id for trial in self.completed()]
        self._retry_queue = [
            name for name in reversed(self.start_order) if name not in self.end_order
        ]


def _objectives(trial: trial_module.Trial) -> Objectives:
    return tuple(trial.metrics.get_best_value(name) for name in (DISTANCE, COST))
