"""Every sampler, classes, guidance and decoded latents: the device gives Keras's images."""

import json
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, randomise

from ddsm_tf.cost import read_latency
from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge import cli as edge_cli
from ddsm_tf.edge import sampler as edge_sampler
from ddsm_tf.edge.benchmark import benchmark_memory
from ddsm_tf.errors import InputError
from ddsm_tf.export import export
from ddsm_tf.export.bundle import TFLiteDecoder, write_bundle
from ddsm_tf.export.tflite import convert, delegation, write_tflite
from ddsm_tf.models import DiffusionModel, SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import SAMPLERS, StepSchedule, even_timesteps

CLASSES = 3
TABLE = NoiseTable.linear(1000).predicting("v")
TIMESTEPS = even_timesteps(1000, 6)
GUIDED = StepSchedule(
    TIMESTEPS, (1.0, 0.5) * 3, guidance_scale=2.5, guidance_widths=(0.5, 0.5, 0.5, 1.0, 0.5, 1.0)
)


@pytest.fixture(scope="module")
def unet():
    return randomise(SlimmableUNet(**TINY, num_classes=CLASSES, name="unet"))


@pytest.fixture(scope="module")
def folder(unet, tmp_path_factory):
    out = tmp_path_factory.mktemp("conditional") / "bundle"
    return export("bundle", unet, TABLE, GUIDED, out)


@pytest.fixture(scope="module")
def sampler(folder):
    return EdgeSampler(Bundle.load(folder))


def assert_same_images(found, expected):
    assert found.shape == expected.shape
    apart = np.abs(found.astype(int) - expected.astype(int))
    # Float32 rounds a pixel in a thousand the other way, and one of few.
    assert apart.max() <= 1 and (apart > 0).sum() <= 1 + 1e-3 * apart.size
    assert expected.std() > 10


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_keras_images(unet, sampler, name):
    options = {"churn": 3.0} if name in ("euler", "heun") else {}
    schedule = StepSchedule(TIMESTEPS, (0.5, 1.0) * 3, sampler=name, guidance_scale=2.0, **options)
    model = DiffusionModel(unet, TABLE)
    assert_same_images(
        sampler.sample(5, seed=3, schedule=schedule, batch_size=2), model.sample(schedule, 5, 3)
    )


def test_classes_and_guidance(unet, sampler):
    model = DiffusionModel(unet, TABLE)
    assert sampler.bundle.schedule == GUIDED
    in_turn = sampler.sample(6, seed=1)
    assert_same_images(in_turn, model.sample(GUIDED, 6, 1))
    asked = np.array([2, 2, 0, 3])
    assert_same_images(sampler.sample(4, 1, labels=asked), model.sample(GUIDED, 4, 1, labels=asked))
    # Image 2 is of class 2 in turn, and of class 0 when asked: its class is part of what it is.
    first, second = sampler.sample(3, 1, labels=2), sampler.sample(3, 1, labels=0)
    np.testing.assert_array_equal(first[2], in_turn[2])
    assert not np.array_equal(second[2], in_turn[2])
    full = sampler.bundle.schedules["full"]
    assert full.call_counts() == {1.0: 12} and full.guidance_scale == 2.5


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [0.0, 1.0], [1]])
def test_labels_that_the_model_lacks(sampler, labels):
    with pytest.raises(InputError, match="`labels`"):
        sampler.sample(2, labels=np.array(labels))
    x = np.zeros((2, 8, 8, 1), np.float32)
    with pytest.raises(InputError, match="`labels`"):
        sampler.denoise(x, 0, 1.0, np.array(labels))
    with pytest.raises(InputError, match="`labels`"):
        sampler.denoise(x, 0, 1.0)


def test_command_line(folder, tmp_path, sampler, capsys):
    def run(*arguments):
        return edge_cli.run(["sample", str(folder), "-n", "4", "--seed", "1", *arguments])

    assert run("--class", "2,0", "-o", str(tmp_path / "x.npy")) == 0
    expected = sampler.sample(4, 1, labels=np.array([2, 0, 2, 0]))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)
    assert run("--class", "3", "-o", str(tmp_path / "y.npy")) == 2
    assert "--class" in capsys.readouterr().err
    assert edge_cli.run(["info", str(folder)]) == 0
    assert "num_classes      3" in capsys.readouterr().out


