"""Samplers against recursions written from the papers, and the loop around them.

For pixels N(m, s²) the ideal network is affine, so every step is affine too and the mean and
variance of the samples follow from the papers' equations with no sampler at all.
"""

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import (
    StepCoefficients,
    clip_to_range,
    sample,
    sample_images,
    step_coefficients,
    take_step,
)
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.solvers import ddim, ddpm, x0_from_output

# Computed here rather than taken from the table under test.
ALPHA_BARS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
TABLE = NoiseTable.linear(1000)
MEAN, DEVIATION = 0.4, 0.3
SAMPLERS = [
    {"sampler": "ddpm", "variance": "fixed_large"},
    {"sampler": "ddpm", "variance": "fixed_small"},
    {"sampler": "ddim", "eta": 0.0},
    {"sampler": "ddim", "eta": 0.5},
    {"sampler": "ddim", "eta": 1.0},
]
TIMESTEPS = {
    "even": even_timesteps(1000, 20),
    "uneven": (990, 700, 699, 350, 120, 40, 7),
    "single": (600,),
}
PAIRS = [(4e-5, 0.003), (0.2, 0.21), (0.64, 0.81), (0.1, 0.97), (0.9999 * 0.99, 0.9999)]

each_sampler = pytest.mark.parametrize(
    "options", SAMPLERS, ids=lambda o: "-".join(map(str, o.values()))
)
each_pair = pytest.mark.parametrize(("now", "after"), PAIRS)


def row_of(update, alpha_bar=0.64):
    """The factors of a call that predicts ε at ᾱ_t."""
    x0_from_x, x0_from_model, model_from_x = x0_from_output("epsilon", alpha_bar)
    return StepCoefficients(
        x0_from_x,
        x0_from_model,
        update.x_from_x0,
        update.x_from_x,
        update.x_from_noise,
        update.x_from_previous,
        model_from_x,
    )


def ideal_epsilon(x, alpha_bar, mean=MEAN, deviation=DEVIATION):
    """E[ε | x_t] for pixels N(mean, deviation²)."""
    variance = alpha_bar * deviation**2 + 1.0 - alpha_bar
    return np.sqrt(1.0 - alpha_bar) * (x - np.sqrt(alpha_bar) * mean) / variance


def ideal_denoiser(x, t, width):
    return ideal_epsilon(x, ALPHA_BARS[t]).astype(np.float32)


def paper_step(x, epsilon, now, after, options):
    """Mean of x_s and its standard deviation, straight from the papers; now = ᾱ_t, after = ᾱ_s."""
    x0 = (x - np.sqrt(1 - now) * epsilon) / np.sqrt(now)  # DDIM, equation 9
    if options["sampler"] == "ddim":
        eta = options["eta"]
        sigma = eta * np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)  # equation 16
        mean = np.sqrt(after) * x0 + np.sqrt(1 - after - sigma**2) * epsilon  # equation 12
        return mean, sigma
    alpha = now / after
    beta = 1 - alpha
    # DDPM, equation 7; the two choices of σ² are those of section 3.2.
    mean = np.sqrt(after) * beta / (1 - now) * x0 + np.sqrt(alpha) * (1 - after) / (1 - now) * x
    small = (1 - after) / (1 - now) * beta
    variance = beta if options["variance"] == "fixed_large" else small
    return mean, np.sqrt(variance) if after < 1 else 0.0  # algorithm 1: z = 0 at the last step


def alpha_bar_pairs(timesteps):
    return zip(ALPHA_BARS[list(timesteps)], [*ALPHA_BARS[list(timesteps[1:])], 1.0], strict=True)


def expected_moments(timesteps, options):
    """Mean and variance of x_0 when every step uses the ideal ε and x_T is N(0, 1)."""
    mean, variance = 0.0, 1.0
    for now, after in alpha_bar_pairs(timesteps):
        at_zero, sigma = paper_step(0.0, ideal_epsilon(0.0, now), now, after, options)
        at_one, _ = paper_step(1.0, ideal_epsilon(1.0, now), now, after, options)
        slope = at_one - at_zero
        mean, variance = slope * mean + at_zero, slope**2 * variance + sigma**2
    return mean, variance


def gaussian_samples(timesteps, options, images=16, side=128):
    schedule = StepSchedule.uniform(1.0, timesteps, **options)
    noise = ImageNoise(0, 0, images, (side, side, 1))
    return sample(ideal_denoiser, schedule, TABLE, noise, clip=None)


def half_denoiser(x, t, width):
    """Some network: its output depends on every argument."""
    return np.float32(0.5) * x + np.float32(width * 0.1 + t * 1e-4)


