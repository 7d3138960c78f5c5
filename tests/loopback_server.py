"""A stand-in for TensorFlow Serving on loopback: official protos, official session loader.

It loads a version as the server does, a session over the SavedModel's graph fed by the names in its
signatures, and answers with the server's own codes and rules for what the tests ask of it.
"""

import json
import re
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format, text_format
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?(:predict|/metadata)?")
HTTP = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503}
DEFAULT = "serving_default"


class Status(Exception):
    """A gRPC status."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


class Version:
    """One version of a model, in a session of its own."""

    def __init__(self, path, optimize):
        # The server optimises the graph, which takes seconds for each signature.
        config = tf.compat.v1.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = not optimize
        self.session = tf.compat.v1.Session(graph=tf.Graph(), config=config)
        with self.session.graph.as_default():
            meta = tf.compat.v1.saved_model.loader.load(self.session, ["serve"], str(path))
        self.signatures = dict(meta.signature_def)
        self.batches = (path / "batching_params.pbtxt").is_file()

    def predict(self, name, inputs, batching=False):
        """Outputs by name of inputs by name, NumPy both."""
        signature = self.signatures.get(name or DEFAULT)
        if signature is None:
            raise Status("FAILED_PRECONDITION", f'Serving signature key "{name}" not found.')
        if set(inputs) != set(signature.inputs):
            raise Status("INVALID_ARGUMENT", "input size does not match signature")
        for key, value in inputs.items():
            wanted = tf.as_dtype(signature.inputs[key].dtype)
            if tf.as_dtype(value.dtype) != wanted:
                raise Status("INVALID_ARGUMENT", f"Expects {key} to be {wanted.name}")
        if batching and self.batches:
            check_batch(inputs.values())
        feeds = {signature.inputs[key].name: value for key, value in inputs.items()}
        fetches = {key: info.name for key, info in signature.outputs.items()}
        try:
            return self.session.run(fetches, feeds)
        except tf.errors.OpError as error:
            # Python puts the trace of the node before the message that the server would send.
            message = re.split(r"Node: '.*'\n", error.message)[-1].split("\n\nOriginal stack")[0]
            raise Status("INVALID_ARGUMENT", message) from error
        except ValueError as error:
            raise Status("INVALID_ARGUMENT", str(error)) from error


def check_batch(values):
    """TensorFlow Serving's `ComputeTensorBatchSize`."""
    if any(np.ndim(value) == 0 for value in values):
        rule = "Batching Run() input tensors must have at least one dimension"
        raise Status("INVALID_ARGUMENT", rule)
    if len({len(value) for value in values}) > 1:
        rule = "Batching Run() input tensors must have equal 0th-dimension size"
        raise Status("INVALID_ARGUMENT", rule)