def test_unconditional_bundles_take_no_class(tiny_bundle, tmp_path, capsys):
    arguments = [str(tiny_bundle), "--class", "1", "-o", str(tmp_path / "x.npy")]
    assert edge_cli.run(["sample", *arguments]) == 2
    assert "this one has none" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "share"), [("float16", 0.1), ("dynamic", 0.6), ("int8-mixed", 0.8)]
)
def test_other_precisions_keep_the_classes(unet, sampler, tmp_path, quantize, share):
    out = export("bundle", unet, TABLE, GUIDED, tmp_path / "out", quantize=quantize)
    images = EdgeSampler(Bundle.load(out)).sample(6, seed=1).astype(float)
    exact = sampler.sample(6, seed=1).astype(float)
    other = sampler.sample(6, seed=1, labels=np.array([1, 2, 0, 1, 2, 0])).astype(float)

    def apart(a, b):
        return np.sqrt(np.mean((a - b) ** 2))

    # Nearer to the same class in float32 than to another one.
    assert apart(images, exact) < share * apart(images, other)


@pytest.mark.slow
def test_a_fixed_batch_with_labels(unet, sampler, tmp_path):
    out = export("bundle", unet, TABLE, GUIDED, tmp_path / "out", batch=4)
    fixed = EdgeSampler(Bundle.load(out))
    assert_same_images(fixed.sample(6, seed=1), sampler.sample(6, seed=1))


def test_the_graph_stays_in_one_piece(unet):
    plain = delegation(convert(unet.subnet(1.0), batch=1))
    assert plain.partitions <= 2
    # The lookup of a label, and TensorFlow's care for negative ones, which the device refuses.
    assert set(plain.left_over) <= {"GATHER", "LESS", "ADD", "SELECT"}


def write_latent_bundle(out, unet, decode):
    """A bundle whose "latents" of 8 × 8 become images of 16 × 16 × 3 by `decode`."""
    out.mkdir()
    signature = [tf.TensorSpec((None, 8, 8, 1), tf.float32)]
    function = tf.function(decode, input_signature=signature).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
    schedule = StepSchedule(TIMESTEPS, (0.5, 1.0) * 3)
    write_bundle(
        out,
        write_tflite(unet, out),
        unet,
        NoiseTable.linear(1000),
        {"default": schedule},
        decoder=TFLiteDecoder(converter.convert(), (16, 16, 3)),
    )
    return out


@pytest.fixture(scope="module")
def latent_folder(tiny_unet, tmp_path_factory):
    """A bundle of latents that are decoded by a fixed rule."""

    def decode(latents):
        wide = tf.repeat(tf.repeat(latents, 2, axis=1), 2, axis=2)
        return tf.concat([0.2 * wide, -0.1 * wide, 0.0 * wide + 0.5], axis=3)

    return write_latent_bundle(tmp_path_factory.mktemp("latent") / "bundle", tiny_unet, decode)