@pytest.mark.parametrize("timesteps", TIMESTEPS.values(), ids=TIMESTEPS)
@each_sampler
def test_moments_of_gaussian_samples(options, timesteps):
    x = gaussian_samples(timesteps, options).astype(np.float64)
    mean, variance = expected_moments(timesteps, options)
    # 4.5 standard errors of the mean and of the variance over x.size independent pixels.
    assert abs(x.mean() - mean) < 4.5 * np.sqrt(variance / x.size)
    assert abs(x.var() - variance) < 4.5 * variance * np.sqrt(2 / x.size)


def test_the_recursion_tells_the_samplers_apart():
    # Otherwise the test above could pass with one sampler in place of another.
    moments = {expected_moments(TIMESTEPS["even"], options) for options in SAMPLERS[:4]}
    deviations = sorted(np.sqrt(variance) for _, variance in moments)
    assert min(np.diff(deviations)) > 0.01 * DEVIATION


@each_sampler
def test_many_steps_reach_the_distribution_of_the_data(options):
    timesteps = even_timesteps(1000, 1000)
    mean, variance = expected_moments(timesteps, options)
    assert mean == pytest.approx(MEAN, abs=2e-3)
    # The small variance is exact for data without spread only, hence 3 % (it is 2.5 % short).
    assert variance == pytest.approx(DEVIATION**2, rel=0.03)
    x = gaussian_samples(timesteps, options, images=4, side=48)
    assert x.mean() == pytest.approx(MEAN, abs=2e-3 + 4.5 * DEVIATION / np.sqrt(x.size))
    assert x.var() == pytest.approx(DEVIATION**2, rel=0.03 + 4.5 * np.sqrt(2 / x.size))


@each_sampler
def test_trajectory_follows_the_papers(options):
    timesteps = TIMESTEPS["uneven"]
    schedule = StepSchedule.uniform(0.5, timesteps, **options)
    result = sample(half_denoiser, schedule, TABLE, ImageNoise(3, 0, 2, (4, 4, 2)), clip=None)
    noise = ImageNoise(3, 0, 2, (4, 4, 2))
    x = noise.draw().astype(np.float64)
    for t, (now, after) in zip(timesteps, alpha_bar_pairs(timesteps), strict=True):
        x, sigma = paper_step(x, 0.5 * x + 0.05 + t * 1e-4, now, after, options)
        x = x + sigma * noise.draw() if sigma else x
    np.testing.assert_allclose(result, x, rtol=1e-4, atol=1e-4)


@each_pair
def test_ddim_with_eta_one_is_ddpm_with_the_small_variance(now, after):
    def in_x_and_epsilon(update):
        row = row_of(update, now)
        factor_x = row.x_from_x0 * row.x0_from_x + row.x_from_x
        return factor_x, row.x_from_x0 * row.x0_from_model, row.x_from_noise

    implicit = in_x_and_epsilon(ddim(now, after, eta=1.0))
    ancestral = in_x_and_epsilon(ddpm(now, after, "fixed_small"))
    np.testing.assert_allclose(implicit, ancestral, rtol=1e-9)


@each_pair
def test_ddpm_step_is_the_posterior_of_bayes(now, after):
    # Prior x_s | x_0 ~ N(√ᾱ_s x_0, 1 - ᾱ_s), likelihood x_t | x_s ~ N(√α x_s, 1 - α).
    alpha = now / after
    variance = 1 / (alpha / (1 - alpha) + 1 / (1 - after))
    row = ddpm(now, after, "fixed_small")
    assert row.x_from_noise**2 == pytest.approx(variance, rel=1e-9)
    assert row.x_from_x == pytest.approx(variance * np.sqrt(alpha) / (1 - alpha), rel=1e-9)
    assert row.x_from_x0 == pytest.approx(variance * np.sqrt(after) / (1 - after), rel=1e-9)


@each_pair
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_step_carries_one_marginal_to_the_next(now, after, eta):
    # From x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε with x_0 known, x_s must be √ᾱ_s x_0 + √(1-ᾱ_s) ε'.
    row = ddim(now, after, eta)
    assert row.x_from_x0 + row.x_from_x * np.sqrt(now) == pytest.approx(np.sqrt(after), rel=1e-9)
    variance = row.x_from_x**2 * (1 - now) + row.x_from_noise**2
    assert variance == pytest.approx(1 - after, rel=1e-9)


def test_fixed_large_variance_is_beta():
    assert ddpm(0.64, 0.81, "fixed_large").x_from_noise ** 2 == pytest.approx(1 - 0.64 / 0.81)
    small = ddpm(0.64, 0.81, "fixed_small").x_from_noise ** 2
    assert small == pytest.approx((1 - 0.64 / 0.81) * 0.19 / 0.36)


