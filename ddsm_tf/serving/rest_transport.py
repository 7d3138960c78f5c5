"""REST with requests; TensorFlow is not needed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import missing_extra
from ddsm_tf.serving.calls import CallFailed, ModelSpec

try:
    import requests
    import urllib3
except ImportError as error:
    raise missing_extra("requests", "serving") from error

# TensorFlow Serving's own mapping, read backwards (`http_server.cc`), and what proxies answer.
CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "UNAVAILABLE",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
CHUNK_BYTES = 64 * 1024


class RestTransport:
    """See `ddsm_tf.serving.calls.Transport`.

    Args:
        target: "HOST:PORT".
        max_message_bytes: of a request and of an answer.
        tls: False, True (the package's own authorities) or a PEM file of certificate authorities.
    """

    def __init__(self, target: str, max_message_bytes: int, tls: bool | Path) -> None:
        self._url = f"{'https' if tls else 'http'}://{target}/v1/models/"
        self._max_bytes = max_message_bytes
        self._session = requests.Session()
        # A session's own `verify` would lose to environment variables.
        self._verify = str(tls) if isinstance(tls, Path) else None

    def predict(
        self,
        model: ModelSpec,
        signature: str,
        inputs: Mapping[str, np.ndarray],
        dtype: type,
        timeout: float,
    ) -> np.ndarray:
        body = json.dumps({"signature_name": signature, **_json_inputs(inputs)}).encode()
        if len(body) > self._max_bytes:
            raise CallFailed("RESOURCE_EXHAUSTED", f"a request of {len(body)} bytes")
        answer = self._call("POST", _path(model) + ":predict", timeout, body)
        values = answer["predictions"] if "predictions" in answer else answer.get("outputs")
        return _to_array(values, dtype)

    def signatures(self, model: ModelSpec, timeout: float) -> Mapping[str, Any]:
        answer = self._call("GET", _path(model) + "/metadata", timeout)
        return answer["metadata"]["signature_def"]["signature_def"]

    def status(self, model: ModelSpec, timeout: float) -> Mapping[str, Any]:
        return self._call("GET", _path(model), timeout)

    def close(self) -> None:
        self._session.close()

    def _call(self, method: str, path: str, timeout: float, body: bytes | None = None) -> Any:
        deadline = time.monotonic() + timeout
        try:
            options = {"data": body, "timeout": timeout, "stream": True, "verify": self._verify}
            with self._session.request(method, self._url + path, **options) as response:
                text = self._read(response, deadline)
        except requests.exceptions.Timeout as error:
            raise CallFailed("DEADLINE_EXCEEDED", "no answer in time") from error
        except requests.exceptions.SSLError as error:
            raise CallFailed("INTERNAL", f"TLS failed: {error}") from error
        except requests.exceptions.ConnectionError as error:
            raise _connection_failed(error) from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise CallFailed("INTERNAL", f"the answer broke off: {_reason(error)}") from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise CallFailed("INTERNAL", _reason(error)) from error
        return _parse(response.status_code, text)

    def _read(self, response: requests.Response, deadline: float) -> bytes:
        """The body, up to the limit and the deadline; requests bounds each read, not their sum."""
        parts, size = [], 0
        for part in response.iter_content(CHUNK_BYTES):
            size += len(part)
            if size > self._max_bytes:
                raise CallFailed("RESOURCE_EXHAUSTED", f"an answer of over {size} bytes")
            if time.monotonic() > deadline:
                raise CallFailed("DEADLINE_EXCEEDED", "the answer did not end in time")
            parts.append(part)
        return b"".join(parts)


def _path(model: ModelSpec) -> str:
    if model.version is not None:
        return f"{model.name}/versions/{model.version}"
    return f"{model.name}/labels/{model.label}" if model.label is not None else model.name


def _json_inputs(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inputs as JSON: by rows where they have rows, else by name.

    The server indents an answer by name, a line for each number, and writes rows compactly. A
    float32 becomes a float64 of the same value, whose digits survive any parser's last-digit error.
    """
    lists = {name: np.asarray(value).tolist() for name, value in inputs.items()}
    sizes = {np.shape(value)[:1] for value in inputs.values()}
    if len(sizes) > 1 or sizes == {()}:
        return {"inputs": lists}
    if len(lists) == 1:
        return {"instances": next(iter(lists.values()))}
    rows = zip(*lists.values(), strict=True)
    return {"instances": [dict(zip(lists, row, strict=True)) for row in rows]}


def _to_array(values: Any, dtype: type) -> np.ndarray:
    try:
        array = np.asarray(values)
        # JSON has no dtypes: a number that the dtype cannot hold would wrap round.
        if np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            if array.dtype.kind != "i" or array.min() < limits.min or array.max() > limits.max:
                raise ValueError("not integers in range")
        return array.astype(dtype)
    except (TypeError, ValueError) as error:
        raise CallFailed("INTERNAL", f"the answer holds no {np.dtype(dtype)} array") from error


def _parse(status: int, text: bytes) -> Any:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if status == 200 and isinstance(answer, dict):
        return answer
    # The server says with 429 that memory or a quota is used up; a proxy that it is busy.
    if status == 429 and isinstance(answer, dict) and "error" in answer:
        status = 413
    message = (
        answer.get("error") if isinstance(answer, dict) else text[:200].decode(errors="replace")
    )
    raise CallFailed(CODES.get(status, "INTERNAL"), f"{message or 'no message'} (HTTP {status})")


def _connection_failed(error: Exception) -> CallFailed:
    # A body that stops in the middle counts as a connection error, too.
    if isinstance(error.__context__, urllib3.exceptions.ReadTimeoutError):
        return CallFailed("DEADLINE_EXCEEDED", "the answer did not end in time")
    return CallFailed("UNAVAILABLE", _reason(error))


def _reason(error: Exception) -> str:
    """The innermost cause, such as "Connection refused"; the outer ones repeat the URL."""
    cause: Any = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return getattr(cause, "strerror", None) or str(cause)
