"""What a configuration says reaches the network, its training and its schedules."""

import dataclasses

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.timesteps import spaced_timesteps
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import Run
from ddsm_tf.training.train import make_optimizer

# None of these is a default.
NETWORK = {
    "base_channels": 8,
    "channel_multipliers": (1, 3),
    "attention_resolutions": (4,),
    "blocks_per_level": 1,
    "widths": (1.0, 0.5),
    "dropout": 0.25,
    "num_classes": 7,
}
OBJECTIVE = {
    "weighting": "min_snr_plus_one",
    "label_dropout": 0.3,
    "middle_widths": 2,
    "distillation": 0.4,
    "seed": 5,
}


def run_of(tmp_path, **changes):
    return Run(tmp_path, dataclasses.replace(get_preset("digits"), **changes))


def test_the_network_is_as_configured(tmp_path):
    unet = run_of(tmp_path, **NETWORK).new_unet()
    found = unet.get_config()
    for name, value in NETWORK.items():
        given = found[name]
        assert (tuple(given) if isinstance(given, (list, tuple)) else given) == value, name


def test_the_objective_is_as_configured(tmp_path):
    model = run_of(
        tmp_path, **{**NETWORK, "base_channels": 32, "widths": (1.0, 0.75, 0.5, 0.25)}, **OBJECTIVE
    ).new_model()
    assert {name: getattr(model, name) for name in OBJECTIVE} == OBJECTIVE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"beta_start": 2e-4, "beta_end": 0.01, "train_timesteps": 200},
            NoiseTable.linear(200, 2e-4, 0.01),
        ),
        ({"noise_schedule": "cosine", "train_timesteps": 300}, NoiseTable.cosine(300)),
        (
            {
                "noise_schedule": "edm",
                "prediction": "edm",
                "sigma_min": 0.01,
                "sigma_max": 50.0,
                "data_std": 0.4,
            },
            NoiseTable.edm(1000, 0.01, 50.0, data_std=0.4),
        ),
    ],
    ids=["linear", "cosine", "edm"],
)
def test_the_noise_is_as_configured(tmp_path, changes, expected):
    if "prediction" not in changes:
        changes, expected = {**changes, "prediction": "v"}, expected.predicting("v")
    table = run_of(tmp_path, **changes).noise_table
    np.testing.assert_array_equal(table.betas, expected.betas)
    assert (table.prediction, table.data_std) == (expected.prediction, expected.data_std)


def test_the_optimizer_is_as_configured(tmp_path):
    changes = {"learning_rate": 0.01, "warmup_steps": 4, "ema_momentum": 0.9, "clip_norm": 0.5}
    config = run_of(tmp_path, **changes, steps=20, learning_rate_decay="constant").config
    optimizer = make_optimizer(config)
    assert (optimizer.use_ema, optimizer.ema_momentum) == (True, 0.9)
    assert optimizer.global_clipnorm == 0.5
    rates = [float(optimizer._learning_rate(step)) for step in (0, 1, 3, 4, 19)]
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.01, 0.01, 0.01], rtol=1e-6)
    decaying = make_optimizer(dataclasses.replace(config, learning_rate_decay="cosine"))
    rates = [float(decaying._learning_rate(step)) for step in (0, 4, 12, 20)]
    # Down to a twentieth at the last step, half of the way after half of the steps.
    np.testing.assert_allclose(rates, [0.0025, 0.01, 0.00525, 0.0005], rtol=1e-6)


SCHEDULES = [
    ({}, {"sampler": "ddim"}, 25, "even"),
    ({"sampler": "ddpm"}, {"sampler": "ddpm"}, 1000, "even"),
    ({"sampler": "ddpm", "steps": 9}, {"sampler": "ddpm"}, 9, "even"),
    ({"eta": 0.5, "steps": 4}, {"eta": 0.5}, 4, "even"),
    (
        {"sampler": "heun", "spacing": "karras", "churn": 3.0},
        {"sampler": "heun", "churn": 3.0},
        25,
        "karras",
    ),
    (
        {"sampler": "dpmpp_2m", "spacing": "log_snr", "steps": 7},
        {"sampler": "dpmpp_2m"},
        7,
        "log_snr",
    ),
    (
        {"guidance_scale": 3.0, "guidance_width": 0.5, "steps": 5},
        {"guidance_scale": 3.0, "guidance_widths": (0.5,) * 5},
        5,
        "even",
    ),
]


@pytest.mark.parametrize(("options", "fields", "steps", "spacing"), SCHEDULES)
@pytest.mark.parametrize(("choice", "width"), [("full", 1.0), ("uniform:0.5", 0.5)])
def test_a_schedule_is_what_the_options_say(
    tmp_path, choice, width, options, fields, steps, spacing
):
    run = run_of(tmp_path, **NETWORK, sampling_steps=25)
    timesteps = spaced_timesteps(spacing, run.noise_table, steps)
    expected = StepSchedule.uniform(width, timesteps, **fields)
    assert run.schedule(choice, **options) == expected


def test_a_schedule_without_options_is_the_configurations(tmp_path):
    settings = {"sampler": "euler", "sampling_steps": 6, "timestep_spacing": "karras"}
    run = run_of(tmp_path, **NETWORK, **settings, guidance_scale=2.0)
    full = run.schedule(None)
    assert (full.sampler, len(full), full.guidance_scale) == ("euler", 6, 2.0)
    assert full.timesteps == spaced_timesteps("karras", run.noise_table, 6)
    chosen = StepSchedule(even_timesteps(1000, 3), (0.5, 1.0, 0.5))
    chosen.save(run.schedule_path)
    assert run.schedule(None) == chosen
    assert run.schedule("full") == full


def test_options_of_a_file_are_its_own(tmp_path):
    run = run_of(tmp_path, **NETWORK)
    StepSchedule((9, 0), (1.0, 0.5)).save(tmp_path / "s.json")
    with pytest.raises(InputError, match=r"`--churn` \(=1.0\) is for full and uniform:W"):
        run.schedule(str(tmp_path / "s.json"), churn=1.0)
    StepSchedule((9, 0), (1.0, 0.3)).save(tmp_path / "s.json")
    with pytest.raises(InputError, match=r"0\.3"):
        run.schedule(str(tmp_path / "s.json"))