@pytest.mark.parametrize("last", [0, 300])
@each_sampler
def test_last_step_returns_the_predicted_x0_without_noise(options, last):
    schedule = StepSchedule.uniform(1.0, (last,), **options)
    assert step_coefficients(schedule, TABLE)[-1].x_from_noise == 0.0
    result = sample(half_denoiser, schedule, TABLE, ImageNoise(0, 0, 2, (3, 3, 1)), clip=None)
    x = ImageNoise(0, 0, 2, (3, 3, 1)).draw().astype(np.float64)
    signal, scale = np.sqrt(ALPHA_BARS[last]), np.sqrt(1 - ALPHA_BARS[last])
    expected = (x - scale * (0.5 * x + 0.1 + last * 1e-4)) / signal
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_only_stochastic_steps_draw_noise():
    rows = {
        str(options): [
            row.x_from_noise > 0
            for row in step_coefficients(StepSchedule.uniform(1.0, (9, 5, 0), **options), TABLE)
        ]
        for options in SAMPLERS
    }
    deterministic = rows.pop(str(SAMPLERS[2]))
    assert deterministic == [False, False, False]
    assert list(rows.values()) == [[True, True, False]] * 4


@pytest.mark.parametrize(
    ("options", "draws"), [(SAMPLERS[2], 1), (SAMPLERS[4], 3), (SAMPLERS[0], 3)]
)
def test_noise_is_drawn_only_where_it_is_used(options, draws):
    class CountedNoise(ImageNoise):
        count = 0

        def draw(self):
            self.count += 1
            return super().draw()

    noise = CountedNoise(0, 0, 1, (2, 2, 1))
    sample(half_denoiser, StepSchedule.uniform(1.0, (900, 400, 0), **options), TABLE, noise)
    assert noise.count == draws


def test_coefficients_are_python_floats():
    rows = step_coefficients(StepSchedule.uniform(1.0, (9, 5, 0)), TABLE)
    assert {type(value) for row in rows for value in row} == {float}
    assert all(isinstance(row, StepCoefficients) for row in rows)


# ᾱ_t = 0.64 and ᾱ_s = 0.81, so √ᾱ_t = 0.8, √(1-ᾱ_t) = 0.6, √ᾱ_s = 0.9. With ε = 0 and x = 2 the
# predicted x_0 is 2.5, clipped to 1. DDIM then takes ε = (2 - 0.8)/0.6 = 2 from the clipped x_0;
# DDPM weighs x_0 and x by 0.9 β/0.36 and √α 0.19/0.36 with α = 0.64/0.81 and √α = 8/9.
CLIPPED = [
    (row_of(ddim(0.64, 0.81)), 0.9 * 1 + np.sqrt(0.19) * 2, 0.9 * 2.5),
    (
        row_of(ddpm(0.64, 0.81)),
        0.9 * (0.17 / 0.81) / 0.36 * 1 + 8 / 9 * 0.19 / 0.36 * 2,
        0.9 * (0.17 / 0.81) / 0.36 * 2.5 + 8 / 9 * 0.19 / 0.36 * 2,
    ),
]


