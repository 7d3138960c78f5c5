"""A typed client of the models that `ddsm export RUN savedmodel --serving DIR` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ddsm_tf.errors import ForeseenFailure, invalid
from ddsm_tf.schedule import StepSchedule, width_name
from ddsm_tf.serving.arguments import check_integer, check_model, check_target, finite_rows
from ddsm_tf.serving.calls import (
    CallFailed,
    ModelSpec,
    Signature,
    VersionStatus,
    call_with_retries,
    read_signatures,
    read_status,
)
from ddsm_tf.serving.failures import explain, no_sampler
from ddsm_tf.serving.inputs import labels_of, rows_of_seed, schedule_inputs
from ddsm_tf.serving.transports import make_transport

Result = TypeVar("Result")

MAX_MESSAGE_BYTES = 64 * 2**20


def denoiser_model(model: str, width: float) -> str:
    """The name under which a sampler's denoiser of one width is served: `ddsm_unet_0_5`."""
    return f"{model}_{width_name(width)}"


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
        self._transport = make_transport(transport, target, max_message_bytes, tls)

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
        _check_batches(count, seed, batch_size)
        labels = labels_of(labels, count)
        parts = []
        for first in range(0, count, batch_size):
            inputs = rows_of_seed(seed, first, count, batch_size)
            if labels is not None:
                inputs["labels"] = labels[first : first + batch_size]
            parts.append(self._images("sample_images", inputs))
        return np.concatenate(parts)

    def sample_from_noise(
        self,
        noise: np.ndarray,
        *,
        labels: np.ndarray | int | None = None,
        batch_size: int = 16,
    ) -> np.ndarray:
        """Images of the exported schedule from the caller's noise.

        Args:
            noise: standard normal, (N, D, H, W, C): x_T, then the noise of every step that adds
                some. D is 1 for deterministic DDIM; the server refuses any other.
            labels: for a model with classes, and needed there: integers (N,), or one for all
                images. There are no classes in turn, for noise has no index.
            batch_size: images a call.

        Returns:
            uint8 (N, H, W, C).
        """
        check_integer("batch_size", batch_size, 1)
        noise = finite_rows("noise", noise, 5)
        labels = labels_of(labels, len(noise), in_turn=False)
        parts = []
        for first in range(0, len(noise), batch_size):
            inputs = {"noise": noise[first : first + batch_size]}
            if labels is not None:
                inputs["labels"] = labels[first : first + batch_size]
            parts.append(self._images("sample_noise", inputs))
        return np.concatenate(parts)

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
        _check_batches(count, seed, batch_size)
        labels = labels_of(labels, count)
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

        Models with classes need `labels`, integers (N,) in [0, K], K being "no class".

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
            inputs["labels"] = labels_of(labels, len(x), in_turn=False)
        noise = self._predict(model, "serve", inputs, np.float32, "x")
        return self._checked(noise, x.shape)

    def takes_labels(self) -> bool:
        """Whether the sampler is of a model with classes, which needs labels."""
        signature = self.signatures().get("sample_images")
        if signature is None:
            raise no_sampler(self.model, "it has no signature sample_images")
        return "labels" in signature.inputs

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
            raise explain(error, self.target, model, self.timeout, remedy) from error


def _check_batches(count: int, seed: int, batch_size: int) -> None:
    check_integer("count", count, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0, 2**63 - 1)
