"""Configurations as flat, validated records: `key=value` texts, `config.json`, ranges."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys, read_json, write_json
from ddsm_tf.labels import MAX_CLASSES
from ddsm_tf.noise import PREDICTIONS
from ddsm_tf.schedule import MAX_GUIDANCE, SAMPLERS
from ddsm_tf.timesteps import SPACINGS

VERSION = 1


@dataclass(frozen=True)
class FlatConfig:
    """A record whose fields are texts, numbers, booleans, or tuples of one of them.

    Subclasses are frozen dataclasses that name their `FORMAT` and, in `SINCE`, what older files
    lack.

    Raises:
        InputError: a value has the wrong type or leaves its range.
    """

    FORMAT: ClassVar[str]
    SINCE: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _coerce(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)
            _check_range(field.name, value)

    def changed(self, assignments: Iterable[str]) -> Self:
        """A copy with `key=value` texts applied, as given to `--set`.

        Raises:
            InputError: unknown key, no "=", or a value that does not fit.
        """
        changes = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise invalid("--set", assignment, "must read key=value")
            changes[key] = _parse(key, text, self._field_type(key))
        return dataclasses.replace(self, **changes)

    @classmethod
    def _field_type(cls, key: str) -> str:
        types = {f.name: f.type for f in dataclasses.fields(cls) if f.name not in FILLED_IN}
        if key in types:
            return types[key]
        close = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(types)}"
        raise invalid("--set", key, f"is no field of the configuration; {hint}")

    def or_resumed(self, out: str | os.PathLike, resume: bool) -> Self:
        """Where changes start from: this configuration, or that of the run that goes on.

        Args:
            out: the run folder.
            resume: whether a run that is there goes on.

        Raises:
            InputError: its `config.json` is broken.
        """
        path = Path(out) / "config.json"
        if not resume or not path.exists():
            return self
        # What the command said stays, so that whoever opens the run can refuse another preset.
        said = {name: getattr(self, name) for name in FILLED_IN if hasattr(self, name)}
        return dataclasses.replace(self.load(path), **said)

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of `config.json`."""
        return {"format": self.FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def save(self, path: str | os.PathLike) -> None:
        """Write `config.json`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a `config.json`.

        Raises:
            InputError: it is missing, not JSON, of another format, or breaks a rule.
        """
        value = read_json(path, argument="config")
        required = {field.name for field in dataclasses.fields(cls)} - set(cls.SINCE)
        try:
            fields = check_keys(
                value, format=cls.FORMAT, version=VERSION, required=required, optional=cls.SINCE
            )
            return cls(**{**cls.SINCE, **fields})
        except InputError as error:
            raise InputError(f"config {path}: {error}") from error


# What commands say by their arguments and `--set` cannot.
FILLED_IN = ("preset", "tuned_from")
_CHOICES = {
    "noise_schedule": ("linear", "cosine", "edm"),
    "prediction": PREDICTIONS,
    "weighting": ("uniform", "min_snr", "min_snr_plus_one"),
    "sampler": SAMPLERS,
    "timestep_spacing": SPACINGS,
    "learning_rate_decay": ("constant", "cosine"),
    "mixed_precision": ("float32", "mixed_bfloat16"),
}
_AT_LEAST_ZERO = {"sample_every", "warmup_steps", "middle_widths", "held_out_images"}
_LIMITS = {
    "num_classes": (0, MAX_CLASSES),
    "label_dropout": (0, 1),
    "guidance_scale": (0, MAX_GUIDANCE),
    "channels": (1, 4),
    "dropout": (0, 1),
    "distillation": (0, 1),
    "ema_momentum": (0, 1),
    "seed": (0, 2**63 - 1),
    "train_timesteps": (1, 100_000),
}
_PARSERS = {"int": int, "float": float, "str": str}


def _parse(key: str, text: str, kind: str) -> Any:
    """The value of a `--set` text, by the field's type."""
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind.startswith("tuple"):
            item = _PARSERS[kind[6:].split(",")[0]]
            return tuple(item(part) for part in text.split(",") if part.strip())
        return _PARSERS[kind](text)
    except (ValueError, KeyError) as error:
        names = {"bool": "true or false", "int": "an integer", "float": "a number"}
        rule = names.get(kind, "numbers separated by commas")
        raise invalid("--set", f"{key}={text}", f"must be {rule}") from error


def _coerce(key: str, value: Any, kind: str) -> Any:
    """Check a value's type; whole numbers may stand for floats and lists for tuples."""
    if kind.startswith("tuple"):
        if not isinstance(value, (list, tuple)):
            raise invalid(key, value, "must be a list of numbers")
        item = kind[6:].split(",")[0]
        return tuple(_coerce(key, part, item) for part in value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    expected = {"int": int, "float": float, "str": str, "bool": bool}[kind]
    if not isinstance(value, expected) or (kind == "int" and isinstance(value, bool)):
        raise invalid(key, value, f"must be of the type {kind}")
    if kind == "float" and not math.isfinite(value):
        raise invalid(key, value, "must be finite")
    return value


def _check_range(key: str, value: Any) -> None:
    if key in _LIMITS:
        low, high = _LIMITS[key]
        if not low <= value <= high:
            raise invalid(key, value, f"must lie in [{low:g}, {high:g}]")
    elif key in _CHOICES:
        if value not in _CHOICES[key]:
            raise invalid(key, value, f"must be one of {', '.join(_CHOICES[key])}")
    elif key in _AT_LEAST_ZERO:
        if value < 0:
            raise invalid(key, value, "must be 0 or more")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
        raise invalid(key, value, "must be above 0")
