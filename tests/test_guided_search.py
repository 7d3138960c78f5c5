"""Searching guided schedules: shared states, the importance of both branches, the command."""

import json

import numpy as np
import pytest
from conftest import eagerly, set_options

from ddsm_tf.cost import cost_fraction
from ddsm_tf.metrics import train_classifier
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import SAMPLERS, StepSchedule
from ddsm_tf.search.baselines import importance_proxy
from ddsm_tf.search.comparison import proxy_correlation
from ddsm_tf.search.importance import ImportanceTable, measure_importance
from ddsm_tf.search.prefix import PrefixSampler
from ddsm_tf.search.space import ScheduleSpace

TABLE = NoiseTable.linear(1000)
SHAPE = (4, 4, 1)
TIMESTEPS = (900, 700, 500, 300, 100, 0)


def network(x, t, width, labels=None):
    """Outputs that tell widths, timesteps and classes apart."""
    shift = 0.0 if labels is None else 0.3 * np.asarray(labels)[:, None, None, None]
    return (np.sin((1 + width) * x + t / 500 + shift)).astype(np.float32)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_shared_states_change_no_bit(sampler, guided):
    options = {"sampler": sampler, "guidance_scale": 2.0 if guided else 1.0}
    base = StepSchedule.uniform(1.0, TIMESTEPS, **options)
    with_memory = PrefixSampler(network, TABLE, SHAPE, batch_size=4, num_classes=3)
    choices = [(1.0,) * 6, (1.0, 1.0, 1.0, 0.5, 0.5, 0.5), (1.0, 1.0, 1.0, 0.5, 0.5, 1.0)]
    others = [None, (0.5,) * 6, (0.5, 0.5, 1.0, 1.0, 1.0, 1.0)] if guided else [None]
    schedules = [base.with_widths(c, o) for c in choices for o in others]
    for schedule in schedules:
        plain = sample_images(
            network, schedule, TABLE, SHAPE, 6, seed=2, batch_size=4, num_classes=3
        )
        np.testing.assert_array_equal(with_memory(schedule, 6, 2), plain)
    made = with_memory.calls + with_memory.reused_calls
    expected = sum(sum(schedule.call_counts().values()) for schedule in schedules)
    assert made.total() == 6 * expected
    assert with_memory.reused_calls.total() > 0.2 * made.total()


def test_other_samplers_do_not_share_states():
    sampler = PrefixSampler(network, TABLE, SHAPE)
    for name in ("ddim", "dpmpp_2m", "heun", "ddim"):
        schedule = StepSchedule.uniform(1.0, TIMESTEPS, sampler=name)
        plain = sample_images(network, schedule, TABLE, SHAPE, 3)
        np.testing.assert_array_equal(sampler(schedule, 3, 0), plain)
    # The second time DDIM knows all but its last step.
    assert sampler.reused_calls == {1.0: 3 * 5}


def make_table():
    error = np.array([[0.1, 0.1, 0.1], [0.2, 0.3, 0.5]])
    return ImportanceTable((1.0, 0.5), (900, 500, 0), error, 0.01 * error, 0.5, 10)


def test_harm_of_both_branches():
    schedule = StepSchedule.uniform(1.0, (900, 500, 0), guidance_scale=3.0)
    table = make_table()
    harm, guided = table.harm(schedule, TABLE), table.guided_harm(schedule, TABLE)
    # s² = 9 for the conditional branch and (s - 1)² = 4 for the other.
    np.testing.assert_allclose(guided, np.concatenate([9 * harm, 4 * harm], axis=1))
    space = ScheduleSpace(schedule, (1.0, 0.5), 3, free_guidance=True)
    proxy = importance_proxy(space, guided)
    assert proxy.shape == (6, 2)
    np.testing.assert_allclose(proxy[:3, 1] * 4, proxy[3:, 1] * 9)
    genomes = [(0,) * 6, (1, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0), (1,) * 6]
    entries = [
        {"schedule": space.schedule(g).to_dict(), "distance": proxy[np.arange(6), g].sum()}
        for g in genomes
    ]
    correlation = proxy_correlation(entries, guided, schedule, [1.0, 0.5])
    assert correlation == pytest.approx(1.0)


@pytest.mark.parametrize("prediction", ["v", "x0", "edm"])
def test_importance_is_the_error_of_the_noise_whatever_is_predicted(prediction):
    table = (NoiseTable.edm(1000) if prediction == "edm" else TABLE).predicting(prediction)
    images = np.random.default_rng(0).normal(0, 0.3, (4, *SHAPE)).astype(np.float32)
    seen = []

    def zero_estimate(x, t, width, labels):
        """Says that the image is all zero, so that the noise is x_t / sqrt(1 - ᾱ)."""
        seen.append(labels.tolist())
        alpha_bar = table.alphas_cumprod[t]
        if prediction == "x0":
            return np.zeros_like(x)
        if prediction == "v":
            return np.sqrt(alpha_bar / (1 - alpha_bar)) * x
        sigma, data = table.sigmas[t], table.data_std
        total = np.sqrt(sigma**2 + data**2)
        # x̂_0 = c_skip x + c_out F = 0, with c_in x at the input.
        return -(data**2 / total**2) * (x * total) / (sigma * data / total)

    labels = np.array([2, 0, 1, 1])
    found = measure_importance(
        zero_estimate, table, images, (1.0, 0.5), timesteps=3, labels=labels, batch_size=3
    )
    assert seen[0] == [2, 0, 1] and [1] in seen
    noise_to_image = table.alphas_cumprod[list(found.timesteps)]
    expected = noise_to_image / (1 - noise_to_image) * np.mean(images.astype(float) ** 2)
    np.testing.assert_allclose(found.error[0], expected, rtol=2e-3)


def test_search_command_with_free_guidance(tmp_path, run_here):
    run = tmp_path / "run"
    settings = ["num_classes=10", "base_channels=8", "channel_multipliers=1", "widths=1,0.5"]
    settings += ["batch_size=16", "sample_every=0", "sampling_steps=4", "held_out_images=16"]
    train = ["train", "digits", "--out", run, "--steps", 3, *set_options(settings)]
    with eagerly():
        assert run_here(*train).returncode == 0
    from ddsm_tf.training.run import Run

    train_classifier(Run.open(run).load_data().images, steps=5).save(run / "classifier.keras")
    small = ["--trials", 9, "--images", 8, "--segments", 2, "--confirm-images", 8]
    guided = ["--guidance", 2.5, "--guidance-widths", "free"]
    refused = run_here("search", run, *small, "--guidance-widths", "free")
    assert refused.returncode == 2 and "needs --guidance" in refused.stderr
    done = run_here("search", run, *small, *guided)
    assert done.returncode == 0, done.stderr
    entries = json.loads((run / "search" / "pareto.json").read_text())
    schedules = [StepSchedule.from_dict(entry["schedule"]) for entry in entries]
    assert {schedule.guidance_scale for schedule in schedules} == {2.5}
    assert any(schedule.guidance_widths for schedule in schedules)
    macs = {
        width: next(
            entry["macs"] / 8
            for entry in entries
            if entry["schedule"]["widths"] == [width] * 4
            and "guidance_widths" not in entry["schedule"]
        )
        for width in (1.0, 0.5)
    }
    for entry, schedule in zip(entries, schedules, strict=True):
        assert entry["macs_fraction"] == pytest.approx(cost_fraction(schedule, macs))
    assert StepSchedule.load(run / "schedule.json").guided
    again = run_here("search", run, *small, "--guidance", 2.5, "--resume")
    assert again.returncode == 2 and "guidance_widths" in again.stderr
