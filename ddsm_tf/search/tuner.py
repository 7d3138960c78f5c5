"""The Keras Tuner loop whose trial samples images with a schedule and scores them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import keras_tuner
from keras_tuner.engine import base_tuner

from ddsm_tf.files import write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.oracle import COST, DISTANCE, PARAMETER, ScheduleOracle

Evaluate = Callable[[StepSchedule], dict[str, float]]
"""A schedule → its `distance`, `cost` and whatever else is worth keeping of the trial."""


class ScheduleTuner(base_tuner.BaseTuner):
    """Runs an oracle's trials.

    Args:
        oracle: proposes schedules.
        evaluate: measures one.
        directory: where trials are kept; those already there are gone on with.
        on_trial: called after each trial.

    Raises:
        Exception: whatever `evaluate` raises ends the search; finished trials are kept.
    """

    def __init__(
        self,
        oracle: ScheduleOracle,
        evaluate: Evaluate,
        directory: str | os.PathLike,
        on_trial: Callable[[], None] | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.on_trial = on_trial
        self.space = oracle.evolution.space
        # Keras Tuner prints where it reloads from.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            super().__init__(oracle, directory=str(directory), project_name="trials")
        # Its own file is the last to be written; trials may be there without it.
        if not self._is_worker():
            oracle.reload()

    def run_trial(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the trial's schedule."""
        genome = self.space.from_text(trial.hyperparameters.values[PARAMETER])
        try:
            result = self.evaluate(self.space.schedule(genome))
        except Exception as error:
            # Only a fatal error leaves Keras Tuner's loop; others would be retried and hidden.
            raise keras_tuner.errors.FatalRuntimeError(str(error)) from error
        return {**result, "multi_objective": result[DISTANCE] + result[COST]}

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Run trials until the oracle stops."""
        try:
            super().search(*args, verbose=0, **kwargs)
        except keras_tuner.errors.FatalRuntimeError as error:
            raise error.__cause__ from None

    def on_trial_end(self, trial: Any) -> None:
        super().on_trial_end(trial)
        if self.on_trial:
            self.on_trial()

    def save(self) -> None:
        """Write the oracle's and the tuner's state, atomically."""
        if not self._is_worker():
            self.oracle.save()
        write_json(self._get_tuner_fname(), self.get_state())
