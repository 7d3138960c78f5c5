"""TensorFlow Serving: the files it reads, and the client against a loopback server."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver
from conftest import NOISY_SCHEDULE, run_command
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from loopback_server import LoopbackServer, check_batch
from tensorflow.python.tools import saved_model_cli
from tensorflow_serving.apis import prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2

from ddsm_tf.errors import ForeseenFailure, InputError
from ddsm_tf.export import serving, width_name
from ddsm_tf.export.serving_files import server_flags
from ddsm_tf.export.warmup import WARMUP_FILE
from ddsm_tf.models import DiffusionModel
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.serving import ServingClient, TensorInfo, VersionStatus
from ddsm_tf.serving.calls import CallFailed, call_with_retries

TABLE = NoiseTable.linear(1000)
SHAPE = (8, 8, 1)
SEED = 2**40 + 3
MODELS = ["ddsm", "ddsm_unet_0_5", "ddsm_unet_1_0"]
TRANSPORTS = ["grpc", "rest"]
BOTH = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.fixture(scope="module")
def copied(tiny_savedmodels):
    """Models are copied instead of written: tracing them again would take half a minute each."""

    def sampler(unet, noise_table, schedule, path):
        assert schedule == NOISY_SCHEDULE and not Path(path).name.isdigit()
        shutil.copytree(tiny_savedmodels / "sampler" / "1", path, dirs_exist_ok=True)

    def denoisers(unet, folder):
        for width in unet.widths:
            shutil.copytree(tiny_savedmodels / width_name(width), folder / width_name(width))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "write_sampler", sampler)
        patch.setattr(serving, "write_savedmodels", denoisers)
        yield


@pytest.fixture
def export(copied, tiny_unet, tmp_path):
    def write(**options):
        return serving.write_serving(
            tiny_unet, TABLE, NOISY_SCHEDULE, tmp_path / "models", **options
        )

    return write


@pytest.fixture(scope="module")
def folder(copied, tiny_unet, tmp_path_factory):
    """Two versions whose denoisers are exchanged, with base paths that are true here."""
    folder = tmp_path_factory.mktemp("serving") / "models"
    for _ in range(2):
        serving.write_serving(tiny_unet, TABLE, NOISY_SCHEDULE, folder, mount=str(folder))
    narrow, wide = folder / "ddsm_unet_0_5", folder / "ddsm_unet_1_0"
    (narrow / "2").rename(folder / "kept")
    (wide / "2").rename(narrow / "2")
    (folder / "kept").rename(wide / "2")
    return folder


@pytest.fixture(scope="module")
def loopback(folder):
    server = LoopbackServer(folder)
    yield server
    server.stop()


@pytest.fixture
def server(loopback):
    loopback.reset()
    return loopback


@pytest.fixture(scope="module")
def model(tiny_unet):
    return DiffusionModel(tiny_unet, TABLE)


@pytest.fixture(scope="module")
def expected(model):
    return model.sample(NOISY_SCHEDULE, 7, seed=SEED)


def client_of(server, transport, **options):
    # Version 1 throughout, so that one sampler is loaded only.
    options = {"version": 1, "timeout": 60.0, **options}
    return ServingClient(getattr(server, transport), transport=transport, **options)


def share_within_one(images, expected):
    assert images.dtype == np.uint8 and images.shape == expected.shape
    return np.mean(np.abs(images.astype(int) - expected.astype(int)) <= 1)


# What is written


def models_config(folder):
    config = model_server_config_pb2.ModelServerConfig()
    text_format.Parse((folder / "models.config").read_text(), config)
    return {entry.name: entry for entry in config.model_config_list.config}


def test_models_config_names_every_model_and_labels_its_versions(export):
    assert export() == export().parent / "1"
    folder = export().parent.parent
    entries = models_config(folder)
    assert sorted(entries) == MODELS
    for name, entry in entries.items():
        assert entry.base_path == f"/models/{name}" and entry.model_platform == "tensorflow"
        assert entry.model_version_policy.WhichOneof("policy_choice") == "all"
        assert dict(entry.version_labels) == {"stable": 1, "canary": 3}
        assert sorted(path.name for path in (folder / name).iterdir()) == ["1", "2", "3"]


def test_another_export_keeps_what_is_there(export):
    folder = export(mount="/srv/m/").parent.parent
    (folder / "ddsm_unet_0_5" / "7").mkdir()
    (folder / "compose.yaml").write_text("mine")
    config = (folder / "models.config").read_text()
    mine = 'model_config_list { config { name: "mine" base_path: "/mine" }'
    (folder / "models.config").write_text(config.replace("model_config_list {", mine))
    first = {path: path.read_bytes() for path in folder.rglob("1/**/*") if path.is_file()}
    assert len(first) > 12
    assert export(label="stable") == folder / "ddsm" / "8"
    assert {path: path.read_bytes() for path in first} == first
    assert (folder / "compose.yaml").read_text() == "mine"
    entries = models_config(folder)
    assert entries["mine"].base_path == "/mine" and entries["ddsm"].base_path == "/srv/m/ddsm"
    assert dict(entries["ddsm"].version_labels) == {"stable": 8}
    assert "--model_config_file=/srv/m/models.config" in (folder / "kubernetes.yaml").read_text()


def test_a_version_appears_whole_or_not_at_all(export, monkeypatch):
    folder = export().parent.parent
    before = (folder / "models.config").read_bytes()
    seen = []

    def fails(path, model, requests):
        seen.extend(path.name for name in MODELS for path in (folder / name).iterdir())
        if model == "ddsm_unet_0_5":
            raise OSError("full")

    monkeypatch.setattr(serving, "write_warmup", fails)
    with pytest.raises(OSError, match="full"):
        export()
    # The server ignores names that are no numbers.
    assert {name for name in seen if name.isdigit()} == {"1"} and len(seen) > 6
    assert [path.name for name in MODELS for path in (folder / name).iterdir()] == ["1"] * 3
    assert (folder / "models.config").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("model_config_list {", {}, "is no ModelServerConfig"),
        ("custom_model_config {}", {}, "must have a model_config_list"),
        (
            'model_config_list { config { name: "ddsm" base_path: "/m/ddsm" '
            "model_version_policy { specific { versions: 1 } } } }",
            {},
            "`model_version_policy` of ddsm .*'specific'.* must be `all {}`",
        ),
        ("", {"label": "a-b"}, "`label` .='a-b'. must hold"),
        ("", {"model": "a/b"}, "`model` .='a/b'. must hold"),
        ("", {"mount": "models"}, "`mount` .='models'. must be an absolute path"),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_written(
    export, tmp_path, text, options, words
):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "models.config").write_text(text)
    with pytest.raises(InputError, match=words):
        export(**options)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["models.config"]


def warmup_requests(version):
    records = tf.data.TFRecordDataset(str(version / WARMUP_FILE)).as_numpy_iterator()
    logs = [prediction_log_pb2.PredictionLog.FromString(record) for record in records]
    assert all(log.WhichOneof("log_type") == "predict_log" for log in logs)
    return [log.predict_log.request for log in logs]


@pytest.mark.parametrize("model", MODELS)
def test_warm_up_replays_every_signature(server, folder, model):
    version = server.version(model, 1)
    names = []
    for request in warmup_requests(folder / model / "1"):
        assert request.model_spec.name == model
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        if version.batches:
            check_batch(inputs.values())
        (output,) = version.predict(request.model_spec.signature_name, inputs).values()
        assert output.shape == (1, *SHAPE) and output.std() > 0
        names.append(request.model_spec.signature_name)
    assert sorted(names) == sorted(set(version.signatures) - {"__saved_model_init_op"})


def test_a_batching_sampler_warms_up_what_can_be_batched(export):
    version = export(batch_sampler=True)
    assert (version / "batching_params.pbtxt").is_file()
    requests = warmup_requests(version)
    for request in requests:
        check_batch([tf.make_ndarray(value) for value in request.inputs.values()])
    names = [request.model_spec.signature_name for request in requests]
    assert names == ["sample_images", "sample_noise"]


def message(name, fields):
    """A message type that the official package lacks, by the server's field names and numbers."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package="t", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    kind = file.message_type.add(name=name)
    for field, number, type_name in fields:
        entry = kind.field.add(name=field, number=number, label=1)
        entry.type = {"bool": 8, "string": 9}.get(type_name, 11)
        if entry.type == 11:
            entry.type_name = f".google.protobuf.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    wrappers = descriptor_pb2.FileDescriptorProto()
    source = descriptor_pool.Default().FindFileByName("google/protobuf/wrappers.proto")
    source.CopyToProto(wrappers)
    pool.Add(wrappers)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}"))()


