"""What both transports share: whom a call is for, what it answers, how it fails, when to retry."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

Result = TypeVar("Result")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


@dataclass(frozen=True)
class ModelSpec:
    """The model that a call is for; the newest version unless `version` or `label` says which."""

    name: str
    version: int | None = None
    label: str | None = None


@dataclass(frozen=True)
class TensorInfo:
    """Name of the dtype, such as "int64", and shape; None is a free dimension."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one signature, by name."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


@dataclass(frozen=True)
class VersionStatus:
    """A version of a model, its state ("AVAILABLE", "LOADING", …) and its error, or ""."""

    version: int
    state: str
    error: str


class CallFailed(Exception):
    """A call that failed, with the name of its gRPC status code; REST answers are mapped to it."""

    attempts = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Transport(Protocol):
    """How calls get to a server. `timeout` is in seconds; every method raises `CallFailed`."""

    def predict(
        self,
        model: ModelSpec,
        signature: str,
        inputs: Mapping[str, np.ndarray],
        dtype: type,
        timeout: float,
    ) -> np.ndarray:
        """The one output of a signature, as `dtype`."""

    def signatures(self, model: ModelSpec, timeout: float) -> Mapping[str, Any]:
        """`SignatureDefMap.signature_def` in its JSON form."""

    def status(self, model: ModelSpec, timeout: float) -> Mapping[str, Any]:
        """`GetModelStatusResponse` in its JSON form."""

    def close(self) -> None:
        """Give up the connection."""


def call_with_retries(
    attempt: Callable[[float], Result],
    *,
    timeout: float,
    retries: int,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    jitter: Callable[[], float] = random.random,
) -> Result:
    """Call until it succeeds, fails for good, or time or retries are used up.

    Only UNAVAILABLE is tried again: the server was not reached or turned the call away. The pauses
    double from 0.1 s to at most 5 s, each shortened by up to half at random, so that clients that
    failed together do not come back together.

    Args:
        attempt: takes the seconds left; raises `CallFailed`.
        timeout: seconds for everything, pauses included.
        retries: further attempts after the first.

    Raises:
        CallFailed: the last attempt's, with the number of attempts.
    """
    deadline = clock() + timeout
    attempts = 0
    while True:
        attempts += 1
        try:
            return attempt(deadline - clock())
        except CallFailed as error:
            pause = min(FIRST_PAUSE * 2 ** (attempts - 1), LONGEST_PAUSE) * (1 - jitter() / 2)
            error.attempts = attempts
            if error.code != "UNAVAILABLE" or attempts > retries or clock() + pause >= deadline:
                raise
        sleep(pause)


def read_signatures(value: Mapping[str, Any]) -> dict[str, Signature]:
    """Signatures from the JSON form of `SignatureDefMap.signature_def`."""
    return {
        name: Signature(_read_tensors(entry["inputs"]), _read_tensors(entry["outputs"]))
        for name, entry in sorted(value.items())
        # TensorFlow's own entry, which initialises variables and has no inputs.
        if not name.startswith("__")
    }


def _read_tensors(value: Mapping[str, Any]) -> dict[str, TensorInfo]:
    return {name: _read_tensor(entry) for name, entry in sorted(value.items())}


def _read_tensor(entry: Mapping[str, Any]) -> TensorInfo:
    dtype = entry["dtype"].removeprefix("DT_").lower()
    # 64-bit integers are strings in protobuf's JSON; -1 is a free dimension.
    sizes = [int(dim["size"]) for dim in entry["tensor_shape"].get("dim", [])]
    shape = tuple(None if size < 0 else size for size in sizes)
    return TensorInfo("float32" if dtype == "float" else dtype, shape)


def read_status(value: Mapping[str, Any]) -> list[VersionStatus]:
    """Versions from the JSON form of `GetModelStatusResponse`, newest first."""
    versions = [
        VersionStatus(
            int(entry["version"]), entry["state"], entry.get("status", {}).get("error_message", "")
        )
        for entry in value.get("model_version_status", [])
    ]
    return sorted(versions, key=lambda status: status.version, reverse=True)
