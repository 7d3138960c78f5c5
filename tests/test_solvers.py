"""The orders that the solvers claim, on data whose ideal network is known in closed form.

The data are a mixture of two Gaussians in each pixel, so E[x_0 | x_t] is not linear in x_t. The
error is that of the state a solver reaches at σ = 0.1, against many steps of Heun's method, over a
table of so many timesteps that rounding σ to one does not show.
"""

import numpy as np
import pytest

from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import network_calls, run_call, sample, step_coefficients
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.solvers import ddim, dpmpp_2m, heun_correction, with_churn

T = 100_000
TABLE = NoiseTable.edm(T, sigma_min=0.1, sigma_max=20.0, data_std=0.7).predicting("epsilon")
MEANS, DEVIATION = np.array([-0.6, 0.5]), 0.25
SHAPE = (4, 4, 1)
SOLVERS = ["ddim", "euler", "heun", "dpmpp_2m"]


def ideal_x0(x, alpha_bar):
    """E[x_0 | x_t] of the mixture, for pixels by themselves."""
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    variance = alpha_bar * DEVIATION**2 + noise**2
    apart = x[..., None] - signal * MEANS
    logits = -0.5 * apart**2 / variance
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    posterior = MEANS + signal * DEVIATION**2 / variance * apart
    return (weights * posterior).sum(axis=-1)


def ideal_network(table):
    """The output of a perfect network for each prediction; it sees x_t times its input scale."""

    def denoise(x, t, width):
        alpha_bar = table.alphas_cumprod[t]
        signal, noise = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
        sigma, data = noise / signal, table.data_std
        if table.prediction == "edm":
            x = x * signal * np.sqrt(sigma**2 + data**2)
        x0 = ideal_x0(x, alpha_bar)
        epsilon = (x - signal * x0) / noise
        if table.prediction == "edm":
            c_skip = data**2 / (sigma**2 + data**2)
            return (x0 - c_skip * x / signal) * np.sqrt(sigma**2 + data**2) / (sigma * data)
        return {"epsilon": epsilon, "v": signal * epsilon - noise * x0, "x0": x0}[table.prediction]

    return denoise


class DoubleNoise(ImageNoise):
    """float64, so that errors of single precision do not hide a solver's."""

    def draw(self):
        return super().draw().astype(np.float64)


def levels(steps):
    """Timesteps evenly spaced in σ^(1/7), which the table is even in."""
    return tuple(int(t) for t in np.linspace(T - 1, 0, steps + 1).round())


def state_at_the_end(sampler, steps, table=TABLE):
    """x at σ = 0.1 after `steps` steps: the state before the step to the image itself."""
    schedule = StepSchedule.uniform(1.0, levels(steps), train_timesteps=T, sampler=sampler)
    calls = network_calls(schedule, table)
    noise = DoubleNoise(0, 0, 8, SHAPE)
    x, previous = noise.draw(), None
    for call in calls[:-1]:
        x, previous = run_call(ideal_network(table), call, x, previous, noise.draw, clip=None)
    return x


@pytest.fixture(scope="module")
def exact():
    return state_at_the_end("heun", 1500)


def slope(sampler, exact):
    steps = np.array([40, 80, 160])
    errors = [np.sqrt(np.mean((state_at_the_end(sampler, n) - exact) ** 2)) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("sampler", "order", "tolerance"),
    [("ddim", 1, 0.15), ("euler", 1, 0.15), ("heun", 2, 0.25), ("dpmpp_2m", 2, 0.25)],
)
def test_error_falls_with_the_order_of_the_solver(sampler, order, tolerance, exact):
    assert slope(sampler, exact) == pytest.approx(order, abs=tolerance)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_all_agree_in_the_limit(sampler, exact):
    error = np.abs(state_at_the_end(sampler, 800) - exact).max()
    assert error < {"ddim": 0.02, "euler": 0.02}.get(sampler, 2e-4)


