"""The client of a model server, against a loopback implementation of the official protos."""

import socket
import socketserver
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests
import tensorflow as tf
from conftest import NOISY_SCHEDULE, run_command
from loopback_server import LoopbackServer, check_batch
from serving_fixtures import MODELS, SHAPE, TABLE, TRANSPORTS, share_within_one, warmup_requests

from ddsm_tf.errors import ForeseenFailure, InputError
from ddsm_tf.models import DiffusionModel
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.serving import ServingClient, TensorInfo, VersionStatus
from ddsm_tf.serving.calls import CallFailed, call_with_retries

SEED = 2**40 + 3
BOTH = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.fixture(scope="module")
def loopback(served_folder):
    server = LoopbackServer(served_folder)
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


@pytest.mark.parametrize("model", MODELS)
def test_warm_up_replays_every_signature(server, served_folder, model):
    version = server.version(model, 1)
    names = []
    for request in warmup_requests(served_folder / model / "1"):
        assert request.model_spec.name == model
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        if version.batches:
            check_batch(inputs.values())
        (output,) = version.predict(request.model_spec.signature_name, inputs).values()
        assert output.shape == (1, *SHAPE) and output.std() > 0
        names.append(request.model_spec.signature_name)
    assert sorted(names) == sorted(set(version.signatures) - {"__saved_model_init_op"})


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
    images = client_of(server, transport).sample_schedule(schedule, 3, SEED, batch_size=2)
    wanted = model.sample(schedule, 3, seed=SEED)
    assert share_within_one(images, wanted) >= 0.999
    assert [signature for signature, _ in server.requests] == ["sample_schedule"] * 2


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
    assert 0.35 < time.monotonic() - started < 1.45
    assert server.calls == 1
    server.reset()
    server.failures = 1000
    client = client_of(server, transport, timeout=1.0, retries=1000)
    started = time.monotonic()
    with pytest.raises(ForeseenFailure, match="attempts: "):
        client.status()
    assert time.monotonic() - started < 2.0
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


def test_the_server_s_own_limit_is_explained(served_folder):
    small = LoopbackServer(served_folder, max_receive_bytes=1024)
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
        ({"target": "a..b:80"}, "`target` .* must be HOST:PORT"),
        ({"target": "..:80"}, "`target` .* must be HOST:PORT"),
        ({"model": ".."}, "`model` .* behind a letter or digit"),
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
        lambda: client.sample_schedule(NOISY_SCHEDULE, 1, batch_size=0),
        lambda: client.denoise(np.ones((2, *SHAPE), np.float32), np.arange(3), 1.0),
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
    (["export", "run", "savedmodel", "--serving", "b", "--sparsity", "0.7"], 2, "`--sparsity` bel"),
    (["export", "run", "savedmodel", "--serving", "b", "--batch", "2"], 2, "`--batch` belongs"),
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


class Answer(socketserver.StreamRequestHandler):
    """Answers one request with `content` and hangs up."""

    content = b""

    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(self.content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{", "INTERNAL: .*broke off|busy"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{", "broke off"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            "does not answer as TensorFlow S",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "hello"),
        (b'HTTP/1.1 429 X\r\nContent-Length: 16\r\n\r\n{"error": "full"}'[:-1], "busy"),
        (b'HTTP/1.1 429 X\r\nContent-Length: 17\r\n\r\n{"error": "full"}', "too small: full"),
        (b"no HTTP at all\r\n\r\n", "`target`"),
    ],
)
def test_what_is_no_answer_is_one_clear_line(content, words):
    handler = type("Handler", (Answer,), {"content": content})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = f"127.0.0.1:{server.server_address[1]}"
        client = ServingClient(target, transport="rest", retries=0, timeout=20)
        with pytest.raises(ForeseenFailure, match=words) as raised:
            client.signatures()
        server.shutdown()
    assert "\n" not in str(raised.value)


def test_the_authorities_named_are_the_authorities_used(tmp_path, monkeypatch):
    given, other = tmp_path / "given.pem", tmp_path / "other.pem"
    for path in (given, other):
        path.write_text("")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(other))
    client = ServingClient("localhost:1", transport="rest", tls=given, retries=0)
    session, seen = client._transport._session, []

    def send(request, **options):
        seen.append(options["verify"])
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(session, "send", send)
    with pytest.raises(ForeseenFailure):
        client.status()
    assert seen == [str(given)]


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
    server = LoopbackServer(folder, optimize=True)
    try:
        done = run_command(cli, "serve-sample", "--target", server.grpc, "-n", 9, "-o", out)
    finally:
        server.stop()
    assert (done.returncode, done.stderr) == (0, "")
    assert share_within_one(np.load(out), np.load(local)) >= 0.999
