"""Served models with classes, guidance and latents: graph, warm-up, client, command.

The networks are stand-ins; `test_sampler_graph_classes` has real ones.
"""

import numpy as np
import pytest
import tensorflow as tf
from loopback_server import LoopbackServer, check_batch
from serving_fixtures import TRANSPORTS, share_within_one, warmup_requests
from serving_stand_ins import SIZE, StandInAutoencoder, StandInUNet

from ddsm_tf.errors import InputError
from ddsm_tf.export.sampler_graph import SamplerGraph, in_parts
from ddsm_tf.export.serving import write_serving
from ddsm_tf.labels import IN_TURN
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.serving import ServingClient
from ddsm_tf.serving.inputs import schedule_inputs

CLASSES, SEED = 3, 2**40 + 3
TABLE = NoiseTable.linear(1000).predicting("v")
TIMESTEPS = (900, 700, 450, 200, 20)
GUIDED = StepSchedule(
    TIMESTEPS,
    (1.0, 0.5, 0.5, 1.0, 0.5),
    sampler="heun",
    churn=2.0,
    guidance_scale=2.5,
    guidance_widths=(0.5, 0.5, 1.0, 1.0, 0.5),
)
OWN = StepSchedule(TIMESTEPS, (0.5,) * 4 + (1.0,), sampler="dpmpp_2m", guidance_scale=0.5)
BOTH = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model of latents with classes, `ddsm`, and one of images without, `plain`."""
    folder = tmp_path_factory.mktemp("serving") / "models"
    latents = StandInAutoencoder()
    unets = StandInUNet(CLASSES), StandInUNet(0)
    write_serving(unets[0], TABLE, GUIDED, folder, mount=str(folder), autoencoder=latents)
    plain = StepSchedule(TIMESTEPS, (0.5,) * 5)
    write_serving(unets[1], TABLE, plain, folder, mount=str(folder), model="plain")
    return folder


@pytest.fixture(scope="module")
def loopback(served):
    server = LoopbackServer(served)
    yield server
    server.stop()


@pytest.fixture
def server(loopback):
    loopback.reset()
    return loopback


def client_of(server, transport="rest", **options):
    return ServingClient(getattr(server, transport), transport=transport, timeout=60.0, **options)


def on_the_host(schedule, count, labels=None):
    unet, latents = StandInUNet(CLASSES), StandInAutoencoder()
    options = {"labels": labels, "num_classes": CLASSES, "clip": None}
    options["decode"] = latents.decode_arrays
    images = sample_images(unet.denoise, schedule, TABLE, SIZE, count, seed=SEED, **options)
    assert images.std() > 20
    return images


def test_warm_up_replays_both_branches(server, served):
    for model in ("ddsm", "ddsm_unet_0_5", "plain"):
        version, names = server.version(model, 1), []
        for request in warmup_requests(served / model / "1"):
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            (output,) = version.predict(request.model_spec.signature_name, inputs).values()
            assert len(output) == 1
            names.append(request.model_spec.signature_name)
            if names[-1] == "sample_schedule" and model == "ddsm":
                assert inputs["guidance_scale"] != 1.0
            if names[-1] in ("sample_images", "sample_noise", "serve"):
                check_batch(inputs.values())
        assert sorted(names) == sorted(set(version.signatures) - {"__saved_model_init_op"})


@BOTH
def test_classes_in_turn_do_not_restart_with_a_batch(server, transport):
    client = client_of(server, transport)
    images = client.sample(7, SEED, labels=IN_TURN, batch_size=4)
    assert images.shape == (7, 8, 8, 3)
    assert share_within_one(images, on_the_host(GUIDED, 7)) >= 0.999
    asked = np.array([2, CLASSES, 0, 0, 1])
    images = client.sample(5, SEED, labels=asked, batch_size=2)
    assert share_within_one(images, on_the_host(GUIDED, 5, asked)) >= 0.999


@BOTH
def test_a_guided_schedule_of_the_caller_s_own(server, transport):
    client = client_of(server, transport)
    for schedule in (OWN, GUIDED):
        for labels in (IN_TURN, 1):
            images = client.sample_schedule(schedule, 5, SEED, labels=labels, batch_size=2)
            expected = on_the_host(schedule, 5, None if labels == IN_TURN else labels)
            assert share_within_one(images, expected) >= 0.999


def test_no_widths_for_guidance_are_those_of_the_steps(server):
    inputs = schedule_inputs(OWN, 3, SEED, labels=np.array([IN_TURN]))
    inputs["guidance_widths"] = np.zeros(0, np.float32)
    images = server.version("ddsm").predict("sample_schedule", inputs)["images"]
    assert share_within_one(images, on_the_host(OWN, 3)) >= 0.999


@BOTH
def test_noise_with_labels(server, transport):
    client = client_of(server, transport)
    source = ImageNoise(SEED, 0, 3, SIZE)
    # Churn adds noise at each step but the last.
    noise = np.stack([source.draw() for _ in TIMESTEPS], axis=1)
    labels = np.array([2, 0, 1])
    images = client.sample_from_noise(noise, labels=labels, batch_size=2)
    assert share_within_one(images, on_the_host(GUIDED, 3, labels)) >= 0.999
    x = noise[:, 0]
    found = client.denoise(x, 700, 0.5, labels)
    np.testing.assert_allclose(
        found, StandInUNet(CLASSES).denoise(x, 700, 0.5, labels), rtol=0, atol=1e-5
    )
    calls = server.calls
    for wrong in (IN_TURN, -1, 2**40, 1.5, [0, 1]):
        with pytest.raises(InputError, match="`labels`"):
            client.sample_from_noise(noise, labels=wrong)
        with pytest.raises(InputError, match="`labels`"):
            client.denoise(x, 700, 0.5, wrong)
    assert server.calls == calls


@BOTH
def test_what_does_not_go_with_the_model_is_one_clear_line(server, transport):
    client, plain = client_of(server, transport), client_of(server, transport, model="plain")
    assert client.takes_labels() and not plain.takes_labels()
    assert plain.sample(2, SEED).shape == (2, *SIZE)
    cases = [
        ("with classes needs `labels`", lambda: client.sample(1)),
        ("without takes none", lambda: plain.sample(1, labels=0)),
        (r"`labels` must lie in \[0, 3\]", lambda: client.sample(1, labels=4)),
        ("`guidance_scale`.*needs `labels`", lambda: plain.sample_schedule(OWN, 1)),
        ("without takes none", lambda: plain.sample_schedule(OWN, 1, labels=0)),
        ("is no model of", client_of(server, transport, model="plain_unet_0_5").takes_labels),
    ]
    for words, call in cases:
        with pytest.raises(InputError, match=words) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_batching_server_takes_labels_as_rows(server):
    server.batching = True
    version = server.version("ddsm", 1)
    version.batches = True
    try:
        images = client_of(server, "grpc").sample(4, SEED, labels=IN_TURN)
    finally:
        version.batches = False
    assert share_within_one(images, on_the_host(GUIDED, 4)) >= 0.999


def test_the_command(server, tmp_path, run_here):
    def ask(*options):
        target = ["--target", server.grpc, "--seed", SEED, "-o", tmp_path / "images.npy"]
        return run_here("serve-sample", *target, *options)

    GUIDED.save(tmp_path / "schedule.json")
    own = ["--schedule", tmp_path / "schedule.json"]
    for options, labels in (
        ([], None),
        (["--class", "2,0"], np.array([2, 0, 2, 0])),
        ([*own, "--class", CLASSES], CLASSES),
    ):
        done = ask("-n", 4, "--batch", 3, *options)
        assert done.returncode == 0, done.stderr
        images = np.load(tmp_path / "images.npy")
        assert share_within_one(images, on_the_host(GUIDED, 4, labels)) >= 0.999
    assert ask("-n", 2, "--model", "plain").returncode == 0
    for options, words in (
        (["--class", "none"], "number of classes"),
        (["--class", "7"], "`labels` must lie in [0, 3]"),
        (["--class", "1", "--model", "plain"], "is for a model with classes"),
        (["--model", "plain_unet_0_5"], "is no model of"),
    ):
        done = ask("-n", 1, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr


def counting(calls, branch):
    def denoise(x, t, labels):
        with tf.control_dependencies([calls.scatter_add(tf.IndexedSlices([1], [branch]))]):
            return tf.identity(x) + 0.0 * tf.cast(labels, tf.float32)[:, None, None, None]

    return denoise


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Heun's second calls run at the widths of their steps, all but the last step's.
        (GUIDED, [4 + 4, 5 + 5]),
        (StepSchedule(TIMESTEPS, (1.0, 1.0, 0.5, 0.5, 0.5)), [2, 3]),
    ],
    ids=["guided", "not guided"],
)
def test_the_branch_without_the_class_runs_only_where_guided(schedule, expected):
    assert sum(expected) == sum(schedule.call_counts().values())
    assert expected == [schedule.call_counts()[width] for width in (1.0, 0.5)]
    calls = tf.Variable([0, 0])
    networks = {1.0: counting(calls, 0), 0.5: counting(calls, 1)}
    graph = SamplerGraph(networks, TABLE, schedule, SIZE, CLASSES)
    label = tf.constant([1], tf.int32)
    tf.function(graph.sample)(tf.constant(0, tf.int64), tf.constant(2, tf.int64), label)
    assert calls.numpy().tolist() == expected
    calls.assign([0, 0])
    inputs = schedule_inputs(schedule, 2, 0, labels=np.array([1]))
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    tf.function(graph.sample_schedule)(**inputs)
    assert calls.numpy().tolist() == expected


def test_broken_latents_give_no_images():
    graph = SamplerGraph(
        {1.0: lambda x, t: x * float("nan")},
        TABLE,
        StepSchedule((5,), (1.0,)),
        SIZE,
        decode=lambda x: tf.where(x == x, x, 0.0),
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="the network gave NaN"):
        tf.function(graph.sample)(tf.constant(0, tf.int64), tf.constant(2, tf.int64))


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (8, [8]), (19, [8, 8, 8]), (0, [1])])
def test_rows_are_decoded_a_few_at_a_time(count, sizes):
    rows = np.random.default_rng(0).normal(size=(count, 2, 2, 1)).astype(np.float32)
    seen = []

    def double(part):
        tf.py_function(lambda size: seen.append(int(size)), [tf.shape(part)[0]], [])
        return 2.0 * tf.repeat(part, 3, axis=3)

    spec = tf.TensorSpec((None, 2, 2, 1), tf.float32)
    found = tf.function(lambda x: in_parts(double, x, 8), input_signature=[spec])(rows)
    np.testing.assert_array_equal(found, 2.0 * rows.repeat(3, axis=3))
    assert seen == sizes


def test_a_real_decoder_is_part_of_the_saved_model(tmp_path):
    from conftest import randomise

    from ddsm_tf.export.savedmodel import write_sampler
    from ddsm_tf.models.autoencoder import KLAutoencoder

    size = {"image_size": 8, "latent_channels": 2, "base_channels": 8}
    autoencoder = randomise(KLAutoencoder(**size, channel_multipliers=(1, 1), blocks_per_level=1))
    autoencoder.latent_scale.assign(0.5)
    schedule = StepSchedule(TIMESTEPS, (1.0, 0.5) * 2 + (1.0,))
    unet = StandInUNet(0)
    write_sampler(unet, TABLE, schedule, tmp_path / "sampler", autoencoder)
    expected = sample_images(
        unet.denoise, schedule, TABLE, SIZE, 11, seed=SEED, clip=None, decode=autoencoder.decode
    )
    sample = tf.saved_model.load(str(tmp_path / "sampler")).signatures["sample"]
    images = sample(seed=tf.constant(SEED, tf.int64), count=tf.constant(11, tf.int64))["images"]
    assert images.shape == (11, 8, 8, 3) and expected.std() > 5
    assert share_within_one(images.numpy(), expected) >= 0.999
