"""The autoencoder, its training, latents kept on disk, and runs that denoise them."""

import dataclasses
import json
import re
import shutil

import keras
import numpy as np
import pytest
from conftest import eagerly, randomise, set_options

from ddsm_tf.errors import InputError
from ddsm_tf.export.decoder import decoder_tflite
from ddsm_tf.images import to_float
from ddsm_tf.metrics import train_classifier
from ddsm_tf.models.autoencoder import KLAutoencoder
from ddsm_tf.models.compiled import CompiledDecoder
from ddsm_tf.training.autoencoder import AutoencoderRun, load_autoencoder, report_of
from ddsm_tf.training.config import RunConfig
from ddsm_tf.training.latents import encode_images
from ddsm_tf.training.run import Run
from ddsm_tf.training.train import open_run

SIZE = {
    "image_size": 16,
    "channels": 3,
    "latent_channels": 2,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
}


def smooth_images(count, size=16, seed=0):
    """Grey ramps of random direction and colour: a few numbers say all of an image."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    a, b, c = random.uniform(-0.5, 0.5, (3, count, 1, 1, 3))
    images = a * x[None, :, :, None] + b * y[None, :, :, None] + c
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope="module")
def autoencoder():
    keras.utils.set_random_seed(0)
    return randomise(KLAutoencoder(**SIZE))


def test_shapes_and_losses(autoencoder):
    images = to_float(smooth_images(5))
    assert autoencoder.latent_shape == (8, 8, 2)
    mean, log_variance = map(np.asarray, autoencoder.moments(images))
    assert mean.shape == log_variance.shape == (5, 8, 8, 2)
    decoded = np.asarray(autoencoder.decode(mean))
    losses = autoencoder(images)
    np.testing.assert_allclose(
        losses["reconstruction"], np.mean((decoded - images) ** 2, axis=(1, 2, 3)), rtol=1e-4
    )
    # KL of N(μ, σ²) from N(0, 1): ½ (μ² + σ² - 1 - log σ²).
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    np.testing.assert_allclose(losses["kl"], kl.mean(axis=(1, 2, 3)), rtol=1e-4)
    total = np.mean(losses["reconstruction"]) + 1e-4 * np.mean(losses["kl"])
    assert float(autoencoder.losses[0]) == pytest.approx(total, rel=1e-4)


def test_training_draws_latents(autoencoder):
    images = to_float(smooth_images(5))
    plain = np.asarray(autoencoder(images)["reconstruction"])
    drawn = [np.asarray(autoencoder(images, training=True)["reconstruction"]) for _ in range(2)]
    assert not np.allclose(plain, drawn[0], rtol=1e-3)
    assert not np.allclose(drawn[0], drawn[1], rtol=1e-3)


def test_scaled_latents_have_unit_variance_and_decode_alike(autoencoder):
    images = to_float(smooth_images(64))
    before = np.asarray(autoencoder.decode(autoencoder.encode(images)))
    scale = autoencoder.set_latent_scale(images)
    try:
        assert np.std(np.asarray(autoencoder.encode(images))) == pytest.approx(1.0, rel=1e-4)
        assert scale != pytest.approx(1.0, rel=0.05)
        after = np.asarray(autoencoder.decode(autoencoder.encode(images)))
        np.testing.assert_allclose(after, before, atol=1e-4)
    finally:
        autoencoder.latent_scale.assign(1.0)


def test_saved_and_decoded_everywhere(autoencoder, tmp_path):
    from ddsm_tf.edge.network import Decoder

    path = tmp_path / "autoencoder.keras"
    autoencoder.latent_scale.assign(0.5)
    try:
        autoencoder.save(path)
        again = load_autoencoder(path)
        latents = np.random.default_rng(1).normal(size=(5, 8, 8, 2)).astype(np.float32)
        expected = np.asarray(autoencoder.decode(latents))
        np.testing.assert_allclose(again.decode(latents), expected, atol=1e-6)
        np.testing.assert_allclose(CompiledDecoder(again, 2)(latents), expected, atol=1e-5)
        for batch in (None, 4):
            made = decoder_tflite(again, batch)
            shapes = (8, 8, 2), (16, 16, 3)
            decoder = Decoder(made.content, "decoder.tflite", *shapes, batch=batch)
            np.testing.assert_allclose(decoder(latents), expected, atol=1e-4)
    finally:
        autoencoder.latent_scale.assign(1.0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("image_size", 15),
        ("channels", 5),
        ("latent_channels", 0),
        ("base_channels", 6),
        ("kl_weight", -1.0),
        ("channel_multipliers", ()),
        ("channel_multipliers", (1, 0)),
    ],
)
def test_bad_arguments(argument, value):
    with pytest.raises(InputError, match=rf"`{argument}` \(={re.escape(str(value))}\)"):
        KLAutoencoder(**{**SIZE, argument: value})


def test_psnr_is_that_of_the_pixels(autoencoder):
    images = smooth_images(70)
    report = report_of(autoencoder, images)
    decoded = np.asarray(autoencoder.decode(autoencoder.encode(to_float(images))))
    pixels = np.rint((np.clip(decoded, -1, 1) + 1) * 127.5)
    expected = 10 * np.log10(255**2 / np.mean((pixels - images) ** 2))
    assert report["psnr"] == pytest.approx(expected, rel=1e-3)
    assert report["images"] == 70


def test_latents_are_encoded_once(autoencoder, tmp_path, monkeypatch):
    images = smooth_images(70)
    weights = tmp_path / "weights"
    weights.write_bytes(b"one")
    calls = []
    encode = autoencoder.encode

    def counted(batch):
        calls.append(len(batch))
        return encode(batch)

    monkeypatch.setattr(autoencoder, "encode", counted)
    folder = tmp_path / "latents"
    first = encode_images(autoencoder, weights, images, folder)
    assert calls == [64, 6]
    np.testing.assert_array_equal(encode_images(autoencoder, weights, images, folder), first)
    assert calls == [64, 6]
    np.testing.assert_allclose(first, encode(to_float(images)), atol=1e-5)
    both = encode_images(autoencoder, weights, images, folder, mirrored=True)
    np.testing.assert_array_equal(both[:70], first)
    np.testing.assert_allclose(both[70:], encode(to_float(images[:, :, ::-1])), atol=1e-5)
    weights.write_bytes(b"another")
    encode_images(autoencoder, weights, images, folder)
    assert sum(calls) == 70 + 140 + 70


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    """An autoencoder of smooth images, and a run on its latents; both by the command line."""
    from ddsm_tf import cli

    folder = tmp_path_factory.mktemp("latent")
    images = smooth_images(200)
    np.savez(folder / "data.npz", images=images)
    data = f"npz:{folder / 'data.npz'}"

    def ddsm(*arguments):
        assert cli.run([str(argument) for argument in arguments]) == 0

    small = ["image_size=16", "latent_channels=2", "base_channels=8", "channel_multipliers=1,2"]
    rates = ["batch_size=16", "learning_rate=5e-3", "warmup_steps=5", "log_every=10"]
    rates += ["ema_momentum=0.9", "sample_every=0", "checkpoint_every=40"]
    out = folder / "autoencoder"
    own = set_options([*small, *rates])
    command = ["autoencoder", "latent_afhq", "--out", out, "--data", data, *own]
    ddsm(*command, "--steps", 150)
    run = folder / "run"
    network = ["image_size=8", "channels=2", "base_channels=8", "channel_multipliers=1"]
    network += ["attention_resolutions=", "widths=1,0.5", "sampling_steps=3", "batch_size=4"]
    network += ["sample_every=0", f"autoencoder={out}", "blocks_per_level=1"]
    with eagerly():
        command = ["train", "latent_afhq", "--out", run, "--data", data, "--steps", 3]
        ddsm(*command, *set_options(network))
    # A run on latents needs the other folder no more.
    out.rename(folder / "moved")
    return run, folder / "moved", images


def test_the_autoencoder_learns(latent_run):
    _, folder, images = latent_run
    report = json.loads((folder / "report.json").read_text())
    # The mean of all images is the best that can be done without latents.
    without = 10 * np.log10(255**2 / np.var(images - images.mean(axis=0)))
    assert report["psnr"] > without + 3
    assert report["latent_std"] == pytest.approx(1.0, abs=0.1)
    assert (folder / "reconstructions.png").stat().st_size > 1000
    assert AutoencoderRun.open(folder).checkpoints.steps()[-1] == 150


def test_a_run_on_latents_is_judged_in_pixels(latent_run, run_here):
    run, _, images = latent_run
    opened = Run.open(run)
    assert opened.load_data().images.shape == images.shape
    assert opened.denoised(images[:3]).shape == (3, 8, 8, 2)
    train_classifier(images, steps=2).save(run / "classifier.keras")
    done = run_here("evaluate", run, "-n", 8, "--json")
    assert done.returncode == 0, done.stderr
    assert np.isfinite(json.loads(done.stdout)["distance"])


@pytest.mark.slow
def test_training_is_resumed_to_the_same_weights(tmp_path, run_here):
    np.savez(tmp_path / "data.npz", images=smooth_images(40))
    settings = ["image_size=16", "latent_channels=2", "base_channels=8", "channel_multipliers=1,1"]
    settings += ["batch_size=4", "checkpoint_every=3", "sample_every=0", "blocks_per_level=1"]
    data = ["--data", f"npz:{tmp_path / 'data.npz'}"]
    options = set_options(settings)

    def train(out, *more):
        with eagerly():
            done = run_here("autoencoder", "latent_afhq", "--out", out, *data, *options, *more)
        assert done.returncode == 0, done.stderr
        run = AutoencoderRun.open(out)
        assert run.checkpoints.steps() == [3, 5]
        with np.load(run.checkpoints.file(5)) as archive:
            return [archive[name] for name in sorted(archive.files)]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(whole, "--steps", 5)
    shutil.copytree(whole, cut)
    AutoencoderRun.open(cut).checkpoints.file(5).unlink()
    (cut / "autoencoder.keras").unlink()
    for found, value in zip(train(cut, "--steps", 5, "--resume"), expected, strict=True):
        np.testing.assert_array_equal(found, value)
    with np.load(AutoencoderRun.open(cut).checkpoints.file(3)) as before:
        assert np.abs(expected[0] - before["00000"]).max() > 1e-6
    assert (cut / "autoencoder.keras").is_file()


def test_an_autoencoder_that_does_not_fit(latent_run, tmp_path, run_here):
    _, folder, images = latent_run
    np.savez(tmp_path / "data.npz", images=images[:20])
    data = ["--data", f"npz:{tmp_path / 'data.npz'}"]
    wrong = ["--set", f"autoencoder={folder}", "--set", "image_size=16"]
    done = run_here("train", "latent_afhq", "--out", tmp_path / "run", *data, *wrong)
    assert done.returncode == 2
    assert "has latents of (8, 8, 2), not image_size and channels (16, 16, 4)" in done.stderr
    missing = run_here("train", "latent_afhq", "--out", tmp_path / "other", *data)
    assert missing.returncode == 2
    assert "ddsm autoencoder" in missing.stderr


def test_an_autoencoder_whose_training_was_cut_short_is_no_use(latent_run, tmp_path, run_here):
    _, folder, images = latent_run
    cut = AutoencoderRun.open(shutil.copytree(folder, tmp_path / "cut"))
    model = cut.load_autoencoder()
    # As checkpoints have it: the scale is found at the end.
    model.latent_scale.assign(1.0)
    cut.save_weights(model)
    np.savez(tmp_path / "data.npz", images=images[:20])
    data = ["--data", f"npz:{tmp_path / 'data.npz'}", "--set", f"autoencoder={cut.path}"]
    done = run_here("train", "latent_afhq", "--out", tmp_path / "run", *data)
    assert done.returncode == 2
    assert "is not trained to its end" in done.stderr and "--resume" in done.stderr


def test_a_half_copied_autoencoder_is_copied_again(latent_run, tmp_path):
    run, folder, _ = latent_run
    config = dataclasses.replace(Run.open(run).config, autoencoder=str(folder))
    started = Run.create(tmp_path / "run", config)
    started.autoencoder_path.mkdir()
    shutil.copy(folder / "config.json", started.autoencoder_path)
    resumed = open_run(started.path, config, resume=True)
    copied = (resumed.autoencoder_path / "autoencoder.keras").read_bytes()
    assert copied == (folder / "autoencoder.keras").read_bytes()


def test_older_runs_have_no_autoencoder(tmp_path):
    config = RunConfig(preset="digits", data="digits", image_size=8, channels=1)
    content = config.to_dict()
    del content["autoencoder"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert RunConfig.load(tmp_path / "config.json").autoencoder == ""
