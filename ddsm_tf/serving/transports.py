"""Which transports there are; each is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path

from ddsm_tf.errors import invalid
from ddsm_tf.serving.calls import Transport

TRANSPORTS = ("grpc", "rest")


def make_transport(
    transport: str, target: str, max_message_bytes: int, tls: bool | Path
) -> Transport:
    """The transport of a name; the other arguments are those of `GrpcTransport`.

    Raises:
        InputError: there is none of that name.
        MissingExtraError: its package is not installed.
    """
    if transport not in TRANSPORTS:
        raise invalid("transport", transport, f"must be one of {', '.join(TRANSPORTS)}")
    if transport == "grpc":
        from ddsm_tf.serving.grpc_transport import GrpcTransport

        return GrpcTransport(target, max_message_bytes, tls)
    from ddsm_tf.serving.rest_transport import RestTransport

    return RestTransport(target, max_message_bytes, tls)
