"""A typed client of the models that `ddsm export RUN savedmodel --serving DIR` wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ddsm_tf.errors import ForeseenFailure, InputError, invalid
from ddsm_tf.schedule import StepSchedule, width_name
from ddsm_tf.serving.arguments import check_integer, check_model, check_target, finite_rows
from ddsm_tf.serving.calls import (
    CallFailed,
    ModelSpec,
    Signature,
    Transport,
    VersionStatus,
    call_with_retries,
    read_signatures,
    read_status,
)

Result = TypeVar("Result")

TRANSPORTS = ("grpc", "rest")
MAX_MESSAGE_BYTES = 64 * 2**20
REFUSED = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE")


def denoiser_model(model: str, width: float) -> str:
    """The name under which a sampler's denoiser of one width is served: `ddsm_unet_0_5`."""
    return f"{model}_{width_name(width)}"


def schedule_inputs(
    schedule: StepSchedule,
    count: int,
    seed: int,
    first: int = 0,
    labels: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Inputs of the signature `sample_schedule`, by name: images first … first + count - 1.

    With `labels`, int32 (count,) or (1,), those of a model with classes.
    """
    conditional = {}
    if labels is not None:
        conditional = {
            "guidance_scale": np.float32(schedule.guidance_scale),
            "guidance_widths": np.array(schedule.guidance_widths or (), np.float32),
            "labels": np.asarray(labels, np.int32),
        }
    return {
        "seed": np.int64(seed),
        "first": np.int64(first),
        "count": np.int64(count),
        "timesteps": np.array(schedule.timesteps, np.int32),
        "widths": np.array(schedule.widths, np.float32),
        "sampler": np.array(schedule.sampler),
        "eta": np.float32(schedule.eta),
        "variance": np.array(schedule.variance),
        "churn": np.float32(schedule.churn),
        "churn_min": np.float32(schedule.churn_min),
        # JSON has no infinity.
        "churn_max": np.float32(-1.0 if schedule.churn_max is None else schedule.churn_max),
        "churn_noise": np.float32(schedule.churn_noise),
        **conditional,
    }


class ServingClient:
    """Images from a model server.

    Args:
        target: "HOST:PORT"; usually port 8500 for gRPC, 8501 for REST.
        model: name of the sampler on the server.
        transport: "grpc" (the official stubs, which import TensorFlow) or "rest" (requests only).
        version: serve from this version; the server's newest if left out.
        label: serve from the version with this label; not together with `version`.
        timeout: seconds that one call may take, its retries included; a call makes one batch.
        retries: further attempts where the server is not reached or busy, with a growing pause.
        max_message_bytes: of one request and one answer.
        tls: False, True (the certificate authorities that certifi or gRPC brings) or a PEM file.

    Raises:
        InputError: an argument breaks its rule.
        MissingExtraError: the transport's package is not installed.

    Every method that calls the server raises `InputError` where the server refuses what was asked
    (no such model, version or signature, a bad value), and `ForeseenFailure` where it cannot be
    reached, is too slow, or the message is too large.

    Example:
        >>> with ServingClient("localhost:8500", label="stable") as client:
        ...     images = client.sample(64, seed=0)   # uint8 (64, H, W, C)
    """

    def __init__(
        self,
        target: str,
        *,
        model: str = "ddsm",
        transport: str = "grpc",
        version: int | None = None,
        label: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        tls: bool | str | Path = False,
    ) -> None:
        check_target(target)
        check_model(model, version, label)
        if transport not in TRANSPORTS:
            raise invalid("transport", transport, f"must be one of {', '.join(TRANSPORTS)}")
        if not 0 < timeout < float("inf"):
            raise invalid("timeout", timeout, "must be a finite number of seconds above 0")
        check_integer("retries", retries, 0)
        check_integer("max_message_bytes", max_message_bytes, 1024, 2**31 - 1)
        if isinstance(tls, str | Path):
            tls = Path(tls)
            if not tls.is_file():
                raise invalid("tls", str(tls), "must be a PEM file of certificate authorities")
        self.target = target
        self.model = ModelSpec(model, version, label)
        self.timeout, self.retries = timeout, retries
        self._transport = _make_transport(transport, target, max_message_bytes, tls)

    def __enter__(self) -> ServingClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connection."""
        self._transport.close()

    def sample(
        self,
        count: int,
        seed: int = 0,
        *,
        labels: np.ndarray | int | None = None,
        batch_size: int = 16,
    ) -> np.ndarray:
        """Images of the exported schedule: those of `DiffusionModel.sample` with the same seed.

        Uses the signature `sample_images`, which works with and without batching on the server.

        Args:
            count: number of images N.
            seed: in [0, 2**63); image i depends on seed, i and its class only.
            labels: for a model with classes, and needed there: integers (N,), one for all images,
                or `ddsm_tf.labels.IN_TURN`.
            batch_size: images a call.

        Returns:
            uint8 (N, H, W, C).
        """
        check_integer("count", count, 1)
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0, 2**63 - 1)
        labels = _labels_of(labels, count)
        parts = []
        for first in range(0, count, batch_size):
            inputs = _seeds(seed, first, count, batch_size)
            if labels is not None:
                inputs["labels"] = labels[first : first + batch_size]
            parts.append(self._images("sample_images", inputs))
        return np.concatenate(parts)

    def sample_from_noise(self, noise: np.ndarray, *, batch_size: int = 16) -> np.ndarray:
        """Images of the exported schedule from the caller's noise.

        Args:
            noise: standard normal, (N, D, H, W, C): x_T, then the noise of every step that adds
                some. D is 1 for deterministic DDIM; the server refuses any other.
            batch_size: images a call.

        Returns:
            uint8 (N, H, W, C).
        """
        check_integer("batch_size", batch_size, 1)
        noise = finite_rows("noise", noise, 5)
        return np.concatenate(
            [
                self._images("sample_noise", {"noise": noise[first : first + batch_size]})
                for first in range(0, len(noise), batch_size)
            ]
        )

    def sample_schedule(
        self,
        schedule: StepSchedule,
        count: int,
        seed: int = 0,
        *,
        labels: np.ndarray | int | None = None,
        batch_size: int = 16,
    ) -> np.ndarray:
        """Images of any schedule over the model's widths.

        The inputs are scalars, so a server that batches the sampler's requests refuses this.

        Args:
            schedule: must be made for the model's number of training timesteps.
            count: number of images N.
            seed: in [0, 2**63); image i depends on seed, i and its class only.
            labels: as for `sample`; a guided schedule needs them.
            batch_size: images a call.

        Returns:
            uint8 (N, H, W, C).

        Raises:
            InputError: the schedule is guided and there are no labels.
        """
        check_integer("count", count, 1)
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0, 2**63 - 1)
        labels = _labels_of(labels, count)
        if schedule.guided and labels is None:
            rule = "needs `labels`; models without classes cannot be guided"
            raise invalid("guidance_scale", schedule.guidance_scale, rule)
        parts = []
        for first in range(0, count, batch_size):
            rows = min(batch_size, count - first)
            own = None if labels is None else labels[first : first + rows]
            inputs = schedule_inputs(schedule, rows, seed, first, own)
            parts.append(self._images("sample_schedule", inputs, rows))
        return np.concatenate(parts)

    def denoise(
        self,
        x: np.ndarray,
        t: int | np.ndarray,
        width: float,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """The output for x, float32 (N, H, W, C), at timestep t, a scalar or (N,), of one width.

        Models with classes need `labels`, int32 (N,).

        Returns:
            float32 (N, H, W, C).
        """
        x = finite_rows("x", x, 4)
        if np.shape(t) not in ((), (len(x),)):
            raise invalid("t", f"of shape {np.shape(t)}", f"must be a scalar or ({len(x)},)")
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        name = denoiser_model(self.model.name, width)
        model = ModelSpec(name, self.model.version, self.model.label)
        inputs = {"x": x, "t": timesteps}
        if labels is not None:
            inputs["labels"] = _labels_of(labels, len(x))
        noise = self._predict(model, "serve", inputs, np.float32, "x")
        return self._checked(noise, x.shape)

    def signatures(self) -> dict[str, Signature]:
        """The sampler's signatures, by name."""
        return self._ask(self.model, self._transport.signatures, read_signatures)

    def status(self) -> list[VersionStatus]:
        """The sampler's versions on the server, newest first."""
        # The server answers for a version or for all; it does not look at labels here.
        model = ModelSpec(self.model.name, self.model.version)
        return self._ask(model, self._transport.status, read_status)

    def _ask(
        self, model: ModelSpec, ask: Callable[..., Any], read: Callable[[Any], Result]
    ) -> Result:
        """What the server tells of a model, read from its JSON form."""
        try:
            return read(self._call(model, lambda left: ask(model, left)))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ForeseenFailure(
                f"`target` (={self.target!r}) does not answer as TensorFlow Serving does"
            ) from error

    def _images(
        self,
        signature: str,
        inputs: Mapping[str, np.ndarray],
        rows: int | None = None,
    ) -> np.ndarray:
        images = self._predict(self.model, signature, inputs, np.uint8, "batch_size")
        rows = len(next(iter(inputs.values()))) if rows is None else rows
        return self._checked(images, (rows, *images.shape[1:]), rank=4)

    def _checked(self, array: np.ndarray, shape: tuple[int, ...], rank: int = 4) -> np.ndarray:
        if array.ndim != rank or array.shape != shape:
            raise ForeseenFailure(
                f"`target` (={self.target!r}) answered with an array of shape {array.shape}, not "
                f"of {shape[0]} images; is it a model of `ddsm export RUN savedmodel --serving`?"
            )
        return array

    def _predict(
        self,
        model: ModelSpec,
        signature: str,
        inputs: Mapping[str, np.ndarray],
        dtype: type,
        remedy: str,
    ) -> np.ndarray:
        def attempt(left: float) -> np.ndarray:
            return self._transport.predict(model, signature, inputs, dtype, left)

        return self._call(model, attempt, remedy)

    def _call(
        self, model: ModelSpec, attempt: Callable[[float], Result], remedy: str = "batch_size"
    ) -> Result:
        try:
            return call_with_retries(attempt, timeout=self.timeout, retries=self.retries)
        except CallFailed as error:
            raise self._explain(model, error, remedy) from error

    def _explain(self, model: ModelSpec, error: CallFailed, remedy: str) -> Exception:
        """The error that a user can act on."""
        reason = _reason(str(error))
        server = f"`target` (={self.target!r})"
        if error.code == "UNAVAILABLE":
            return ForeseenFailure(
                f"{server} cannot be reached or is busy: {reason} (attempts: {error.attempts}); "
                "check the address and port, and that the server has started"
            )
        if error.code == "DEADLINE_EXCEEDED":
            return ForeseenFailure(
                f"{server} did not answer in `timeout` (={self.timeout:g}) seconds; raise it or "
                f"make `{remedy}` smaller"
            )
        if error.code == "RESOURCE_EXHAUSTED":
            return ForeseenFailure(
                f"a message to or from {server} is too large, or its memory too small: {reason}; "
                f"make `{remedy}` smaller or raise `max_message_bytes`"
            )
        if error.code == "NOT_FOUND" or "version label" in reason:
            return invalid("model", _describe(model), f"is not served by {self.target}: {reason}")
        if error.code in REFUSED and "ignature" in reason and "not found" in reason:
            rule = "is no model of `ddsm export RUN savedmodel --serving`, or is another of them"
            return invalid("model", _describe(model), f"{rule}: {reason}")
        if error.code in REFUSED:
            return InputError(f"{server} refused the request: {reason}")
        return ForeseenFailure(f"{server} failed with {error.code}: {reason}")


def _make_transport(
    transport: str, target: str, max_message_bytes: int, tls: bool | Path
) -> Transport:
    if transport == "grpc":
        from ddsm_tf.serving.grpc_transport import GrpcTransport

        return GrpcTransport(target, max_message_bytes, tls)
    from ddsm_tf.serving.rest_transport import RestTransport

    return RestTransport(target, max_message_bytes, tls)


def _seeds(seed: int, first: int, count: int, batch_size: int) -> dict[str, np.ndarray]:
    index = np.arange(first, min(first + batch_size, count), dtype=np.int64)
    return {"seed": np.full(len(index), seed, np.int64), "index": index}


def _labels_of(labels: np.ndarray | int | None, count: int) -> np.ndarray | None:
    """int32 (count,), or None."""
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.shape not in ((), (count,)):
        raise invalid("labels", f"of shape {array.shape}", f"must be integers ({count},) or one")
    return np.broadcast_to(array, (count,)).astype(np.int32)


def _describe(model: ModelSpec) -> str:
    if model.version is not None:
        return f"{model.name}, version {model.version}"
    return f"{model.name}, label {model.label}" if model.label is not None else model.name


def _reason(message: str) -> str:
    """One line of the server's message: the rule that was broken, if the model states one."""
    lines = [line.split("[[{{node")[0].strip() for line in message.splitlines()]
    rules = [re.search(r"assertion failed: \[(.*)\]", line) for line in lines]
    found = next(filter(None, rules), None)
    # TensorFlow escapes the quotes of a rule.
    return found[1].replace("\\'", "'") if found else next(filter(None, lines), "no message")
