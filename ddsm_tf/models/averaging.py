"""Models that can run with the optimizer's moving average of their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from keras import ops


class AveragedWeights:
    """Mix-in of a `keras.Model` that is compiled with an optimizer that averages (`use_ema`)."""

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Run the block with the optimizer's moving average as weights, then put them back."""
        average = _moving_average(self.optimizer)
        if average is None:
            yield
            return
        variables = self.trainable_variables
        raw = [ops.convert_to_numpy(variable) for variable in variables]
        for variable, mean in zip(variables, average, strict=True):
            variable.assign(mean)
        try:
            yield
        finally:
            for variable, value in zip(variables, raw, strict=True):
                variable.assign(value)


def steps_done(optimizer: Any) -> int:
    """How many steps an optimizer has taken."""
    return int(ops.convert_to_numpy(optimizer.iterations))


def _moving_average(optimizer: Any) -> list[Any] | None:
    """The optimizer's averaged variables, or None before the first step or without `use_ema`."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer is None or not optimizer.use_ema or steps_done(optimizer) == 0:
        return None
    return optimizer._model_variables_moving_average
