"""The samplers' equations, one function each, as factors of one affine step.

From x_t at noise level ᾱ_t to x_s at ᾱ_s with s < t, and ᾱ = 1 for the image itself:

    x̂_0 = x0_from_x · x_t + x0_from_model · model(model_from_x · x_t, t)     what the output means
    x_s = x_from_x0 · x̂_0 + x_from_x · x_t + x_from_previous · x̂_0' + x_from_noise · z

x̂_0' is the estimate of the network call before. x_t is scaled as DDPM scales it; EDM's state is
x_t / sqrt(ᾱ_t) and its noise level σ_t = sqrt((1 - ᾱ_t) / ᾱ_t).

Every function takes ᾱ as float64 numbers, NumPy arrays or tensors, and gives factors of the same
type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Update(NamedTuple):
    """Factors of x_s; see the module's equations."""

    x_from_x0: Any
    x_from_x: Any
    x_from_previous: Any
    x_from_noise: Any


def x0_from_output(prediction: str, alpha_bar: Any, data_std: float = 0.5) -> tuple[Any, Any, Any]:
    """What a network's output says of the image.

    Args:
        prediction: see `NoiseTable`.
        alpha_bar: ᾱ_t of the call.
        data_std: σ_data of "edm".

    Returns:
        `x0_from_x`, `x0_from_model` and `model_from_x`.
    """
    signal, noise = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    one = alpha_bar * 0.0 + 1.0
    if prediction == "epsilon":
        # DDPM, equation 15; DDIM, equation 9.
        return 1.0 / signal, -noise / signal, one
    if prediction == "v":
        # Salimans and Ho, 2022, appendix D: v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0.
        return signal, -noise, one
    if prediction == "x0":
        return 0.0 * one, one, one
    # EDM, table 1, with x_t / sqrt(ᾱ) for its x.
    sigma, total = noise / signal, ((1.0 - alpha_bar) / alpha_bar + data_std**2) ** 0.5
    c_skip, c_out, c_in = data_std**2 / total**2, sigma * data_std / total, 1.0 / total
    return c_skip / signal, c_out, c_in / signal


def ddpm(alpha_bar: Any, alpha_bar_next: Any, variance: str = "fixed_large") -> Update:
    """Ancestral step (DDPM, equation 7), also between timesteps that are not neighbours.

    Args:
        alpha_bar: ᾱ_t.
        alpha_bar_next: ᾱ_s, whose noise the caller leaves out where it is 1.
        variance: "fixed_large" (σ² = β) or "fixed_small" (σ² = β̃), DDPM, section 3.2.
    """
    alpha = alpha_bar / alpha_bar_next
    beta = 1.0 - alpha
    posterior_variance = beta * (1.0 - alpha_bar_next) / (1.0 - alpha_bar)
    noise_variance = beta if variance == "fixed_large" else posterior_variance
    return Update(
        x_from_x0=alpha_bar_next**0.5 * beta / (1.0 - alpha_bar),
        x_from_x=alpha**0.5 * (1.0 - alpha_bar_next) / (1.0 - alpha_bar),
        x_from_previous=0.0 * alpha_bar,
        x_from_noise=noise_variance**0.5,
    )


def ddim(alpha_bar: Any, alpha_bar_next: Any, eta: Any = 0.0) -> Update:
    """Implicit step (DDIM, arXiv 2010.02502, equations 12 and 16); ε is that of the clipped x̂_0.

    With η = 0 this is Euler's method on EDM's equation (Karras et al., equation 4), exactly.

    Args:
        alpha_bar: ᾱ_t.
        alpha_bar_next: ᾱ_s.
        eta: 0 is deterministic, 1 has the noise of DDPM's fixed-small variance.
    """
    sigma = eta * ((1.0 - alpha_bar_next) / (1.0 - alpha_bar)) ** 0.5
    sigma = sigma * (1.0 - alpha_bar / alpha_bar_next) ** 0.5
    # Never negative but for rounding.
    direction = abs(1.0 - alpha_bar_next - sigma**2) ** 0.5
    x_from_x = direction / (1.0 - alpha_bar) ** 0.5
    return Update(
        x_from_x0=alpha_bar_next**0.5 - x_from_x * alpha_bar**0.5,
        x_from_x=x_from_x,
        x_from_previous=0.0 * alpha_bar,
        x_from_noise=sigma,
    )


