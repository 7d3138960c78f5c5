"""The importance table: its numbers, its file, and what a step's error does to the final image."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import sample
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.search.importance import (
    ImportanceTable,
    measure_importance,
    step_gains,
)

TABLE = NoiseTable.linear(1000)
# Computed here rather than taken from the table under test.
ALPHA_BARS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
WIDTHS = (0.25, 1.0, 0.5)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (7, 4, 3, 2)).astype(np.float32)


class Recorder:
    """Predicts `width * x` and keeps what it was asked."""

    def __init__(self):
        self.inputs = {}
        self.sizes = []

    def __call__(self, x, t, width):
        self.inputs.setdefault((t, width), []).append(x.copy())
        self.sizes.append(len(x))
        return np.float32(width) * x

    def noise(self, t, width):
        """The noise that was in the inputs at a timestep."""
        x = np.concatenate(self.inputs[t, width]).astype(np.float64)
        return (x - np.sqrt(ALPHA_BARS[t]) * IMAGES) / np.sqrt(1.0 - ALPHA_BARS[t])


def measure(denoise=None, images=IMAGES, **options):
    options = {"timesteps": 4, **options}
    return measure_importance(denoise or Recorder(), TABLE, images, WIDTHS, **options)


def small_table(**fields):
    values = {
        "widths": (1.0, 0.5),
        "timesteps": (800, 400, 0),
        "error": [[0.1, 0.2, 0.4], [0.3, 0.6, 0.2]],
        "standard_error": [[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]],
        "image_std": 2.0,
        "images": 16,
        "weights": "abc",
    }
    return ImportanceTable(**{**values, **fields})


def test_the_errors_of_a_known_denoiser():
    denoise = Recorder()
    table = measure(denoise, seed=5)
    assert table.widths == (1.0, 0.5, 0.25)
    assert table.timesteps == (750, 500, 250, 0)
    assert table.images == 7
    assert table.image_std == pytest.approx(np.std(IMAGES, dtype=np.float64), rel=1e-12)
    noise = denoise.noise(750, 1.0)
    for row, width in enumerate(table.widths):
        for column, t in enumerate(table.timesteps):
            x = np.sqrt(ALPHA_BARS[t]) * IMAGES + np.sqrt(1.0 - ALPHA_BARS[t]) * noise
            each = [np.mean((width * one - own) ** 2) for one, own in zip(x, noise, strict=True)]
            mean = sum(each) / 7
            variance = sum((value - mean) ** 2 for value in each) / 6
            assert table.error[row, column] == pytest.approx(mean, rel=1e-5)
            assert table.standard_error[row, column] == pytest.approx(
                np.sqrt(variance / 7), rel=1e-5
            )


def test_every_width_and_timestep_gets_the_same_images_and_noise():
    denoise, ticks = Recorder(), []
    measure(denoise, batch_size=3, on_timestep=lambda: ticks.append(len(denoise.sizes)))
    assert set(denoise.inputs) == {(t, w) for t in (750, 500, 250, 0) for w in WIDTHS}
    # Three widths see 3, 3 and the last image, at each of four timesteps.
    assert sorted(denoise.sizes) == [1] * 12 + [3] * 24
    assert ticks == [9, 18, 27, 36]
    noise = denoise.noise(750, 1.0)
    for t, width in denoise.inputs:
        inputs = np.concatenate(denoise.inputs[t, width])
        assert inputs.dtype == np.float32
        np.testing.assert_array_equal(inputs, np.concatenate(denoise.inputs[t, 1.0]))
        np.testing.assert_allclose(denoise.noise(t, width), noise, atol=3e-5)


def test_the_noise_is_standard_normal_and_the_seeds():
    images = np.random.default_rng(1).uniform(-1, 1, (40, 16, 16, 1)).astype(np.float32)
    seen = {}
    for seed in (0, 1):
        measure(lambda x, t, width, seed=seed: seen.setdefault(seed, x), images, seed=seed)
    drawn = [
        (seen[seed] - np.sqrt(ALPHA_BARS[750]) * images) / np.sqrt(1.0 - ALPHA_BARS[750])
        for seed in (0, 1)
    ]
    for noise in drawn:
        assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size)
        assert abs(noise.var() - 1.0) < 4.5 * np.sqrt(2 / noise.size)
    assert abs(np.mean(drawn[0] * drawn[1])) < 4.5 / np.sqrt(noise.size)


def test_the_batch_size_changes_no_bit():
    tables = [measure(batch_size=size).to_dict() for size in (1, 3, 7, 256)]
    assert all(table == tables[0] for table in tables)


def test_predicting_zero_has_error_one_and_the_noise_itself_zero():
    images = np.random.default_rng(1).uniform(-1, 1, (40, 16, 16, 1)).astype(np.float32)

    def denoise(x, t, width):
        noise = (x - np.sqrt(ALPHA_BARS[t]) * images) / np.sqrt(1.0 - ALPHA_BARS[t])
        return noise if width == 1.0 else np.zeros_like(x)

    table = measure(denoise, images)
    assert table.error[0].max() < 1e-9
    # A mean of 40 × 256 squares of standard normals, each of variance 2.
    np.testing.assert_allclose(table.error[1:], 1.0, atol=4.5 * np.sqrt(2 / 10240))
    np.testing.assert_allclose(table.standard_error[1:], np.sqrt(2 / 10240), rtol=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_that_is_not_finite_is_refused(value):
    def denoise(x, t, width):
        return np.where((t == 250) & (width == 0.5), np.float32(value), x)

    with pytest.raises(InputError, match="NaN or infinity"):
        measure(denoise)


def test_one_image_has_no_standard_error():
    with pytest.raises(InputError, match=r"`images` \(=1\) must be at least 2"):
        measure(images=IMAGES[:1])


def test_rows_are_interpolated_linearly_between_timesteps():
    table = small_table()
    expected = [[0.1, 0.15, 0.25, 0.4], [0.3, 0.45, 0.5, 0.2]]
    np.testing.assert_allclose(table.at((800, 600, 300, 0), table.error), expected, rtol=1e-12)
    # Beyond the table's timesteps its ends hold.
    np.testing.assert_allclose(table.at((999, 0), table.error), [[0.1, 0.4], [0.3, 0.2]])
    np.testing.assert_allclose(table.at((200,), table.standard_error), [[0.025], [0.055]])


def test_the_effect_is_the_excess_error_times_the_squared_gain():
    schedule = StepSchedule.uniform(0.5, (800, 600, 100))
    effect = small_table().sample_effect(schedule, TABLE)
    gains = step_gains(schedule, TABLE, 2.0)
    # At 100 the narrow width is better by chance: 0.3 against 0.35.
    excess = [[0.0, 0.0, 0.0], [0.2, 0.3, 0.0]]
    np.testing.assert_allclose(effect, gains**2 * np.array(excess), rtol=1e-12, atol=1e-15)


def test_the_harm_is_the_excess_error_times_the_share_of_noise():
    # Neither sampler nor widths matter, only where the steps are.
    for fields in ({}, {"sampler": "ddpm"}):
        schedule = StepSchedule.uniform(0.5, (800, 600, 100), **fields)
        harm = small_table().harm(schedule, TABLE)
        expected = (1.0 - ALPHA_BARS[[800, 600, 100]]) * [[0.0, 0.0, 0.0], [0.2, 0.3, 0.0]]
        np.testing.assert_allclose(harm, expected, rtol=1e-12, atol=1e-15)


def final_image(schedule, std, wrong_step=None, by=0.0):
    """Sample from pixels N(0, std²) with their exact denoiser; one step's ε is off by `by`."""

    def denoise(x, t, width):
        a = ALPHA_BARS[t]
        covariance, variance = np.sqrt(a) * std**2, a * std**2 + 1.0 - a
        epsilon = (x - np.sqrt(a) * covariance / variance * x) / np.sqrt(1.0 - a)
        return epsilon + by if t == wrong_step else epsilon

    # Noise in float64, the same for every run.
    random = np.random.default_rng(3)
    noise = SimpleNamespace(draw=lambda: random.standard_normal((2, 2, 2, 1)))
    return sample(denoise, schedule, TABLE, noise, clip=None)