def test_batching_and_monitoring_are_in_the_server_s_own_format(folder):
    # session_bundle_config.proto and monitoring_config.proto of TensorFlow Serving.
    fields = [("max_batch_size", 1, "Int64Value"), ("batch_timeout_micros", 2, "Int64Value")]
    fields += [("max_enqueued_batches", 3, "Int64Value"), ("num_batch_threads", 4, "Int64Value")]
    fields += [("thread_pool_name", 5, "StringValue")]
    fields += [("enable_large_batch_splitting", 8, "BoolValue")]
    fields += [("max_execution_batch_size", 9, "Int64Value")]
    shared, own = message("BatchingParameters", fields), message("BatchingParameters", fields)
    text_format.Parse((folder / "batching.config").read_text(), shared)
    assert shared.num_batch_threads.value >= 1 and shared.thread_pool_name.value
    text_format.Parse((folder / "ddsm_unet_0_5/1/batching_params.pbtxt").read_text(), own)
    assert own.enable_large_batch_splitting.value
    assert own.max_batch_size.value >= own.max_execution_batch_size.value > 1
    assert not (folder / "ddsm/1/batching_params.pbtxt").exists()
    prometheus = message("PrometheusConfig", [("enable", 1, "bool"), ("path", 2, "string")])
    text = (folder / "monitoring.config").read_text()
    (inner,) = re.findall(r"^prometheus_config \{(.*)\}", text, re.DOTALL | re.MULTILINE)
    text_format.Parse(inner, prometheus)
    assert prometheus.enable and prometheus.path.startswith("/monitoring/")


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_deployment_files_agree_with_what_is_written(folder, name):
    text = (folder / name).read_text()
    assert "$" not in text and "\t" not in text
    written = re.findall(r'^ +- "(--.*)"$', text, re.MULTILINE)
    assert written == server_flags(str(folder))
    files = [flag.split("=")[1] for flag in written if "_file=" in flag]
    assert len(files) == 3 and all(Path(file).is_file() for file in files)
    assert re.search(rf"{re.escape(str(folder))}(:ro)?\"?$", text, re.MULTILINE)
    assert set(re.findall(r"\b85\d\d\b", text)) == {"8500", "8501"}
    if name == "kubernetes.yaml":
        assert re.findall(r"path: (\S+)", text) == ["/v1/models/ddsm/metadata", "/v1/models/ddsm"]
        for part in ("startupProbe", "readinessProbe", "livenessProbe", "requests", "limits"):
            assert f" {part}:\n" in text
    if importlib.util.find_spec("yaml"):
        import yaml

        assert all(yaml.safe_load_all(text))