def test_latents_are_decoded_and_not_clipped(latent_folder, tiny_unet):
    sampler = EdgeSampler(Bundle.load(latent_folder))
    images = sampler.sample(3, seed=2)
    assert images.shape == (3, 16, 16, 3)

    def decode(x):
        wide = x.repeat(2, axis=1).repeat(2, axis=2)
        return np.concatenate([0.2 * wide, -0.1 * wide, 0.0 * wide + 0.5], axis=3)

    model = DiffusionModel(tiny_unet, NoiseTable.linear(1000), clip=False, decode=decode)
    expected = model.sample(sampler.bundle.schedule, 3, 2)
    apart = np.abs(images.astype(int) - expected.astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() < 2e-3
    assert (images[..., 2] == 191).all()
    clipped = DiffusionModel(tiny_unet, NoiseTable.linear(1000), clip=True, decode=decode)
    assert not np.array_equal(clipped.sample(sampler.bundle.schedule, 3, 2), expected)


def test_a_decoder_of_another_shape_is_refused(latent_folder, tmp_path):
    import json
    import shutil

    from ddsm_tf.edge.manifest import sealed

    copy = shutil.copytree(latent_folder, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["decoder"]["image_shape"] = [16, 16, 1]
    (copy / "manifest.json").write_bytes(sealed(manifest))
    with pytest.raises(InputError, match=r"decoder\.tflite.*gives \(1, 16, 16, 3\)"):
        EdgeSampler(Bundle.load(copy)).sample(1)


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_the_decoder_counts_among_the_networks_in_memory(latent_folder, monkeypatch, resident):
    alive, most, loaded = weakref.WeakSet(), [], []

    def spied(kind):
        def load(*arguments):
            most.append(len(alive) + 1)
            loaded.append(kind.__name__)
            network = kind(*arguments)
            alive.add(network)
            return network

        return load

    bundle = Bundle.load(latent_folder)
    expected = EdgeSampler(bundle).sample(3, seed=2, batch_size=2)
    for kind in (edge_sampler.Network, edge_sampler.Decoder):
        monkeypatch.setattr(edge_sampler, kind.__name__, spied(kind))
    sampler = EdgeSampler(bundle, max_resident=resident)
    np.testing.assert_array_equal(sampler.sample(3, seed=2, batch_size=2), expected)
    assert max(most) == resident
    if resident == 1:
        assert loaded == (["Network"] * 6 + ["Decoder"]) * 2
        assert sampler.resident == ()
    if resident == 3:
        assert loaded == ["Network"] * 2 + ["Decoder"]
        assert sampler.resident == (0.5, 1.0)


def test_what_decoding_takes_is_in_the_peak_memory(tiny_unet, tmp_path):
    def decode(latents):
        # 50 MB on the way.
        wide = tf.repeat(tf.repeat(latents, 256, axis=1), 256, axis=2)
        wide = tf.concat([0.2 * wide, -0.1 * wide, wide], axis=3)
        return tf.nn.avg_pool2d(wide, 128, 128, "VALID")

    bundle = Bundle.load(write_latent_bundle(tmp_path / "bundle", tiny_unet, decode))
    found = benchmark_memory(EdgeSampler(bundle, max_resident=1), bundle.schedule)
    assert found["decoder"] > found["widest"] + 50
    assert found["schedule"] > found["widest"] + 50
    assert found["schedule"] == pytest.approx(found["decoder"], abs=20)


def test_benchmark_has_the_decoder_beside_the_widths(latent_folder, tmp_path, monkeypatch, capsys):
    arguments = ["benchmark", str(latent_folder), "--rounds", "2"]
    assert edge_cli.run([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "latency.json").write_text(printed)
    result = json.loads(printed)
    decoder, memory = result["decoder"], result["peak_memory_mb"]
    assert 0 < decoder["min_ms"] <= decoder["median_ms"] <= decoder["max_ms"] < 1000
    assert set(result["widths"]) == set(memory["widths"]) == {"1.0", "0.5"}
    assert 20 < memory["decoder"] < 400
    table = read_latency(f"latency:{tmp_path / 'latency.json'}", (1.0, 0.5))
    assert table == {w: result["widths"][str(w)]["median_ms"] for w in (1.0, 0.5)}

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert edge_cli.run(arguments) == 0
    printed, bars = capsys.readouterr()
    names = [line.split("  ")[0] for line in printed.splitlines()[:3]]
    assert names == ["width 1.0", "width 0.5", "decoder"]
    assert "6 steps against full width, decoding aside: " in printed
    # Four processes, five rounds of the widths and of the decoder, four pairs.
    assert bars.split("\r")[-1] == "18/18 steps, 0 s left  \n"


def test_bundles_of_images_have_no_decoder(sampler):
    with pytest.raises(InputError, match="`decoder`"):
        sampler.decode(np.zeros((1, 8, 8, 1), np.float32))


def test_clipped_conditional_model_in_half_precision_keeps_its_timesteps():
    # Labels are integers and timesteps whole floats: neither may be rounded.
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        network = randomise(SlimmableUNet(**TINY, num_classes=300))
    finally:
        keras.config.set_dtype_policy(policy)
    x = np.ones((2, 8, 8, 1), np.float32)
    output = np.asarray(network(x, np.array([500, 500]), np.array([257, 256], np.int32)))
    assert np.abs(output[0].astype(np.float32) - output[1].astype(np.float32)).max() > 1e-2