@pytest.mark.parametrize("std", [0.3, 2.5])
@pytest.mark.parametrize("timesteps", [even_timesteps(1000, 6), (990, 700, 699, 120, 7)])
@pytest.mark.parametrize(
    "options",
    [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}, {"sampler": "ddpm"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_gains_are_how_far_the_final_image_moves(options, timesteps, std):
    schedule = StepSchedule.uniform(1.0, timesteps, **options)
    right = final_image(schedule, std)
    by = 0.01
    moved = [np.abs(final_image(schedule, std, t, by) - right) for t in timesteps]
    gains = step_gains(schedule, TABLE, std)
    assert gains.shape == (len(timesteps),)
    for gain, change in zip(gains, moved, strict=True):
        np.testing.assert_allclose(change, gain * by, rtol=1e-6)
    # Errors of different steps matter differently; otherwise any formula would do.
    assert np.ptp(gains) > 0.1 * gains.max()


def test_the_gain_of_a_single_step_needs_no_model_of_the_data():
    for t in (5, 600):
        gain = step_gains(StepSchedule.uniform(1.0, (t,)), TABLE, 1.0)
        assert gain == pytest.approx([np.sqrt((1 - ALPHA_BARS[t]) / ALPHA_BARS[t])], rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_images_are_refused(dtype):
    with pytest.raises(InputError, match="must not all be the same"):
        measure(images=np.full((3, 2, 2, 1), 0.1, dtype))


def test_the_file_is_read_to_the_last_bit(tmp_path):
    table = measure(weights="0f3a")
    table.save(tmp_path / "importance.json")
    loaded = ImportanceTable.load(tmp_path / "importance.json")
    for name in ("error", "standard_error"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name), strict=True)
    for name in ("widths", "timesteps", "image_std", "images", "weights"):
        assert getattr(loaded, name) == getattr(table, name)
    assert (loaded.weights, loaded.images) == ("0f3a", 7)
    assert isinstance(loaded.widths, tuple) and isinstance(loaded.timesteps, tuple)


WIDE_ERROR = [0.1, 0.2, 0.3]
BROKEN = [
    ("version", 2, "must be 1"),
    ("format", "ddsm-step-schedule", "must be 'ddsm-importance'"),
    ("extra", 1, r"unknown keys \['extra'\]"),
    ("timesteps", [0, 400, 800], "must fall strictly"),
    ("timesteps", [800, 400.5, 0], "must be an integer"),
    ("timesteps", [], "at least one"),
    ("timesteps", 800, "not iterable"),
    ("widths", [0.5, 1.0], "must fall strictly"),
    ("widths", [0.5, 0.5], "must fall strictly"),
    ("widths", [1.5, 0.5], r"within \(0, 1\]"),
    ("widths", [1.0, 0.0], r"within \(0, 1\]"),
    ("widths", ["wide", "narrow"], r"within \(0, 1\]"),
    ("error", [[0.1, 0.2], [0.3, 0.4]], r"\(2, 3\)"),
    ("error", [WIDE_ERROR], r"\(2, 3\)"),
    ("error", [WIDE_ERROR, [0.4]], "rows of numbers"),
    ("error", [WIDE_ERROR, [0.1, 0.2, "x"]], "rows of numbers"),
    ("error", [WIDE_ERROR, [0.1, 0.2, 10**400]], "rows of numbers"),
    ("error", [WIDE_ERROR, [0.1, 0.2, None]], "finite"),
    ("standard_error", [WIDE_ERROR, [0.1, -0.2, 0.3]], "numbers ≥ 0"),
    ("image_std", 0.0, "positive"),
    ("image_std", -1, "positive"),
    ("image_std", 10**400, "positive"),
    ("image_std", "wide", "positive"),
    ("images", 1, "at least 2"),
    ("images", "many", "at least 2"),
]


@pytest.mark.parametrize(("key", "value", "rule"), BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path, key, value, rule):
    path = tmp_path / "importance.json"
    path.write_text(json.dumps({**small_table().to_dict(), key: value}))
    with pytest.raises(InputError, match=rule) as refusal:
        ImportanceTable.load(path)
    message = str(refusal.value)
    assert message.startswith(f"importance {path}: ")
    assert message.endswith("; delete it to measure again") and "\n" not in message
    assert f"`{key}`" in message or rule in ("not iterable", r"unknown keys \['extra'\]")


def test_a_file_that_lacks_a_key_or_is_none_is_refused(tmp_path):
    path = tmp_path / "importance.json"
    content = small_table().to_dict()
    path.write_text(json.dumps({key: content[key] for key in content if key != "image_std"}))
    with pytest.raises(InputError, match=r"lacks the keys \['image_std'\]"):
        ImportanceTable.load(path)
    path.write_text(json.dumps([content]))
    with pytest.raises(InputError, match="ddsm-importance"):
        ImportanceTable.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        ImportanceTable.load(tmp_path / "none.json")