def test_saved_model_cli_shows_the_signatures(folder):
    def show(*options):
        # In this process: the command takes seconds to start.
        with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()) as output:
            where = f"--dir={folder / 'ddsm' / '1'}"
            flags.FLAGS(["saved_model_cli", where, "--tag_set=serve", *options])
            saved_model_cli.show()
        return output.getvalue()

    keys = set(re.findall(r'SignatureDef key: "(\w+)"', show()))
    assert {"sample", "sample_images", "sample_noise", "sample_schedule"} < keys
    rows = show("--signature_def=sample_images")
    assert "Method name is: tensorflow/serving/predict" in rows
    for name in ("seed", "index"):
        assert re.search(rf"inputs\['{name}'\].*\n +dtype: DT_INT64\n +shape: \(-1\)\n", rows)
    assert re.search(r"\['images'\].*\n +dtype: DT_UINT8\n +shape: \(-1, 8, 8, 1\)\n", rows)


# The client


@BOTH
def test_images_are_those_of_the_model(server, expected, transport):
    with client_of(server, transport) as client:
        images = client.sample(7, seed=SEED, batch_size=3)
    assert expected.std() > 40
    assert share_within_one(images, expected) >= 0.999
    assert server.requests == [("sample_images", 3), ("sample_images", 3), ("sample_images", 1)]


