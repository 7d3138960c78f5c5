"""Every preset from training to the device, at a reduced size; and its data-sheet."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from conftest import eagerly, set_options, slow_but

from ddsm_tf.cost import Cost
from ddsm_tf.edge import cli as edge_cli
from ddsm_tf.metrics import train_classifier
from ddsm_tf.training.data_sheet import PUBLISHED, costs_of, data_sheet, training_memory
from ddsm_tf.training.presets import ABOUT, PRESETS, get_preset
from ddsm_tf.training.run import network_of

REDUCED = [
    "base_channels=8",
    "channel_multipliers=1",
    "attention_resolutions=",
    "blocks_per_level=1",
    "widths=1,0.5",
    "batch_size=4",
    "warmup_steps=1",
    "sample_every=0",
    "log_every=1",
    "sampling_steps=3",
]
SIZE = 8


def write_images(path, channels, size):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, size, size, channels), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(24) % 3)
    return images


@functools.cache
def judge(channels, size):
    """A classifier of two training steps: the images of these runs are noise, too."""
    images = np.random.default_rng(1).integers(0, 256, (24, size, size, channels), np.uint8)
    return train_classifier(images, steps=2)


# Pixels, classes and latents; the others differ from these in numbers.
@pytest.mark.parametrize("preset", slow_but(PRESETS, "digits", "imagenet64", "latent_afhq"))
def test_preset_runs_from_training_to_the_device(preset, tmp_path, run_here):
    def ddsm(*arguments):
        done = run_here(*arguments)
        assert done.returncode == 0, done.stderr

    config = get_preset(preset)
    data, settings = f"npz:{tmp_path / 'data.npz'}", [*REDUCED, f"image_size={SIZE}"]
    size = 2 * SIZE if config.autoencoder else SIZE
    images = write_images(tmp_path / "data.npz", 3 if config.autoencoder else config.channels, size)
    if config.num_classes:
        settings.append("num_classes=3")
    if config.autoencoder:
        small = [f"image_size={size}", "channel_multipliers=1,1", *REDUCED[5:9]]
        small += ["base_channels=8", "blocks_per_level=1"]
        out = tmp_path / "autoencoder"
        command = ["autoencoder", preset, "--out", out, "--data", data, "--steps", 2]
        with eagerly():
            ddsm(*command, *set_options(small))
        settings.append(f"autoencoder={out}")
    run = tmp_path / "run"
    with eagerly():
        ddsm("train", preset, "--out", run, "--data", data, "--steps", 3, *set_options(settings))
    judge(images.shape[-1], size).save(run / "classifier.keras")
    ddsm("search", run, "--trials", 3, "--images", 4, "--segments", 1, "--confirm-images", 4)
    with eagerly():
        ddsm("sample", run, "-n", 2, "--seed", 5, "-o", tmp_path / "images.npy")
    ddsm("export", run, "bundle", "-o", tmp_path / "bundle")
    arguments = ["sample", tmp_path / "bundle", "-n", "2", "--seed", "5", "-o", tmp_path / "e.npy"]
    assert edge_cli.run([str(argument) for argument in arguments]) == 0
    sampled, on_device = np.load(tmp_path / "images.npy"), np.load(tmp_path / "e.npy")
    assert sampled.shape == (2, *images.shape[1:])
    # Float32 on two runtimes rounds a pixel in many the other way.
    apart = np.abs(sampled.astype(int) - on_device.astype(int))
    assert (apart <= 1).mean() > 0.999


@functools.cache
def preset_costs(preset):
    return costs_of(network_of(get_preset(preset)))


@pytest.mark.parametrize(
    ("preset", "percent"),
    [
        ("cifar10", 0.5),
        pytest.param("celeba_hq", 1.5, marks=pytest.mark.slow),
        pytest.param("imagenet64", 0.5, marks=pytest.mark.slow),
    ],
)
def test_a_step_costs_what_the_paper_says(preset, percent):
    full = next(iter(preset_costs(preset).values()))
    assert 2 * full.macs / 1e9 == pytest.approx(PUBLISHED[preset].gflops, rel=percent / 100)


def test_data_sheet():
    config = get_preset("cifar10")
    costs = preset_costs("cifar10")
    text = data_sheet(config, costs)
    for part in (
        "35.75 M",
        "6.222",
        "12.14 GFLOPs a step, here 12.11 (-0.3 %",
        "FID 3.713 at full width; 3.552 at 6.2 GFLOPs, 49 % saved",
        "ddsm train cifar10 --out cifar10-run",
        "ddsm export cifar10-run bundle",
    ):
        assert part in text
    memory = training_memory(config, costs)
    weights = 35.75e6 * 5 * 4
    half = dataclasses.replace(config, batch_size=128)
    # All but the weights' part goes with the batch.
    assert training_memory(half, costs) - weights == pytest.approx((memory - weights) / 2, rel=1e-3)


@pytest.mark.parametrize(
    "preset",
    slow_but(PRESETS, "digits", "fashion_mnist", "cifar10", "cifar10_16", "latent_afhq"),
)
def test_data_sheet_is_as_printed(preset):
    printed = (Path(__file__).parent.parent / "docs/presets.md").read_text()
    assert f"\n{data_sheet(get_preset(preset), preset_costs(preset))}\n" in printed


def test_data_sheet_of_latents():
    config = dataclasses.replace(get_preset("latent_afhq"), autoencoder="trained/here")
    lines = data_sheet(config, {1.0: Cost()}).splitlines()
    assert "  latents         16 × 16 × 4" in lines
    assert not any(line.startswith("  images") for line in lines)
    commands = [line.split(maxsplit=1)[1] for line in lines if "  ddsm " in line]
    assert commands == [
        "ddsm autoencoder latent_afhq --out trained/here",
        "ddsm train latent_afhq --out latent_afhq-run",
        "ddsm search latent_afhq-run",
        "ddsm evaluate latent_afhq-run -n 10000",
        "ddsm export latent_afhq-run bundle -o latent_afhq-run-bundle",
    ]


def test_every_preset_is_described():
    assert set(ABOUT) == set(PRESETS)
    expected = {"digits", "fashion_mnist", "cifar10", "celeba_hq", "lsun_bedroom", "afhq"}
    assert expected | {"imagenet64"} <= set(PRESETS)
    assert all(name == config.preset for name, config in PRESETS.items())


def test_presets_command(run_here):
    listed = run_here("presets")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in PRESETS)
    assert run_here("presets", "cifar").returncode == 2
    sheet = run_here("presets", "digits")
    assert sheet.returncode == 0 and "GMACs a step" in sheet.stdout