@pytest.mark.parametrize(("row", "clipped", "free"), CLIPPED, ids=["ddim", "ddpm"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_x0_is_clipped_inside_the_step(row, clipped, free, sign):
    x = np.full((1, 1, 1, 1), 2.0 * sign)
    zero = np.zeros_like(x)
    assert take_step(x, zero, None, row)[0].item() == pytest.approx(sign * clipped, rel=1e-12)
    assert take_step(x, zero, None, row, clip=None)[0].item() == pytest.approx(
        sign * free, rel=1e-12
    )
    # Inside the range the clip must change nothing.
    inside = take_step(0.1 * x, zero, None, row)[0].item()
    assert inside == take_step(0.1 * x, zero, None, row, clip=None)[0].item()


def test_noise_enters_with_its_factor():
    row = row_of(ddpm(0.64, 0.81))
    x = np.zeros((1, 1, 1, 1))
    step = take_step(x, x, np.full_like(x, 3.0), row)[0].item()
    assert step == pytest.approx(3.0 * np.sqrt(1 - 0.64 / 0.81))


def test_clip_to_range():
    assert clip_to_range(np.array([-3.0, -1.0, 0.25, 1.0, 3.0])).tolist() == [-1, -1, 0.25, 1, 1]


@each_sampler
def test_samples_stay_in_the_range_of_the_data(options):
    def run(**clip):
        schedule = StepSchedule.uniform(1.0, (800, 400, 0), **options)
        noise = ImageNoise(0, 0, 2, (4, 4, 1))
        # A network as wrong as this one pushes x_0 far outside.
        return sample(lambda x, t, width: np.sin(3 * x), schedule, TABLE, noise, **clip)

    assert np.abs(run()).max() <= 1.0
    assert np.abs(run(clip=None)).max() > 2.0
    # Clipping the result alone is not the same as clipping in every step.
    assert np.abs(run() - np.clip(run(clip=None), -1, 1)).max() > 0.1


def test_denoiser_gets_each_timestep_and_width_in_order():
    seen = []

    def denoise(x, t, width):
        seen.append((t, width, x.shape, x.dtype))
        return half_denoiser(x, t, width)

    schedule = StepSchedule((700, 300, 50, 0), (0.25, 1.0, 0.5, 0.75))
    sample(denoise, schedule, TABLE, ImageNoise(0, 0, 3, (4, 2, 1)))
    rest = ((3, 4, 2, 1), np.dtype(np.float32))
    steps = [(700, 0.25), (300, 1.0), (50, 0.5), (0, 0.75)]
    assert seen == [(*step, *rest) for step in steps]


def images_of(count, batch_size, seed=0, **options):
    schedule = StepSchedule((900, 500, 200, 0), (1.0, 0.5, 0.5, 1.0), **options)
    return sample_images(
        half_denoiser, schedule, TABLE, (4, 4, 2), count, seed=seed, batch_size=batch_size
    )


@each_sampler
def test_image_depends_on_seed_and_index_only(options):
    images = images_of(7, 64, **options)
    assert images.shape == (7, 4, 4, 2)
    assert images.dtype == np.uint8
    for count, batch_size in [(7, 1), (7, 3), (7, 7), (3, 2), (1, 5)]:
        np.testing.assert_array_equal(images_of(count, batch_size, **options), images[:count])
    assert len({image.tobytes() for image in images}) == 7
    assert not np.array_equal(images_of(7, 64, seed=1, **options), images)


def test_samples_become_grey_levels():
    def towards_half(x, t, width):
        # The ε for which the predicted x_0 is 0.5 everywhere.
        return (x - np.sqrt(ALPHA_BARS[t]) * 0.5) / np.sqrt(1 - ALPHA_BARS[t])

    schedule = StepSchedule.uniform(1.0, (500, 0))
    images = sample_images(towards_half, schedule, TABLE, (2, 2, 1), 2)
    assert (images == 191).all()  # (0.5 + 1) · 127.5 = 191.25


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_on_step_is_called_for_every_step_of_every_batch(sampler):
    calls = []
    # Heun calls the network twice in each step but the last.
    schedule = StepSchedule.uniform(1.0, (900, 400, 0), sampler=sampler)
    sample_images(half_denoiser, schedule, TABLE, (2, 2, 1), 5, batch_size=2, on_step=calls.append)
    assert calls == [0, 1, 2] * 3


def test_labels_go_with_their_images_in_every_batch():
    def grey_of_the_class(x, t, width, labels):
        # The ε for which the predicted x_0 is a quarter of the label everywhere.
        grey = labels[:, None, None, None] / 4.0
        return (x - np.sqrt(ALPHA_BARS[t]) * grey) / np.sqrt(1 - ALPHA_BARS[t])

    schedule = StepSchedule.uniform(1.0, (500, 0))
    labels, options = np.array([3, 0, 2, 2, 1]), {"num_classes": 4, "batch_size": 2}
    images = sample_images(
        grey_of_the_class, schedule, TABLE, (2, 2, 1), 5, labels=labels, **options
    )
    assert images[:, 0, 0, 0].tolist() == [223, 128, 191, 191, 159]


@pytest.mark.parametrize("argument", ["count", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_count_and_batch_size_below_one(argument, value):
    with pytest.raises(InputError, match=f"`{argument}` \\(={value}\\)"):
        images_of(**{"count": 2, "batch_size": 2, argument: value})


def test_schedule_of_another_number_of_timesteps():
    schedule = StepSchedule.uniform(1.0, (5, 0), train_timesteps=500)
    with pytest.raises(InputError, match=r"=500\) must equal the noise table's 1000"):
        sample(half_denoiser, schedule, TABLE, ImageNoise(0, 0, 1, (2, 2, 1)))


def test_the_given_table_is_used():
    table = NoiseTable([0.36, 0.5])  # ᾱ = 0.64, 0.32
    rows = step_coefficients(StepSchedule.uniform(1.0, (1, 0), train_timesteps=2), table)
    assert rows[0].x0_from_x == pytest.approx(1 / np.sqrt(0.32))
    assert rows[1].x0_from_x == pytest.approx(1.25)
    assert rows[1].x0_from_model == pytest.approx(-0.75)


def test_a_network_that_gives_nan_is_named():
    def broken(x, t, width):
        return np.where(t == 0, np.nan, 0.0) * x

    schedule = StepSchedule((500, 0), (1.0, 1.0))
    with pytest.raises(InputError, match="NaN or infinity"):
        sample_images(broken, schedule, NoiseTable.linear(1000), (4, 4, 1), 2)
