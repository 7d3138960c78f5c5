"""What a step costs at each width, and what a schedule costs in all.

Multiply-accumulate operations (MACs) are counted by running the network's own code on shapes
without values: every layer reports its work to the tally that is open, so the count cannot
drift from the architecture. The paper's GFLOPs are 2 · MACs / 10⁹ without attention's matrix
products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ddsm_tf.errors import invalid
from ddsm_tf.schedule import StepSchedule


@dataclass
class Cost:
    """One forward pass for one image.

    Attributes:
        macs: multiply-accumulates of convolutions and dense layers (the paper's convention).
        attention_macs: multiply-accumulates of attention's two matrix products.
        parameters: weights that the pass reads.
    """

    macs: int = 0
    attention_macs: int = 0
    parameters: int = 0

    @property
    def total_macs(self) -> int:
        """All multiply-accumulates, attention's matrix products included."""
        return self.macs + self.attention_macs


_open_tally: ContextVar[Cost | None] = ContextVar("open_tally", default=None)


@contextlib.contextmanager
def tally() -> Iterator[Cost]:
    """Collect what layers report within the block."""
    cost = Cost()
    token = _open_tally.set(cost)
    try:
        yield cost
    finally:
        _open_tally.reset(token)


def report(*, macs: int = 0, attention_macs: int = 0, parameters: int = 0) -> None:
    """Called by layers: add to the open tally, if there is one."""
    cost = _open_tally.get()
    if cost is not None:
        cost.macs += macs
        cost.attention_macs += attention_macs
        cost.parameters += parameters


def forward_cost(unet: Any, width: float) -> Cost:
    """The cost of one image through a `SlimmableUNet` at `width`.

    Raises:
        InputError: `width` is not one of the network's.
    """
    import keras

    image = keras.KerasTensor((1, *unet.image_shape))
    timestep = keras.KerasTensor((1,))
    with tally() as cost:
        unet(image, timestep, width=width)
    return cost


def macs_per_width(unet: Any) -> dict[float, int]:
    """Width → MACs of one image through the network there, attention included, widest first."""
    return {width: forward_cost(unet, width).total_macs for width in unet.widths}


def schedule_cost(schedule: StepSchedule, cost_per_width: Mapping[float, float]) -> float:
    """The cost of one image over the whole schedule, in the unit of `cost_per_width`.

    Raises:
        InputError: the schedule has a width that `cost_per_width` lacks.
    """
    total = 0.0
    for width, steps in schedule.width_counts().items():
        if width not in cost_per_width:
            raise invalid("widths", width, f"has no cost; known are {sorted(cost_per_width)}")
        total += steps * cost_per_width[width]
    return total


def cost_fraction(schedule: StepSchedule, cost_per_width: Mapping[float, float]) -> float:
    """The schedule's cost as a share of its own steps all run at the widest width."""
    full = len(schedule) * cost_per_width[max(cost_per_width)]
    return schedule_cost(schedule, cost_per_width) / full