@BOTH
def test_noise_survives_every_transport_exactly(server, expected, transport):
    source = ImageNoise(SEED, 0, 3, SHAPE)
    noise = np.stack([source.draw() for _ in range(10)], axis=1)
    client = client_of(server, transport)
    images = client.sample_from_noise(noise, batch_size=2)
    assert share_within_one(images, expected[:3]) >= 0.999
    x = np.float32(np.random.default_rng(0).standard_normal((2, *SHAPE)))
    given = client.denoise(x, np.array([3.0, 997.0]), 0.5)
    direct = server.version("ddsm_unet_0_5", 1)
    (wanted,) = direct.predict("serve", {"x": x, "t": np.float32([3, 997])}).values()
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-6)
    assert wanted.std() > 0.01


@BOTH
def test_a_schedule_of_the_caller_s_own(server, model, transport):
    schedule = StepSchedule.uniform(0.5, even_timesteps(1000, 6), sampler="ddpm")
    images = client_of(server, transport).sample_schedule(schedule, 3, SEED)
    wanted = model.sample(schedule, 3, seed=SEED)
    assert share_within_one(images, wanted) >= 0.999


@BOTH
def test_labels_choose_the_version(server, transport):
    x = np.ones((1, *SHAPE), np.float32)
    first, second = (
        client_of(server, transport, version=None, label=label) for label in ("stable", "canary")
    )
    # The denoisers of version 2 are exchanged.
    narrow, wide = first.denoise(x, 5, 0.5), first.denoise(x, 5, 1.0)
    assert np.abs(narrow - wide).max() > 0.01
    np.testing.assert_array_equal(second.denoise(x, 5, 0.5), wide)
    newest = client_of(server, transport, version=None)
    np.testing.assert_array_equal(newest.denoise(x, 5, 0.5), wide)


@BOTH
def test_status_and_signatures(server, transport):
    client = client_of(server, transport)
    assert client.status() == [VersionStatus(1, "AVAILABLE", "")]
    everything = client_of(server, transport, version=None, label="stable").status()
    assert [status.version for status in everything] == [2, 1]
    signatures = client.signatures()
    assert sorted(signatures) == [
        *("sample", "sample_images", "sample_noise", "sample_schedule", "serving_default")
    ]
    assert signatures["sample_images"].inputs["seed"] == TensorInfo("int64", (None,))
    assert signatures["sample_schedule"].inputs["sampler"] == TensorInfo("string", ())
    assert signatures["sample"].outputs == {"images": TensorInfo("uint8", (None, 8, 8, 1))}


@BOTH
def test_a_batching_server_serves_rows_and_refuses_scalars(server, expected, transport):
    server.batching = True
    version = server.version("ddsm", 1)
    version.batches = True
    try:
        client = client_of(server, transport)
        assert share_within_one(client.sample(2, SEED), expected[:2]) >= 0.999
        client.denoise(np.ones((2, *SHAPE), np.float32), 5, 0.5)
        with pytest.raises(InputError, match="must have at least one dimension"):
            client.sample_schedule(NOISY_SCHEDULE, 2)
    finally:
        version.batches = False


