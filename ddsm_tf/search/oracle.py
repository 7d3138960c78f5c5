"""The Keras Tuner oracle that evolves step schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import keras_tuner
from keras_tuner.engine import trial as trial_module

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import read_json, write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.generations import Objectives
from ddsm_tf.search.pareto import front_ranks
from ddsm_tf.search.space import Genome, ScheduleSpace

PARAMETER, FINGERPRINT = "schedule", "search"
DISTANCE, COST = "distance", "cost"

_Status = trial_module.TrialStatus


class Proposer(Protocol):
    """Says which schedules to try; `Evolution` is one.

    Attributes:
        space: the schedules.
    """

    space: ScheduleSpace

    def pending(self, results: Mapping[Genome, Objectives]) -> list[Genome]:
        """The genomes of the present generation that have no result yet; none ends the search.

        The answer may depend on the results of earlier generations, not on those of the present
        one: then it is the same whatever the order in which workers finish. With a chief, it must
        come within seconds, because the workers wait for it.
        """
        ...


def synchronized(method: Callable[..., Any]) -> Callable[..., Any]:
    """`keras_tuner.synchronized` that also gives its lock back when the method raises.

    Keras Tuner's own would keep it: the chief, which lives on when a call fails, would stand still.
    """

    def outcome(*args: Any, **kwargs: Any) -> tuple[Any, BaseException | None]:
        try:
            return method(*args, **kwargs), None
        except BaseException as error:
            return None, error

    locked = keras_tuner.synchronized(outcome)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result, error = locked(*args, **kwargs)
        if error is not None:
            raise error
        return result

    return call


class ScheduleOracle(keras_tuner.Oracle):
    """Proposes schedules and keeps what trials measured.

    A trial's one hyperparameter, `schedule`, is a genome's text. Trials report `distance` and
    `cost`; Keras Tuner also wants their sum as `multi_objective`, which plays no part. Generations
    are synchronous: with many workers, some are idle at a generation's end, and the result is
    that of one worker: each trial's number stands for the same schedule.

    A worker that fell silent loses its trial to the next one that asks; it may still report its
    result, and what is reported first counts. Without a chief nothing is ever taken away.

    All state is in the trials' own files, written atomically: a killed search forgets none that
    finished, and repeats at most those that were running.

    Args:
        proposer: proposes genomes.
        max_trials: how many schedules to try.
        fingerprint: stands for all that a trial's result depends on, such as weights and seed;
            workers whose own differs are refused.

    Attributes:
        on_trial: called after each trial that finishes, on whatever worker.
    """

    def __init__(self, proposer: Proposer, max_trials: int, fingerprint: str = "") -> None:
        if max_trials < 1:
            raise invalid("max_trials", max_trials, "must be at least 1")
        parameters = keras_tuner.HyperParameters()
        parameters.Fixed(PARAMETER, "")
        parameters.Fixed(FINGERPRINT, fingerprint)
        objectives = [keras_tuner.Objective(name, "min") for name in (DISTANCE, COST)]
        # Keras Tuner's own seed goes unused; it would replace a seed of 0 by a random one.
        super().__init__(objectives, max_trials, parameters, seed=1)
        self.proposer = proposer
        self.fingerprint = fingerprint
        self.on_trial: Callable[[], None] | None = None
        self._silence: dict[str, float] = {}
        self._proposed: tuple[int, list[Genome]] = (-1, [])

    def results(self) -> dict[Genome, Objectives]:
        """Genome → (distance, cost) of every finished trial."""
        return {self.genome(trial): _objectives(trial) for trial in self.completed()}

    def completed(self) -> list[trial_module.Trial]:
        """Finished trials in the order of their numbers."""
        trials = (self.trials[trial_id] for trial_id in sorted(self.trials, key=int))
        return [trial for trial in trials if trial.status == _Status.COMPLETED]

    def genome(self, trial: trial_module.Trial) -> Genome:
        """The genome that a trial runs."""
        return self.proposer.space.from_text(trial.hyperparameters.values[PARAMETER])

    def schedule(self, trial: trial_module.Trial) -> StepSchedule:
        """The schedule that a trial runs."""
        return self.proposer.space.schedule(self.genome(trial))

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The next genome; idle while the generation's last ones run on other workers."""
        pending = self._pending()
        running = {self.genome(trial) for trial in self.ongoing_trials.values()}
        free = [genome for genome in pending if genome not in running]
        if free:
            text = self.proposer.space.to_text(free[0])
            return {"status": _Status.RUNNING, "values": {PARAMETER: text}}
        return {"status": _Status.IDLE if pending else _Status.STOPPED}

    def is_finished(self) -> bool:
        """Whether there is nothing left to run."""
        return len(self.completed()) >= self.max_trials or not self._pending()

    def _pending(self) -> list[Genome]:
        """What the proposer says to the results; idle workers ask many times for the same."""
        results = self.results()
        if self._proposed[0] != len(results):
            self._proposed = len(results), self.proposer.pending(results)
        return self._proposed[1]

    @synchronized
    def create_trial(self, tuner_id: str) -> trial_module.Trial:
        """The trial that a worker is to run, or one whose status says to wait or to stop."""
        self._silence[tuner_id] = 0.0
        trial = super().create_trial(tuner_id)
        if trial.status == _Status.STOPPED and self.ongoing_trials:
            # Another worker may yet be lost, and somebody must be there to repeat its trial.
            trial.status = _Status.IDLE
            self.tuner_ids.add(tuner_id)
        return trial

    @synchronized
    def get_trial(self, trial_id: str) -> trial_module.Trial:
        """A trial; its worker is alive. One that nobody knows has no metrics."""
        self._hear(trial_id)
        return self.trials.get(trial_id) or trial_module.Trial(self.get_space(), trial_id)

    @synchronized
    def update_trial(
        self, trial_id: str, metrics: Mapping[str, float], step: int = 0
    ) -> trial_module.Trial:
        """Keep what a trial measured, in place of what it was said to have measured before."""
        trial = self.get_trial(trial_id)
        if not self._awaited(trial_id):
            return trial
        trial.metrics.metrics.clear()
        return super().update_trial(trial_id, metrics, step)

    @synchronized
    def end_trial(self, trial: trial_module.Trial) -> None:
        """Finish a trial; one that is unknown, or finished already, is passed over."""
        for tuner_id in self._hear(trial.trial_id):
            del self.ongoing_trials[tuner_id]
        if not self._awaited(trial.trial_id):
            return
        if trial.trial_id in self._retry_queue:
            self._retry_queue.remove(trial.trial_id)
        super().end_trial(trial)
        if self.on_trial:
            self.on_trial()

    def _awaited(self, trial_id: str) -> bool:
        """Whether the trial's result is still wanted; several workers may have run it."""
        return trial_id in self.trials and trial_id not in self.end_order

    def _hear(self, trial_id: str) -> list[str]:
        """Note that a trial's worker is alive; returns who that is, if anybody."""
        holders = [name for name, t in self.ongoing_trials.items() if t.trial_id == trial_id]
        self._silence.update(dict.fromkeys(holders, 0.0))
        return holders

    @synchronized
    def count_silence(self, seconds: float, limit: float) -> None:
        """Add to the time that workers have been silent; take from the lost ones what they hold.

        Time is counted, not read from a clock: a chief that was busy or asleep itself could not
        have heard its workers.

        Args:
            seconds: since the last call.
            limit: seconds of silence after which a worker is lost.
        """
        for tuner_id in tuple(self.tuner_ids):
            self._silence[tuner_id] += seconds
            if self._silence[tuner_id] > limit:
                self.tuner_ids.remove(tuner_id)
                if trial := self.ongoing_trials.pop(tuner_id, None):
                    self._retry_queue.append(trial.trial_id)

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
        """Rebuild everything from the trials' files; unfinished and deleted trials are run again.

        `oracle.json` is older than the last trial's file if the kill came between the two, and
        Keras Tuner would then repeat that trial.
        """
        for file in sorted(Path(self._project_dir).glob("trial_*/trial.json")):
            trial = self._read_trial(file)
            self.trials[trial.trial_id] = trial
        self._fill_gaps()
        self.start_order = sorted(self.trials, key=int)
        self.end_order = [trial.trial_id for trial in self.completed()]
        self._retry_queue = [
            name for name in reversed(self.start_order) if name not in self.end_order
        ]

    def _read_trial(self, file: Path) -> trial_module.Trial:
        try:
            trial = trial_module.Trial.from_state(read_json(file, argument="trial"))
            self.genome(trial)
        except (InputError, KeyError, TypeError, AttributeError) as error:
            rule = f"is broken ({error}); delete {file.parent}, and it is run again"
            raise invalid("trial", str(file), rule) from error
        return trial

    def _fill_gaps(self) -> None:
        """Give numbers that are missing among the trials to what the proposer misses.

        Keras Tuner numbers a new trial by their count, so it would write over a later one.
        """
        numbers = {int(name) for name in self.trials}
        missing = sorted(set(range(max(numbers, default=-1))) - numbers)
        pending = self.proposer.pending(self.results()) if missing else []
        known = {self.genome(trial) for trial in self.trials.values()}
        pending = [genome for genome in pending if genome not in known]
        if len(pending) < len(missing):
            rule = f"lacks trial {missing[0]}, on which later ones depend; delete it to start anew"
            raise invalid("search", str(self._project_dir), rule)
        for number, genome in zip(missing, pending, strict=False):
            trial_id = f"{number:0{len(str(self.max_trials))}d}"
            hyperparameters = self.hyperparameters.copy()
            hyperparameters.values = {PARAMETER: self.proposer.space.to_text(genome)}
            self.trials[trial_id] = trial_module.Trial(
                hyperparameters=hyperparameters, trial_id=trial_id, status=_Status.RUNNING
            )


def _objectives(trial: trial_module.Trial) -> Objectives:
    return tuple(trial.metrics.get_best_value(name) for name in (DISTANCE, COST))
