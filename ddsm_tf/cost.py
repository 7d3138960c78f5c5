"""What a step costs at each width, and what a schedule costs in all.

Multiply-accumulate operations (MACs) are counted by running the network's own code on shapes
without values: every layer reports its work to the tally that is open, so the count cannot
drift from the architecture. The paper's GFLOPs are 2 · MACs / 10⁹ without attention's matrix
products.

MACs overstate what a narrow width saves: it also moves memory and starts operators. Where time is
what counts, measure it (`ddsm latency`) and take that as the cost.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys, read_json
from ddsm_tf.latency import FORMAT, VERSION
from ddsm_tf.schedule import StepSchedule, parse_width


@dataclass
class Cost:
    """One forward pass for one image.

    Attributes:
        macs: multiply-accumulates of convolutions and dense layers (the paper's convention).
        attention_macs: multiply-accumulates of attention's two matrix products.
        parameters: weights that the pass reads.
        activations: values that the layers put out.
    """

    macs: int = 0
    attention_macs: int = 0
    parameters: int = 0
    activations: int = 0

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


def report(
    *, macs: int = 0, attention_macs: int = 0, parameters: int = 0, activations: int = 0
) -> None:
    """Called by layers: add to the open tally, if there is one."""
    cost = _open_tally.get()
    if cost is not None:
        cost.macs += macs
        cost.attention_macs += attention_macs
        cost.parameters += parameters
        cost.activations += activations


def forward_cost(unet: Any, width: float) -> Cost:
    """The cost of one image through a `SlimmableUNet` at `width`.

    Raises:
        InputError: `width` is not one of the network's.
    """
    import keras

    image = keras.KerasTensor((1, *unet.image_shape))
    timestep = keras.KerasTensor((1,))
    labels = keras.KerasTensor((1,), "int32") if unet.num_classes else None
    with tally() as cost:
        unet(image, timestep, labels, width=width)
    return cost


def macs_per_width(unet: Any) -> dict[float, int]:
    """Width → MACs of one image through the network there, attention included, widest first."""
    return {width: forward_cost(unet, width).total_macs for width in unet.widths}


def cost_per_width(measure: str, unet: Any) -> dict[float, float]:
    """Width → what one step costs there, widest first, by the measure that `--cost` names.

    Args:
        measure: "macs" (multiply-accumulates of one image, attention included), "parameters"
            (weights that one pass reads) or "latency:FILE" (milliseconds a step, as `ddsm latency`
            or `ddsm-edge benchmark --json` measured them; a narrower width may be the slower one).
        unet: the `SlimmableUNet`.

    Raises:
        InputError: another measure, or see `read_latency`.
    """
    if measure == "macs":
        return {width: float(macs) for width, macs in macs_per_width(unet).items()}
    if measure == "parameters":
        return {width: float(forward_cost(unet, width).parameters) for width in unet.widths}
    return read_latency(measure, unet.widths)


def read_latency(measure: str, widths: Sequence[float]) -> dict[float, float]:
    """Width → median milliseconds a step, of `latency:FILE`.

    Args:
        measure: "latency:FILE".
        widths: those to look up; the file may have more.

    Raises:
        InputError: `measure` is none that there is, the file cannot be read or is of another
            format, it lacks one of the widths, or holds one that is not in (0, 1] or whose median
            is not a positive number.
    """
    kind, _, path = measure.partition(":")
    if kind != "latency" or not path:
        raise invalid("--cost", measure, "must be macs, parameters or latency:FILE")
    content = read_json(path, argument="latency")
    try:
        medians = _medians(content)
    except InputError as error:
        raise InputError(f"latency {path}: {error}") from error
    for width in widths:
        if width not in medians:
            raise invalid("latency", path, f"has no widths.{width}.median_ms; see `ddsm latency`")
    return {width: medians[width] for width in widths}


def _medians(content: Any) -> dict[float, float]:
    # A table written by hand need not say what it is; one that does must be what is read here.
    if isinstance(content, Mapping) and {"format", "version"} & set(content):
        check_keys(content, format=FORMAT, version=VERSION, required=["widths"], optional=content)
    rows = content.get("widths") if isinstance(content, Mapping) else None
    if not isinstance(rows, Mapping):
        rule = "must map every width to its median_ms; see `ddsm latency`"
        raise invalid("widths", rows, rule)
    return {parse_width(text): _median(text, row) for text, row in rows.items()}


def _median(text: str, row: Any) -> float:
    median = row.get("median_ms") if isinstance(row, Mapping) else None
    # True equals 1 in Python and is no time. JSON's integers may be too long for a float.
    is_number = isinstance(median, (int, float)) and not isinstance(median, bool)
    if not is_number or not 0 < median <= sys.float_info.max:
        raise invalid("median_ms", median, f"of width {text} must be a positive number")
    return float(median)


def schedule_cost(schedule: StepSchedule, costs: Mapping[float, float]) -> float:
    """The cost of one image over the whole schedule, in the unit of `costs`.

    Args:
        schedule: timesteps and widths.
        costs: width → cost of a network call; see `cost_per_width`.

    Raises:
        InputError: the schedule has a width that `costs` lacks.
    """
    total = 0.0
    for width, calls in schedule.call_counts().items():
        if width not in costs:
            raise invalid("widths", width, f"has no cost; known are {sorted(costs)}")
        total += calls * costs[width]
    return total


def cost_fraction(schedule: StepSchedule, costs: Mapping[float, float]) -> float:
    """The schedule's cost as a share of its own steps all run at the widest width."""
    return schedule_cost(schedule, costs) / schedule_cost(schedule.at_width(max(costs)), costs)