@BOTH
def test_an_unavailable_server_is_asked_again_so_many_times(server, transport):
    client = client_of(server, transport, retries=2)
    server.failures = 2
    assert client.status()
    assert (server.calls, server.failures) == (3, 0)
    server.reset()
    server.failures = 9
    with pytest.raises(ForeseenFailure, match=r"cannot be reached or is busy.*attempts: 3"):
        client.status()
    assert (server.calls, server.failures) == (3, 6)


@BOTH
def test_what_is_refused_is_not_asked_again(server, transport):
    client = client_of(server, transport)
    with pytest.raises(InputError, match=r"request: .?`noise` must have 10 draws"):
        client.sample_from_noise(np.zeros((1, 3, *SHAPE), np.float32))
    with pytest.raises(InputError, match=r"`widths` must be among the model's \[1.0, 0.5\]"):
        client.sample_schedule(StepSchedule((5,), (0.3,)), 1)
    assert server.calls == 2


@BOTH
def test_a_deadline_holds_for_retries_too(server, transport):
    server.delay = 1.5
    client = client_of(server, transport, timeout=0.4)
    started = time.monotonic()
    with pytest.raises(ForeseenFailure, match=r"`timeout` \(=0.4\) seconds"):
        client.status()
    assert 0.35 < time.monotonic() - started < 1.2
    assert server.calls == 1
    server.reset()
    server.failures = 1000
    client = client_of(server, transport, timeout=1.0, retries=1000)
    started = time.monotonic()
    with pytest.raises(ForeseenFailure, match="attempts: "):
        client.status()
    assert time.monotonic() - started < 1.2
    assert 3 <= server.calls <= 6


@BOTH
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "nope"}, r"`model` \(='nope, version 1'\) is not served"),
        ({"version": 9}, r"version 9'\) is not served"),
        ({"version": None, "label": "nope"}, r"label nope'\) is not served"),
        ({"model": "ddsm_unet_0_5"}, "is no model of .* --serving"),
    ],
)
def test_wrong_names_are_one_clear_line(server, transport, options, words):
    with pytest.raises(InputError, match=words) as raised:
        client_of(server, transport, **options).sample(1)
    assert "\n" not in str(raised.value) and server.calls == 1


@BOTH
def test_an_unreachable_server_is_one_clear_line(transport):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
    client = ServingClient(target, transport=transport, retries=1, timeout=20)
    with pytest.raises(ForeseenFailure, match=rf"{target}.*[Cc]onnection refused.*attempts: 2"):
        client.sample(1)


@BOTH
def test_large_messages_name_the_batch_size(server, transport):
    client = client_of(server, transport, max_message_bytes=4096)
    with pytest.raises(ForeseenFailure, match=r"too large.*make `batch_size` smaller"):
        client.sample(60, batch_size=60)
    assert client.sample(6, batch_size=3).shape == (6, *SHAPE)
    noise = np.ones((1, 30, *SHAPE), np.float32)
    server.reset()
    with pytest.raises(ForeseenFailure, match=r"too large.*make `batch_size` smaller"):
        client.sample_from_noise(noise)
    assert server.calls == 0


def test_the_server_s_own_limit_is_explained(folder):
    small = LoopbackServer(folder, max_receive_bytes=1024)
    try:
        with pytest.raises(ForeseenFailure, match=r"too large.*make `x` smaller"):
            client_of(small, "grpc").denoise(np.ones((9, *SHAPE), np.float32), 1, 0.5)
    finally:
        small.stop()


