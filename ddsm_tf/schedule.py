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
SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpmpp_2m")
CHURNING = ("euler", "heun")
VARIANCES = ("fixed_large", "fixed_small")

_REQUIRED = {"train_timesteps", "sampler", "timesteps", "widths"}
# Sampler options stand in the file where they are not the default.
DEFAULTS: dict[str, Any] = {
    "eta": 0.0,
    "variance": "fixed_large",
    "churn": 0.0,
    "churn_min": 0.0,
    "churn_max": None,
    "churn_noise": 1.0,
    "guidance_scale": 1.0,
    "guidance_widths": None,
}
# The samplers of options that others would ignore.
OWNERS = {"eta": ("ddim",), "variance": ("ddpm",)}
OWNERS |= dict.fromkeys(("churn", "churn_min", "churn_max", "churn_noise"), CHURNING)
MAX_GUIDANCE = 1000.0


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

    A single step is the noisiest, T - 1: from t = 0 it would leave the noise as it is.

    >>> even_timesteps(1000, 5)
    (800, 600, 400, 200, 0)
    """
    if not 1 <= steps <= train_timesteps:
        raise invalid("steps", steps, f"must lie in [1, train_timesteps (={train_timesteps})]")
    if steps == 1:
        return (train_timesteps - 1,)
    return tuple(i * train_timesteps // steps for i in reversed(range(steps)))


@dataclass(frozen=True)
class StepSchedule:
    """Timesteps in sampling order and the width of the network at each.

    Attributes:
        timesteps: strictly falling integers in [0, train_timesteps).
        widths: as many floats in (0, 1]; 1.0 is the whole network.
        train_timesteps: T of the noise table that the model was trained with.
        sampler: "ddim" (Song et al., 2021), "ddpm" (Ho et al., 2020), "euler" or "heun" (Karras et
            al., 2022; Heun calls the network twice a step) or "dpmpp_2m" (Lu et al., 2022).
        eta: DDIM's stochasticity in [0, 1]; 0 is deterministic.
        variance: DDPM's noise variance, "fixed_large" (β) or "fixed_small" (β̃).
        churn, churn_min, churn_max, churn_noise: EDM's S_churn ≥ 0, S_tmin, S_tmax (noise levels σ;
            None is no limit) and S_noise, for "euler" and "heun".
        guidance_scale: classifier-free guidance of models with classes: how far the output moves
            from the unconditional to the conditional one; 1 is the conditional output alone.
        guidance_widths: the width of the unconditional branch at each step; None runs it at the
            step's own width.

    Options of other samplers must have their defaults.

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
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    churn_noise: float = 1.0
    guidance_scale: float = 1.0
    guidance_widths: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("variance", self.variance, VARIANCES)
        _check_integer("train_timesteps", self.train_timesteps)
        if not 1 <= self.train_timesteps <= 100_000:
            raise invalid("train_timesteps", self.train_timesteps, "must lie in [1, 100000]")
        object.__setattr__(self, "train_timesteps", int(self.train_timesteps))
        object.__setattr__(self, "timesteps", _check_timesteps(self))
        object.__setattr__(self, "widths", _check_widths("widths", self.widths, self.timesteps))
        self._check_number("eta", 1.0)
        for name in ("churn", "churn_min", "churn_noise"):
            self._check_number(name, 1e6)
        if self.churn_max is not None:
            self._check_number("churn_max", 1e6)
        self._check_owners()
        self._check_number("guidance_scale", MAX_GUIDANCE)
        self._check_guidance_widths()

    def _check_number(self, name: str, high: float) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not 0.0 <= value <= high:
            raise invalid(name, value, f"must lie in [0, {high:g}]")
        object.__setattr__(self, name, float(value))

    def _check_owners(self) -> None:
        for name, samplers in OWNERS.items():
            value = getattr(self, name)
            if value != DEFAULTS[name] and self.sampler not in samplers:
                rule = f"is for {' and '.join(samplers)}; {self.sampler} has no such option"
                raise invalid(name, value, rule)

    def _check_guidance_widths(self) -> None:
        if self.guidance_widths is None:
            return
        if not self.guided:
            raise invalid("guidance_widths", self.guidance_widths, "need a guidance_scale but 1")
        widths = _check_widths("guidance_widths", self.guidance_widths, self.timesteps)
        # One schedule has one form, so that equal schedules are equal.
        same = widths == self.widths
        object.__setattr__(self, "guidance_widths", None if same else widths)

    @classmethod
    def uniform(cls, width: float, timesteps: Sequence[int], **fields: Any) -> StepSchedule:
        """One width at every step."""
        return cls(tuple(timesteps), (width,) * len(timesteps), **fields)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def guided(self) -> bool:
        """Whether the network also runs without the class, for guidance."""
        return self.guidance_scale != 1.0

    @property
    def unconditional_widths(self) -> tuple[float, ...]:
        """The width of each step's unconditional branch; without guidance there is none to run."""
        return self.guidance_widths or self.widths

    def with_widths(
        self, widths: Iterable[float], guidance_widths: Iterable[float] | None = None
    ) -> StepSchedule:
        """The same steps at other widths; the unconditional branch follows them, if not told."""
        guidance_widths = None if guidance_widths is None else tuple(guidance_widths)
        return replace(self, widths=tuple(widths), guidance_widths=guidance_widths)

    def at_width(self, width: float) -> StepSchedule:
        """The same steps, all of them and both branches at one width."""
        return self.with_widths([width] * len(self))

    def with_steps(
        self,
        timesteps: Iterable[int],
        widths: Iterable[float],
        guidance_widths: Iterable[float] | None = None,
    ) -> StepSchedule:
        """The same sampler over other timesteps and widths."""
        guidance_widths = None if guidance_widths is None else tuple(guidance_widths)
        return replace(
            self,
            timesteps=tuple(timesteps),
            widths=tuple(widths),
            guidance_widths=guidance_widths,
        )

    def width_counts(self) -> dict[float, int]:
        """How many steps run at each width, widest first."""
        return dict(sorted(Counter(self.widths).items(), reverse=True))

    @property
    def calls_of_steps(self) -> tuple[int, ...]:
        """How often each step calls the network, without guidance: Heun's method but last twice."""
        often = 2 if self.sampler == "heun" else 1
        return (*(often,) * (len(self) - 1), 1)

    def call_counts(self) -> dict[float, int]:
        """How often an image goes through the network at each width, widest first.

        Guidance doubles the calls of every step.
        """
        calls: Counter[float] = Counter()
        branches = [self.widths, self.unconditional_widths] if self.guided else [self.widths]
        for widths in branches:
            for width, count in zip(widths, self.calls_of_steps, strict=True):
                calls[width] += count
        return dict(sorted(calls.items(), reverse=True))

    def timesteps_by_width(self) -> dict[float, tuple[int, ...]]:
        """Width → the timesteps of training in [0, T) at which the schedule uses it, widest first.

        A timestep that no step visits counts to the nearest that one does; halfway between two, to
        the less noisy one. Under guidance it counts to the widths of both branches.
        """
        halfway = [(noisier + t) // 2 for noisier, t in pairwise(self.timesteps)]
        # Of each step: the noisiest of its timesteps, and the noisiest of the next step's.
        borders = pairwise([self.train_timesteps - 1, *halfway, -1])
        found: dict[float, set[int]] = {}
        branches = (self.widths, self.unconditional_widths if self.guided else self.widths)
        for (noisiest, next_noisiest), *widths in zip(borders, *branches, strict=True):
            for width in widths:
                found.setdefault(width, set()).update(range(next_noisiest + 1, noisiest + 1))
        return {width: tuple(sorted(found[width])) for width in sorted(found, reverse=True)}

    def segments(self) -> list[tuple[float, int]]:
        """(width, number of steps) of each run of equal widths, in sampling order."""
        return [(width, len(list(run))) for width, run in groupby(self.widths)]

    def describe(self) -> str:
        """Such as "15 steps at 0.5, 10 steps at 1", and what the unconditional branch does."""
        text = _describe(self.widths)
        if self.guidance_widths:
            text += f"; without the class {_describe(self.guidance_widths)}"
        return text

    def check_model(self, widths: Iterable[float], train_timesteps: int) -> None:
        """Raise `InputError` unless a model with these widths and T can run the schedule."""
        known = sorted(set(widths), reverse=True)
        for width in self.call_counts():
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
        for name, default in DEFAULTS.items():
            option = getattr(self, name)
            if option != default:
                value[name] = list(option) if isinstance(option, tuple) else option
        return value

    @classmethod
    def from_dict(cls, value: Any) -> StepSchedule:
        """Read what `to_dict` wrote.

        Raises:
            InputError: a key is missing or unknown, or a value breaks a rule.
        """
        fields = check_keys(
            value, format=FORMAT, version=VERSION, required=_REQUIRED, optional=DEFAULTS
        )
        for key in {"timesteps", "widths", "guidance_widths"} & set(fields):
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


def _describe(widths: tuple[float, ...]) -> str:
    runs = ((width, len(list(run))) for width, run in groupby(widths))
    return ", ".join(f"{steps} steps at {width:g}" for width, steps in runs)


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


def _check_widths(
    name: str, values: Iterable[float], timesteps: Sequence[int]
) -> tuple[float, ...]:
    widths = tuple(values)
    if len(widths) != len(timesteps):
        rule = f"must be as many as the timesteps ({len(timesteps)})"
        raise invalid(name, f"{len(widths)} values", rule)
    for width in widths:
        if not _is_number(width) or not 0.0 < width <= 1.0:
            raise invalid(name, width, "must lie in (0, 1]")
    return tuple(float(width) for width in widths)