@pytest.mark.parametrize("prediction", ["v", "x0", "edm"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_every_prediction_gives_the_same_states(sampler, prediction):
    other = state_at_the_end(sampler, 12, TABLE.predicting(prediction))
    np.testing.assert_allclose(other, state_at_the_end(sampler, 12), atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m", "ddpm"])
def test_samples_are_of_the_data(sampler):
    options = {"train_timesteps": T, "sampler": sampler}
    if sampler in ("euler", "heun"):
        options["churn"] = 10.0
    schedule = StepSchedule.uniform(1.0, levels(100), **options)
    noise = DoubleNoise(0, 0, 500, SHAPE)
    x = sample(ideal_network(TABLE), schedule, TABLE, noise, clip=None)
    # Mean and variance of the mixture, at 8,000 pixels; a last step from σ = 0.1 removes noise.
    mean, variance = MEANS.mean(), MEANS.var() + DEVIATION**2
    assert x.mean() == pytest.approx(mean, abs=0.03)
    assert x.var() == pytest.approx(variance, rel=0.07)


@pytest.mark.parametrize(("now", "after"), [(0.2, 0.21), (0.64, 0.81), (0.1, 0.97)])
def test_ddim_is_eulers_step_in_edms_scale(now, after):
    update = ddim(now, after)
    sigma, sigma_next = (np.sqrt((1 - a) / a) for a in (now, after))
    x, x0 = 1.7, 0.3
    slope = (x / np.sqrt(now) - x0) / sigma
    expected = np.sqrt(after) * (x / np.sqrt(now) + (sigma_next - sigma) * slope)
    assert update.x_from_x0 * x0 + update.x_from_x * x == pytest.approx(expected, rel=1e-12)


def test_heuns_step_is_the_trapezoid():
    # EDM, algorithm 1, by hand: σ from 2 to 1, x = 3; estimates 0.5 at the beginning, 0.2 after.
    now, after = 1 / (1 + 2.0**2), 1 / (1 + 1.0**2)
    euler = 3.0 + (1.0 - 2.0) * (3.0 - 0.5) / 2.0
    slope = 0.5 * ((3.0 - 0.5) / 2.0 + (euler - 0.2) / 1.0)
    row = heun_correction(now, after)
    reached = (
        row.x_from_x * np.sqrt(after) * euler + row.x_from_x0 * 0.2 + row.x_from_previous * 0.5
    )
    assert reached / np.sqrt(after) == pytest.approx(3.0 - slope, rel=1e-12)


def test_second_order_multistep_by_hand():
    # λ = 0, 1, 3: h = 2 after h' = 1, so r = 1/2 and D = 2 x̂_0 - x̂_0' (algorithm 2).
    before, now, after = (1 / (1 + np.exp(-2.0 * value)) for value in (0.0, 1.0, 3.0))
    row = dpmpp_2m(before, now, after)
    assert row.x_from_x == pytest.approx(np.sqrt((1 - after) / (1 - now)), rel=1e-12)
    scale = np.sqrt(after) * (1 - np.exp(-2.0))
    assert row.x_from_x0 == pytest.approx(2.0 * scale, rel=1e-9)
    assert row.x_from_previous == pytest.approx(-scale, rel=1e-9)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.8), (0.2, 1.0)])
def test_multistep_starts_and_ends_with_first_order(before, after):
    np.testing.assert_allclose(dpmpp_2m(before, 0.5, after), ddim(0.5, after), atol=1e-12)


def test_churn_adds_the_noise_between_two_levels():
    # From σ = 1 to σ̂ = 1.3: in EDM's scale x + S sqrt(1.69 - 1) z.
    reached, churned = 1 / (1 + 1.0), 1 / (1 + 1.3**2)
    plain = ddim(1 / (1 + 3.0**2), reached)
    row = with_churn(plain, reached, churned, 1.003)
    shrinkage = np.sqrt(churned / reached)
    assert row.x_from_x == pytest.approx(plain.x_from_x * shrinkage, rel=1e-12)
    assert row.x_from_x0 == pytest.approx(plain.x_from_x0 * shrinkage, rel=1e-12)
    assert row.x_from_noise / np.sqrt(churned) == pytest.approx(1.003 * np.sqrt(0.69), rel=1e-12)


def test_network_calls_of_heun_and_churn():
    table = NoiseTable.edm(1000)
    schedule = StepSchedule((999, 600, 300, 0), (1.0, 0.5, 0.25, 1.0), sampler="heun")
    calls = network_calls(schedule, table)
    visited = [(call.timestep, call.width, call.step) for call in calls]
    assert visited == [
        (999, 1.0, 0),
        (600, 1.0, 0),
        (600, 0.5, 1),
        (300, 0.5, 1),
        (300, 0.25, 2),
        (0, 0.25, 2),
        (0, 1.0, 3),
    ]
    assert schedule.call_counts() == {1.0: 3, 0.5: 2, 0.25: 2}
    churning = StepSchedule(
        (999, 600, 300, 0), (1.0,) * 4, sampler="euler", churn=1.0, churn_min=0.05, churn_max=3.0
    )
    begins = [call.timestep for call in network_calls(churning, table)]
    # γ = 1/4; σ is 80, 5.27, 0.23 and 0.002, of which the third alone lies within [0.05, 3].
    expected = table.nearest_timestep(1.25 * table.sigmas[300])
    assert begins == [999, 600, expected, 0]
    noisy = [row.x_from_noise > 0 for row in step_coefficients(churning, table)]
    assert noisy == [False, True, False, False]