def test_pauses_double_and_stop_at_the_deadline():
    now, pauses, left = [0.0], [], []

    def attempt(seconds):
        left.append(seconds)
        raise CallFailed("UNAVAILABLE", "no")

    def sleep(seconds):
        pauses.append(round(seconds, 6))
        now[0] += seconds

    options = {"sleep": sleep, "clock": lambda: now[0], "jitter": lambda: 0.0}
    with pytest.raises(CallFailed) as raised:
        call_with_retries(attempt, timeout=1.0, retries=9, **options)
    assert pauses == [0.1, 0.2, 0.4] and raised.value.attempts == 4
    np.testing.assert_allclose(left, [1.0, 0.9, 0.7, 0.3])
    pauses.clear()
    options["jitter"] = lambda: 1.0
    with pytest.raises(CallFailed):
        call_with_retries(attempt, timeout=1e6, retries=8, **options)
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "localhost"}, "`target` .* must be HOST:PORT"),
        ({"target": "http://localhost:8501"}, "`target` .* must be HOST:PORT"),
        ({"target": "localhost:70000"}, "`target` .* must be HOST:PORT"),
        ({"transport": "soap"}, "`transport` .* must be one of grpc, rest"),
        ({"version": 1, "label": "stable"}, "choose one"),
        ({"version": -1}, "`version` .* at least 0"),
        ({"timeout": 0}, "`timeout`"),
        ({"timeout": float("nan")}, "`timeout`"),
        ({"retries": -1}, "`retries`"),
        ({"tls": "/none.pem"}, "`tls` .* PEM"),
    ],
)
def test_bad_arguments_of_the_client(options, words):
    with pytest.raises(InputError, match=words):
        ServingClient(**{"target": "localhost:8501", "transport": "rest", **options})


def test_bad_arguments_of_its_methods():
    client = ServingClient("localhost:1", transport="rest")
    for call in (
        lambda: client.sample(0),
        lambda: client.sample(1, seed=-1),
        lambda: client.sample(1, seed=2**63),
        lambda: client.sample(1, batch_size=0),
        lambda: client.sample_from_noise(np.zeros((1, *SHAPE), np.float32)),
        lambda: client.sample_from_noise(np.zeros((1, 1, *SHAPE))),
        lambda: client.denoise(np.full((1, *SHAPE), np.nan, np.float32), 0, 1.0),
    ):
        with pytest.raises(InputError):
            call()


# The commands


