"""Step schedules: which timesteps a sampler visits and at which width the network runs there."""

from __future__ import annotations

import math
import numbers
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys, read_json, write_json

FORMAT = "ddsm-step-schedule"
VERSION = 1
SAMPLERS = ("ddim", "ddpm")
VARIANCES = ("fixed_large", "fixed_small")

_REQUIRED = {"train_timesteps", "sampler", "timesteps", "widths"}
_OPTIONAL = {"eta", "variance"}


def parse_width(text: str) -> float:
    """The width that a key of a JSON object names.

    Raises:
        InputError: it is no number in (0, 1].
    """
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 0.0 < width <= 1.0:
        raise invalid("widths", text, "must be a number in (0, 1]")
    return width


def width_name(width: float) -> str:
    """The file or folder name of a width without its suffix, such as `unet_0_5`."""
    return f"unet_{str(float(width)).replace('.', '_')}"


def even_timesteps(train_timesteps: int, steps: int) -> tuple[int, ...]:
    """`steps` timesteps spread evenly over [0, T), falling and ending at 0 (DDIM, appendix D.2).

    >>> even_timesteps(1000, 5)
    (800, 600, 400, 200, 0)
    """
    if not 1 <= steps <= train_timesteps:
        raise invalid("steps", steps, f"must lie in [1, train_timesteps (={train_timesteps})]")
    return tuple(i * train_timesteps // steps for i in reversed(range(steps)))


@dataclass(frozen=True)
class StepSchedule:
    """Timesteps in sampling order and the width of the network at each.

    Attributes:
        timesteps: strictly falling integers in [0, train_timesteps).
        widths: as many floats in (0, 1]; 1.0 is the whole network.
        train_timesteps: T of the noise table that the model was trained with.
        sampler: "ddim" (Song et al., 2021) or "ddpm" (Ho et al., 2020).
        eta: DDIM's stochasticity in [0, 1]; 0 is deterministic.
        variance: DDPM's noise variance, "fixed_large" (β) or "fixed_small" (β̃).

    Raises:
        InputError: any of these rules is broken.

    Example:
        >>> schedule = StepSchedule.uniform(0.5, even_timesteps(1000, 50))
        >>> schedule.save("schedule.json")
        >>> StepSchedule.load("schedule.json") == schedule
        True
    """

    timesteps: tuple[int, ...]
    widths: tuple[float, ...]
    train_timesteps: int = 1000
    sampler: str = "ddim"
    eta: float = 0.0
    variance: str = "fixed_large"

    def __post_init__(self) -> None:
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("variance", self.variance, VARIANCES)
        _check_integer("train_timesteps", self.train_timesteps)
        if not 1 <= self.train_timesteps <= 100_000:
            raise invalid("train_timesteps", self.train_timesteps, "must lie in [1, 100000]")
        if not _is_number(self.eta) or not 0.0 <= self.eta <= 1.0:
            raise invalid("eta", self.eta, "must lie in [0, 1]")
        object.__setattr__(self, "timesteps", _check_timesteps(self))
        object.__setattr__(self, "widths", _check_widths(self))
        object.__setattr__(self, "eta", float(self.eta))
        object.__setattr__(self, "train_timesteps", int(self.train_timesteps))

    @classmethod
    def uniform(cls, width: float, timesteps: Sequence[int], **fields: Any) -> StepSchedule:
        """One width at every step."""
        return cls(tuple(timesteps), (width,) * len(timesteps), **fields)

    def __len__(self) -> int:
        return len(self.timesteps)

    def with_widths(self, widths: Iterable[float]) -> StepSchedule:
        """The same steps at other widths."""
        return replace(self, widths=tuple(widths))

    def with_steps(self, timesteps: Iterable[int], widths: Iterable[float]) -> StepSchedule:
        """The same sampler over other timesteps and widths."""
        return replace(self, timesteps=tuple(timesteps), widths=tuple(widths))

    def width_counts(self) -> dict[float, int]:
        """How many steps run at each width, widest first."""
        return dict(sorted(Counter(self.widths).items(), reverse=True))

    def segments(self) -> list[tuple[float, int]]:
        """(width, number of steps) of each run of equal widths, in sampling order."""
        return [(width, len(list(run))) for width, run in groupby(self.widths)]

    def describe(self) -> str:
        """Such as "15 steps at 0.5, 10 steps at 1"."""
        return ", ".join(f"{steps} steps at {width:g}" for width, steps in self.segments())

    def check_model(self, widths: Iterable[float], train_timesteps: int) -> None:
        """Raise `InputError` unless a model with these widths and T can run the schedule."""
        known = sorted(set(widths), reverse=True)
        for width in self.width_counts():
            if width not in known:
                raise invalid("widths", width, f"is not a width of the model; it has {known}")
        if self.train_timesteps != train_timesteps:
            raise invalid(
                "train_timesteps",
                self.train_timesteps,
                f"differs from the model's {train_timesteps}; use a schedule made for this model",
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of `schedule.json`; sampler options stand in it where not the default."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "train_timesteps": self.train_timesteps,
            "sampler": self.sampler,
            "timesteps": list(self.timesteps),
            "widths": list(self.widths),
        }
        if self.eta != 0.0:
            value["eta"] = self.eta
        if self.variance != "fixed_large":
            value["variance"] = self.variance
        return value

    @classmethod
    def from_dict(cls, value: Any) -> StepSchedule:
        """Read what `to_dict` wrote.

        Raises:
            InputError: a key is missing or unknown, or a value breaks a rule.
        """
        fields = check_keys(
            value, format=FORMAT, version=VERSION, required=_REQUIRED, optional=_OPTIONAL
        )
        for key in ("timesteps", "widths"):
            if not isinstance(fields[key], list):
                raise invalid(key, fields[key], "must be a list")
            fields[key] = tuple(fields[key])
        return cls(**fields)

    def save(self, path: str | os.PathLike, *, overwrite: bool = True) -> None:
        """Write `schedule.json`, atomically."""
        write_json(path, self.to_dict(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike) -> StepSchedule:
        """Read a `schedule.json`.

        Raises:
            InputError: the file cannot be read or is not a valid schedule.
        """
        value = read_json(path, argument="schedule")
        try:
            return cls.from_dict(value)
        except InputError as error:
            raise InputError(f"schedule {path}: {error}") from error


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    # Comparisons are right for NaN and for integers too large for a float.
    return -math.inf < value < math.inf


def _check_integer(argument: str, value: object) -> None:
    # numpy integers are welcome; bool is an int in Python but not a timestep.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise invalid(argument, value, "must be an integer")


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise invalid(argument, value, f"must be one of {', '.join(choices)}")


def _check_timesteps(schedule: StepSchedule) -> tuple[int, ...]:
    timesteps = tuple(schedule.timesteps)
    if not timesteps:
        raise invalid("timesteps", timesteps, "must hold at least one timestep")
    for t in timesteps:
        _check_integer("timesteps", t)
        if not 0 <= t < schedule.train_timesteps:
            rule = f"must lie in [0, train_timesteps (={schedule.train_timesteps}))"
            raise invalid("timesteps", t, rule)
    for earlier, later in pairwise(timesteps):
        if later >= earlier:
            rule = "must fall strictly: no timestep may repeat or rise"
            raise invalid("timesteps", f"{earlier}, {later}", rule)
    return tuple(int(t) for t in timesteps)


def _check_widths(schedule: StepSchedule) -> tuple[float, ...]:
    widths = tuple(schedule.widths)
    if len(widths) != len(schedule.timesteps):
        rule = f"must be as many as the timesteps ({len(schedule.timesteps)})"
        raise invalid("widths", f"{len(widths)} values", rule)
    for width in widths:
        if not _is_number(width) or not 0.0 < width <= 1.0:
            raise invalid("widths", width, "must lie in (0, 1]")
    return tuple(float(width) for width in widths)
