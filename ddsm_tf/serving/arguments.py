"""What the client's arguments must be."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid


def check_target(target: str) -> None:
    """Raise `InputError` unless `target` is HOST:PORT."""
    rule = "must be HOST:PORT, such as localhost:8500"
    host = r"\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"
    found = re.fullmatch(rf"(?:{host}):(?P<port>\d{{1,5}})", str(target))
    if not found or not 0 < int(found["port"]) < 65536:
        raise invalid("target", target, rule)


def check_model(model: str, version: int | None, label: str | None) -> None:
    """Raise `InputError` unless the model may be called that, and is asked for in one way."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(model)):
        raise invalid("model", model, "must be letters, digits and . _ - behind a letter or digit")
    if version is not None and label is not None:
        raise InputError("`version` and `label` are both given; choose one")
    if version is not None:
        check_integer("version", version, 0, 2**63 - 1)
    if label is not None and not re.fullmatch(r"[A-Za-z0-9_]+", str(label)):
        raise invalid("label", label, "must hold letters, digits and _ only")


def check_integer(argument: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise `InputError` unless `value` is an integer in range."""
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        rule = f"must be an integer of at least {least}"
        raise invalid(argument, value, rule if most is None else f"{rule} and at most {most}")


def finite_rows(argument: str, value: np.ndarray, rank: int) -> np.ndarray:
    """`value` as an array; `InputError` unless it is float32, of the rank, finite and not empty."""
    value = np.asarray(value)
    if value.dtype != np.float32 or value.ndim != rank or not len(value):
        given = f"{value.dtype} {value.shape}"
        raise invalid(argument, given, f"must be float32 with {rank} axes and at least one row")
    if not np.isfinite(value).all():
        raise InputError(f"`{argument}` holds NaN or infinity")
    return value
