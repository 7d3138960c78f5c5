"""gRPC with the official stubs of tensorflow-serving-api."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import missing_extra
from ddsm_tf.serving.calls import CallFailed, ModelSpec

try:
    # The stubs' messages live in TensorFlow's wheel, so they import all of TensorFlow.
    import grpc
    import tensorflow as tf
    from google.protobuf.json_format import MessageToDict
    from tensorflow_serving.apis import (
        get_model_metadata_pb2,
        get_model_status_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
    )
except ImportError as error:
    raise missing_extra("tensorflow-serving-api", "serving") from error


class GrpcTransport:
    """See `ddsm_tf.serving.calls.Transport`.

    Args:
        target: "HOST:PORT".
        max_message_bytes: of a request and of an answer.
        tls: False, True (the package's own authorities) or a PEM file of certificate authorities.
    """

    def __init__(self, target: str, max_message_bytes: int, tls: bool | Path) -> None:
        options = [
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            # Retries are the client's, so that their number and deadline are exact.
            ("grpc.enable_retries", 0),
            # A channel that failed refuses calls unsent for up to two minutes by default.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if tls:
            authorities = None if tls is True else tls.read_bytes()
            credentials = grpc.ssl_channel_credentials(authorities)
            self._channel = grpc.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._model = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def predict(
        self,
        model: ModelSpec,
        signature: str,
        inputs: Mapping[str, np.ndarray],
        dtype: type,
        timeout: float,
    ) -> np.ndarray:
        request = predict_pb2.PredictRequest()
        _name(request.model_spec, model)
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        response = _call(self._prediction.Predict, request, timeout)
        if len(response.outputs) != 1:
            raise CallFailed("INTERNAL", f"{len(response.outputs)} outputs instead of one")
        (output,) = response.outputs.values()
        array = tf.make_ndarray(output)
        if array.dtype != dtype:
            raise CallFailed("INTERNAL", f"the answer is {array.dtype}, not {np.dtype(dtype)}")
        return array

    def signatures(self, model: ModelSpec, timeout: float) -> Mapping[str, Any]:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        _name(request.model_spec, model)
        response = _call(self._prediction.GetModelMetadata, request, timeout)
        definitions = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(definitions)
        return _to_dict(definitions)["signature_def"]

    def status(self, model: ModelSpec, timeout: float) -> Mapping[str, Any]:
        request = get_model_status_pb2.GetModelStatusRequest()
        _name(request.model_spec, model)
        return _to_dict(_call(self._model.GetModelStatus, request, timeout))

    def close(self) -> None:
        self._channel.close()


def _name(message: Any, model: ModelSpec) -> None:
    message.name = model.name
    if model.version is not None:
        message.version.value = model.version
    if model.label is not None:
        message.version_label = model.label


def _to_dict(message: Any) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _call(method: Any, request: Any, timeout: float) -> Any:
    try:
        return method(request, timeout=timeout)
    except grpc.RpcError as error:
        raise CallFailed(error.code().name, error.details() or "") from error