def test_serve_sample_writes_the_images(server, expected, tmp_path, capfd):
    from ddsm_tf.cli import run

    for transport in TRANSPORTS:
        out = tmp_path / f"{transport}.npy"
        arguments = ["--target", getattr(server, transport), "--transport", transport]
        arguments += ["--label", "stable", "-n", "5", "--seed", str(SEED), "-o", str(out)]
        assert run(["serve-sample", *arguments, "--batch", "4"]) == 0
        assert share_within_one(np.load(out), expected[:5]) >= 0.999
    assert [rows for _, rows in server.requests] == [4, 1] * 2
    NOISY_SCHEDULE.save(tmp_path / "schedule.json")
    out = tmp_path / "grid.png"
    arguments = [*arguments[:-1], str(out), "--schedule", str(tmp_path / "schedule.json")]
    assert run(["serve-sample", *arguments]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and server.requests[-1][0] == "sample_schedule"
    assert capfd.readouterr().err == ""


BAD = [
    (["serve-sample", "--target", "nowhere", "-o", "x.png"], 2, "must be HOST:PORT"),
    (["serve-sample", "--target", "a:1", "-o", "x.jpg"], 2, ".png"),
    (["serve-sample", "--target", "a:1", "-o", "x.png", "--timeout", "0"], 2, "`timeout`"),
    (["serve-sample", "--target", "a:1", "-o", "x.png", "--schedule", "no.json"], 2, "no.json"),
    (["serve-sample", "--target", "127.0.0.1:1", "--transport", "rest", "-o", "x.png"], 1, "busy"),
    (["export", "run", "savedmodel"], 2, "`-o` or `--serving` must be given"),
    (["export", "run", "savedmodel", "-o", "a", "--serving", "b"], 2, "and not both"),
    (["export", "run", "tflite", "--serving", "b"], 2, "`kind` (='tflite') must be savedmodel"),
    (["export", "run", "savedmodel", "--serving", "b", "--quantize", "float16"], 2, "quantize"),
    (["export", "run", "savedmodel", "--serving", "b", "--overwrite"], 2, "--overwrite"),
    (["export", "run", "savedmodel", "-o", "a", "--label", "stable"], 2, "`--label` belongs"),
    (["export", "run", "savedmodel", "-o", "a", "--batch-sampler"], 2, "`--batch-sampler` belongs"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD)
def test_bad_commands_are_one_line(tmp_path, monkeypatch, capfd, arguments, code, words):
    from ddsm_tf.cli import run

    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("ddsm: ") and err.count("\n") == 1 and words in err
    assert list(tmp_path.iterdir()) == []


def test_rest_does_not_need_tensorflow():
    code = (
        "import sys\n"
        "sys.modules['tensorflow'] = sys.modules['tensorflow_serving'] = None\n"
        "from ddsm_tf.serving import ServingClient\n"
        "ServingClient('localhost:1', transport='rest')\n"
        "ServingClient('localhost:1')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith(
        "tensorflow-serving-api is not installed; run: pip install 'ddsm_tf[serving]'\n"
    )


@pytest.mark.slow
def test_from_a_run_to_images_of_a_server(tiny_run, tmp_path):
    folder, out = tmp_path / "models", tmp_path / "served.npy"
    cli = "ddsm_tf.cli"
    for _ in range(2):
        arguments = ["export", tiny_run, "savedmodel", "--serving", folder, "--mount", folder]
        done = run_command(cli, *arguments)
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'ddsm' / '2'}\n"
    local = tmp_path / "local.npy"
    assert run_command(cli, "sample", tiny_run, "-n", 9, "-o", local).returncode == 0
    server = LoopbackServer(folder)
    try:
        done = run_command(cli, "serve-sample", "--target", server.grpc, "-n", 9, "-o", out)
    finally:
        server.stop()
    assert (done.returncode, done.stderr) == (0, "")
    assert share_within_one(np.load(out), np.load(local)) >= 0.999


# A real server


@pytest.fixture
def real_server(folder, tmp_path):
    """{transport: target} of a server named by the environment; see docs/serving.md."""
    if target := os.environ.get("DDSM_SERVING_TARGET"):
        yield {"grpc": target}
        return
    binary = os.environ.get("TENSORFLOW_MODEL_SERVER")
    if not binary:
        pytest.skip("set TENSORFLOW_MODEL_SERVER to a binary or DDSM_SERVING_TARGET to HOST:PORT")
    ports = {}
    for transport in TRANSPORTS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[transport] = free.getsockname()[1]
    where = [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [binary, *where, *server_flags(str(folder))], stdout=log, stderr=log
        )
    try:
        targets = {transport: f"127.0.0.1:{port}" for transport, port in ports.items()}
        ServingClient(targets["grpc"], timeout=240, retries=1000).status()
        yield targets
    finally:
        process.terminate()
        process.wait(30)
        print((tmp_path / "log").read_text()[-4000:])


@pytest.mark.timeout(600)
def test_a_real_server(real_server, expected):
    for transport, target in real_server.items():
        client = ServingClient(target, transport=transport, timeout=240)
        assert "AVAILABLE" in [status.state for status in client.status()]
        wanted = {"sample", "sample_images", "sample_noise", "sample_schedule", "serving_default"}
        assert wanted <= set(client.signatures())
        images = client.sample(7, SEED, batch_size=3)
        np.testing.assert_array_equal(client.sample(2, SEED), images[:2])
        if "rest" in real_server:
            assert share_within_one(images, expected) >= 0.999
            assert client.denoise(np.ones((2, *SHAPE), np.float32), 5, 0.5).std() > 0
            assert len(client.sample_schedule(NOISY_SCHEDULE, 2, SEED)) == 2
