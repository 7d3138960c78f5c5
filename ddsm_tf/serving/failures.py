"""A failed call as an error that a user can act on."""

from __future__ import annotations

import re

from ddsm_tf.errors import ForeseenFailure, InputError, invalid
from ddsm_tf.serving.calls import CallFailed, ModelSpec

_REFUSED = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE")


def explain(
    error: CallFailed, target: str, model: ModelSpec, timeout: float, remedy: str
) -> Exception:
    """The error to raise for a failed call, one line.

    Args:
        error: the last attempt's.
        target: "HOST:PORT".
        model: that the call was for.
        timeout: seconds that the call had.
        remedy: the argument that makes messages smaller.

    Returns:
        `InputError` for what the server refuses, `ForeseenFailure` for a server that is away, too
        slow or broken.
    """
    reason = _reason(str(error))
    server = f"`target` (={target!r})"
    if error.code == "UNAVAILABLE":
        return ForeseenFailure(
            f"{server} cannot be reached or is busy: {reason} (attempts: {error.attempts}); "
            "check the address and port, and that the server has started"
        )
    if error.code == "DEADLINE_EXCEEDED":
        return ForeseenFailure(
            f"{server} did not answer in `timeout` (={timeout:g}) seconds; raise it or "
            f"make `{remedy}` smaller"
        )
    if error.code == "RESOURCE_EXHAUSTED":
        return ForeseenFailure(
            f"a message to or from {server} is too large, or its memory too small: {reason}; "
            f"make `{remedy}` smaller or raise `max_message_bytes`"
        )
    if error.code == "NOT_FOUND" or "version label" in reason:
        return invalid("model", describe(model), f"is not served by {target}: {reason}")
    if error.code in _REFUSED:
        return _refused(server, model, reason)
    return ForeseenFailure(f"{server} failed with {error.code}: {reason}")


def no_sampler(model: ModelSpec, reason: str) -> InputError:
    """The error for a model that lacks the sampler's or a denoiser's signatures."""
    rule = "is no model of `ddsm export RUN savedmodel --serving`, or is another of them"
    return invalid("model", describe(model), f"{rule}: {reason}")


def describe(model: ModelSpec) -> str:
    """Such as "ddsm, version 3"."""
    if model.version is not None:
        return f"{model.name}, version {model.version}"
    return f"{model.name}, label {model.label}" if model.label is not None else model.name


def _refused(server: str, model: ModelSpec, reason: str) -> InputError:
    if "ignature" in reason and "not found" in reason:
        return no_sampler(model, reason)
    message = f"{server} refused the request: {reason}"
    # The second is what REST says, of the server's `json_tensor.cc`.
    if "does not match signature" in reason or "named input" in reason:
        message += (
            "; a model with classes needs `labels`, one without takes none, and one of another "
            "release of ddsm_tf may differ: export it again"
        )
    return InputError(message)


def _reason(message: str) -> str:
    """One line of the server's message: the rule that was broken, if the model states one."""
    lines = [line.split("[[{{node")[0].strip() for line in message.splitlines()]
    rules = [re.search(r"assertion failed: \[(.*)\]", line) for line in lines]
    found = next(filter(None, rules), None)
    # TensorFlow escapes the quotes of a rule.
    return found[1].replace("\\'", "'") if found else next(filter(None, lines), "no message")