def heun_correction(alpha_bar: Any, alpha_bar_next: Any) -> Update:
    """Second half of a Heun step (EDM, algorithm 1, line 8), after Euler's step has led to x_s.

    The slopes (x - x̂_0) / σ at both ends differ by (x̂_0' - x̂_0) / σ_s, since Euler's step is a
    straight line; half of that, times the step's σ_s - σ_t, is added. The call is at s.

    Args:
        alpha_bar: ᾱ_t where the step began.
        alpha_bar_next: ᾱ_s below 1; the step to the image itself has no second half.
    """
    sigma = ((1.0 - alpha_bar) / alpha_bar) ** 0.5
    sigma_next = ((1.0 - alpha_bar_next) / alpha_bar_next) ** 0.5
    factor = alpha_bar_next**0.5 * (sigma_next - sigma) / (2.0 * sigma_next)
    return Update(
        x_from_x0=-factor,
        x_from_x=0.0 * alpha_bar + 1.0,
        x_from_previous=factor,
        x_from_noise=0.0 * alpha_bar,
    )


def dpmpp_2m(alpha_bar_before: Any, alpha_bar: Any, alpha_bar_next: Any, xp: Any = np) -> Update:
    """Multistep DPM-Solver++ of second order (Lu et al., 2022, arXiv 2211.01095, algorithm 2).

    The steps from the noise and to the image itself are of first order, for want of an estimate
    before and of a finite λ after.

    Args:
        alpha_bar_before: ᾱ of the call before; equal to ᾱ_t where there was none.
        alpha_bar: ᾱ_t.
        alpha_bar_next: ᾱ_s.
        xp: NumPy or a library with its names.
    """
    # λ = log(sqrt(ᾱ) / sqrt(1 - ᾱ)), so exp(-h) = σ_s / σ_t, which is 0 for the image itself.
    shrinkage = ((1.0 - alpha_bar_next) / alpha_bar_next * alpha_bar / (1.0 - alpha_bar)) ** 0.5
    second_order = (alpha_bar_next < 1.0) & (alpha_bar_before < alpha_bar)
    safe_shrinkage = xp.where(second_order, shrinkage, 0.5)
    step = -xp.log(safe_shrinkage)
    before = (1.0 - alpha_bar_before) / alpha_bar_before * alpha_bar / (1.0 - alpha_bar)
    step_before = xp.where(second_order, 0.5 * xp.log(before), 1.0)
    extrapolated = xp.where(second_order, step / (2.0 * step_before), 0.0)
    from_estimates = alpha_bar_next**0.5 * (1.0 - shrinkage)
    return Update(
        x_from_x0=from_estimates * (1.0 + extrapolated),
        x_from_x=((1.0 - alpha_bar_next) / (1.0 - alpha_bar)) ** 0.5,
        x_from_previous=-from_estimates * extrapolated,
        x_from_noise=0.0 * alpha_bar,
    )


def with_churn(
    update: Update, alpha_bar_next: Any, alpha_bar_churned: Any, noise_scale: float = 1.0
) -> Update:
    """The step and the noise that EDM adds before the next one (algorithm 2, lines 4 to 6).

    x̂ = x + S_noise sqrt(σ̂² - σ²) z in EDM's scale. A step that has noise of its own gets the sum.

    Args:
        update: the step to ᾱ_s.
        alpha_bar_next: ᾱ_s.
        alpha_bar_churned: ᾱ of σ̂, at most ᾱ_s; equal to it where no noise is added.
        noise_scale: S_noise.
    """
    shrinkage = (alpha_bar_churned / alpha_bar_next) ** 0.5
    # σ̂² - σ² = 1 / ᾱ̂ - 1 / ᾱ, in DDPM's scale times ᾱ̂.
    added = noise_scale**2 * abs(1.0 - alpha_bar_churned / alpha_bar_next)
    x0, x, previous, noise = (shrinkage * factor for factor in update)
    return Update(x0, x, previous, (noise**2 + added) ** 0.5)
