"""The Keras Tuner loop whose trial samples images with a schedule and scores them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import keras_tuner
from keras_tuner.engine import base_tuner

from ddsm_tf.errors import invalid
from ddsm_tf.files import write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.distribution import Role, WorkerOracle, check_free, watching
from ddsm_tf.search.oracle import COST, DISTANCE, PARAMETER, ScheduleOracle

Evaluate = Callable[[StepSchedule], dict[str, float]]
"""A schedule → its `distance`, `cost` and whatever other finite numbers are worth keeping."""


class ScheduleTuner(base_tuner.BaseTuner):
    """Runs an oracle's trials, alone or as Keras Tuner's chief or worker.

    The environment says which: see `ddsm_tf.search.distribution`. A worker's oracle is a
    `WorkerOracle`, and a worker writes no files.

    Args:
        oracle: proposes schedules.
        evaluate: measures one.
        directory: where trials are kept; those already there are gone on with.
        on_trial: called after each trial that finishes: on the chief everybody's, on a worker its
            own.

    Raises:
        InputError: Keras Tuner's environment variables do not fit together.
    """

    PROJECT = "trials"
    """The folder in `directory` that Keras Tuner works in."""

    def __init__(
        self,
        oracle: ScheduleOracle,
        evaluate: Evaluate,
        directory: str | os.PathLike,
        on_trial: Callable[[], None] | None = None,
    ) -> None:
        self.role = Role.from_environment()
        self.evaluate = evaluate
        self.space = oracle.proposer.space
        # Keras Tuner prints where it reloads from.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            super().__init__(oracle, directory=str(directory), project_name=self.PROJECT)
        if self.role is Role.WORKER:
            self.oracle = WorkerOracle(oracle)
        else:
            # Its own file is the last to be written; trials may be there without it.
            oracle.reload()
        self.oracle.on_trial = on_trial

    def run_trial(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the trial's schedule."""
        try:
            genome = self.space.from_text(trial.hyperparameters.values[PARAMETER])
            with self._running(trial):
                metrics = _checked(self.evaluate(self.space.schedule(genome)))
        except Exception as error:
            # Only a fatal error leaves Keras Tuner's loop; others would be retried and hidden.
            raise keras_tuner.errors.FatalRuntimeError(str(error)) from error
        return {**metrics, "multi_objective": metrics[DISTANCE] + metrics[COST]}

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Run trials until the oracle stops; a chief serves until the workers have run them.

        Raises:
            InputError: the chief's port is taken, or this worker's run differs from the chief's.
            ChiefLost: this worker's chief does not answer.
            Exception: whatever `evaluate` raises ends the search; finished trials are kept.
        """
        if self.role is Role.CHIEF and self.oracle.is_finished():
            # Keras Tuner's chief would wait for a worker to ask.
            return
        try:
            with self._serving():
                super().search(*args, verbose=0, **kwargs)
        except keras_tuner.errors.FatalRuntimeError as error:
            raise (error.__cause__ or error) from None

    def _serving(self) -> contextlib.AbstractContextManager[None]:
        if self.role is not Role.CHIEF:
            return contextlib.nullcontext()
        check_free()
        return watching(self.oracle)

    def _running(self, trial: Any) -> contextlib.AbstractContextManager[None]:
        if self.role is not Role.WORKER:
            return contextlib.nullcontext()
        return self.oracle.running(trial.trial_id)

    def save(self) -> None:
        """Write the oracle's and the tuner's state, atomically."""
        # Workers may share the chief's folder.
        if self.role is not Role.WORKER:
            self.oracle.save()
            write_json(self._get_tuner_fname(), self.get_state())


def _checked(result: Mapping[str, float]) -> dict[str, float]:
    """What a trial measured, as floats."""
    for name in (DISTANCE, COST):
        if name not in result:
            raise invalid("evaluate", sorted(result), f"must return a `{name}`")
    metrics = {name: float(value) for name, value in result.items()}
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise invalid(name, value, "must be finite; a schedule was measured so")
    return metrics