class LoopbackServer:
    """Serves `folder`/models.config, whose base paths must be true here, over gRPC and REST.

    Attributes:
        optimize: whether graphs are optimised, as a server does.
        failures: so many of the next calls fail with UNAVAILABLE.
        delay: seconds that each call takes longer.
        batching: whether models with batching parameters refuse what cannot be batched.
        requests: signature and largest number of rows of each Predict call that got through.
        calls: all calls, failed ones too.
    """

    def __init__(self, folder, max_receive_bytes=-1, grpc_port=0, rest_port=0, optimize=False):
        self.optimize = optimize
        config = text_format.Parse(
            (Path(folder) / "models.config").read_text(),
            model_server_config_pb2.ModelServerConfig(),
        )
        self.models = {entry.name: entry for entry in config.model_config_list.config}
        self._versions, self._lock = {}, threading.Lock()
        self.reset()
        self._grpc = grpc.server(
            futures.ThreadPoolExecutor(4),
            options=[
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        services = Services(self)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(services, self._grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(services, self._grpc)
        self.grpc = f"127.0.0.1:{self._grpc.add_insecure_port(f'127.0.0.1:{grpc_port}')}"
        self._grpc.start()
        handler = type("Handler", (RestHandler,), {"loopback": self})
        self._rest = ThreadingHTTPServer(("127.0.0.1", rest_port), handler)
        self.rest = f"127.0.0.1:{self._rest.server_address[1]}"
        threading.Thread(target=self._rest.serve_forever, daemon=True).start()

    def reset(self):
        self.failures, self.delay, self.batching = 0, 0.0, False
        self.calls, self.requests = 0, []

    def stop(self):
        self._grpc.stop(None)
        self._rest.shutdown()
        self._rest.server_close()

    def begin_call(self):
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise Status("UNAVAILABLE", "told to fail")
        time.sleep(self.delay)

    def numbers(self, name):
        """The versions of a model in its folder."""
        if name not in self.models:
            raise Status("NOT_FOUND", f"Servable not found for request: Latest({name})")
        children = Path(self.models[name].base_path).iterdir()
        return sorted(int(path.name) for path in children if path.name.isdigit())

    def version(self, name, number=None, label=None):
        numbers = self.numbers(name)
        if label:
            number = dict(self.models[name].version_labels).get(label)
            if number is None:
                rule = f"Unrecognized servable version label: {label}"
                raise Status("INVALID_ARGUMENT", rule)
        number = number or numbers[-1]
        if number not in numbers:
            raise Status("NOT_FOUND", f"Servable not found for request: Specific({name}, {number})")
        with self._lock:
            if (name, number) not in self._versions:
                path = Path(self.models[name].base_path) / str(number)
                self._versions[name, number] = Version(path, self.optimize)
        return self._versions[name, number]

    def predict(self, spec, signature, inputs):
        version = self.version(*spec)
        self.requests.append((signature, max(np.size(value) for value in inputs.values())))
        return version.predict(signature, inputs, self.batching)

    def metadata(self, spec):
        definitions = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in self.version(*spec).signatures.items():
            definitions.signature_def[name].CopyFrom(signature)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = spec[0]
        response.metadata["signature_def"].Pack(definitions)
        return response, definitions

    def status(self, spec):
        response = get_model_status_pb2.GetModelStatusResponse()
        for number in [spec[1]] if spec[1] else self.numbers(spec[0]):
            entry = response.model_version_status.add(version=number)
            entry.state = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        return response


def spec_of(message):
    number = message.version.value if message.HasField("version") else None
    return message.name, number, message.version_label or None


def answered(method):
    """Failures as the gRPC status that they are."""

    def call(self, request, context):
        try:
            self.loopback.begin_call()
            return method(self, request)
        except Status as error:
            context.abort(grpc.StatusCode[error.code], error.message)

    return call


class Services(
    prediction_service_pb2_grpc.PredictionServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
):
    """PredictionService and ModelService."""

    def __init__(self, loopback):
        self.loopback = loopback

    @answered
    def Predict(self, request):
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        name = request.model_spec.signature_name
        outputs = self.loopback.predict(spec_of(request.model_spec), name, inputs)
        response = predict_pb2.PredictResponse()
        for key, value in outputs.items():
            # The server answers with repeated fields unless a flag asks for raw bytes.
            tensor = response.outputs[key]
            tensor.dtype = tf.as_dtype(value.dtype).as_datatype_enum
            tensor.tensor_shape.CopyFrom(tf.TensorShape(value.shape).as_proto())
            field = tensor.int_val if value.dtype == np.uint8 else tensor.float_val
            field.extend(value.ravel().tolist())
        return response

    @answered
    def GetModelMetadata(self, request):
        return self.loopback.metadata(spec_of(request.model_spec))[0]

    @answered
    def GetModelStatus(self, request):
        return self.loopback.status(spec_of(request.model_spec))


class RestHandler(BaseHTTPRequestHandler):
    """The paths and bodies of TensorFlow Serving's REST API."""

    loopback = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(lambda spec, what: self._predict(spec, json.loads(body)))

    def _answer(self, action):
        try:
            self.loopback.begin_call()
            name, number, label, what = PATH.fullmatch(self.path).groups()
            code, value = 200, action((name, int(number) if number else None, label), what)
        except Status as error:
            code, value = HTTP[error.code], {"error": error.message}
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _get(self, spec, what):
        if not what:
            return to_dict(self.loopback.status(spec))
        return {"metadata": {"signature_def": to_dict(self.loopback.metadata(spec)[1])}}

    def _predict(self, spec, body):
        name = body.get("signature_name", "")
        signature = self.loopback.version(*spec).signatures.get(name or DEFAULT)
        if signature is None:
            rule = f'Serving signature name: "{name}" not found in signature def'
            raise Status("INVALID_ARGUMENT", rule)
        by_rows = "instances" in body
        given = by_name(body["instances"], signature) if by_rows else body["inputs"]
        for key in set(given) - set(signature.inputs):
            raise Status("INVALID_ARGUMENT", f"JSON object: does not have named input: {key}")
        inputs = {key: tensor(value, signature.inputs[key]) for key, value in given.items()}
        (output,) = self.loopback.predict(spec, name, inputs).values()
        return {"predictions" if by_rows else "outputs": output.tolist()}


def by_name(rows, signature):
    if not isinstance(rows[0], dict):
        (key,) = signature.inputs
        return {key: rows}
    return {key: [row[key] for row in rows] for key in rows[0]}


def tensor(value, info):
    """JSON as a tensor; the server takes no decimal number for an integer."""
    dtype = tf.as_dtype(info.dtype)
    array = np.asarray(value)
    if dtype.is_integer and array.dtype.kind != "i":
        raise Status("INVALID_ARGUMENT", f"JSON Value is not of expected type: {dtype.name}")
    return array.astype(dtype.as_numpy_dtype)


def to_dict(message):
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
