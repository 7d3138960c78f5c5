"""Samplers as pure step functions, and the one loop that runs a step schedule.

Every step is affine in the state, the model's output and fresh noise, so its coefficients are
computed once on the host in float64 and the same code serves NumPy arrays on a small device and
tensors on a server. Networks predict ε. With s < t the next timestep of the schedule and
ᾱ_{-1} = 1:

    x̂_0 = clip(x0_from_x · x_t + x0_from_model · ε_θ(x_t, t))
    x_s = x_from_x0 · x̂_0 + x_from_x · x_t + x_from_noise · z
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddsm_tf.errors import InputError
from ddsm_tf.images import to_uint8
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import ImageNoise

Denoiser = Callable[[Any, int, float], Any]
"""`denoise(x, t, width)`: ε for x of shape (N, H, W, C) float32, all N at timestep t."""

Clip = Callable[[Any], Any]


class StepCoefficients(NamedTuple):
    """Host-computed factors of one step; see the module's equations."""

    x0_from_x: float
    x0_from_model: float
    x_from_x0: float
    x_from_x: float
    x_from_noise: float


def ddpm_step(
    alpha_bar: Any, alpha_bar_next: Any, variance: str = "fixed_large"
) -> StepCoefficients:
    """Ancestral step (DDPM, equations 7 and 15), also between timesteps that are not neighbours.

    Args:
        alpha_bar: ᾱ_t, a number, array or tensor, and so the coefficients.
        alpha_bar_next: ᾱ_s with s < t; 1 for the last step, whose noise is left out.
        variance: "fixed_large" (σ² = β) or "fixed_small" (σ² = β̃), DDPM section 3.2.
    """
    alpha = alpha_bar / alpha_bar_next
    beta = 1.0 - alpha
    posterior_variance = beta * (1.0 - alpha_bar_next) / (1.0 - alpha_bar)
    noise_variance = beta if variance == "fixed_large" else posterior_variance
    return StepCoefficients(
        *_x0_from_epsilon(alpha_bar),
        x_from_x0=alpha_bar_next**0.5 * beta / (1.0 - alpha_bar),
        x_from_x=alpha**0.5 * (1.0 - alpha_bar_next) / (1.0 - alpha_bar),
        x_from_noise=noise_variance**0.5,
    )


def ddim_step(alpha_bar: Any, alpha_bar_next: Any, eta: Any = 0.0) -> StepCoefficients:
    """Implicit step (DDIM, arXiv 2010.02502, equations 12 and 16); ε is taken from the clipped x̂_0.

    Args:
        alpha_bar: ᾱ_t, a number, array or tensor, and so the coefficients.
        alpha_bar_next: ᾱ_s with s < t; 1 for the last step.
        eta: 0 is deterministic, 1 has the noise of DDPM's fixed-small variance.
    """
    sigma = eta * ((1.0 - alpha_bar_next) / (1.0 - alpha_bar)) ** 0.5
    sigma *= (1.0 - alpha_bar / alpha_bar_next) ** 0.5
    # Never negative but for rounding.
    direction = abs(1.0 - alpha_bar_next - sigma**2) ** 0.5
    x_from_x = direction / (1.0 - alpha_bar) ** 0.5
    return StepCoefficients(
        *_x0_from_epsilon(alpha_bar),
        x_from_x0=alpha_bar_next**0.5 - x_from_x * alpha_bar**0.5,
        x_from_x=x_from_x,
        x_from_noise=sigma,
    )


def _x0_from_epsilon(alpha_bar: Any) -> tuple[float, float]:
    """x̂_0 = (x_t - sqrt(1 - ᾱ_t) ε) / sqrt(ᾱ_t) (DDPM, equation 15; DDIM, equation 9)."""
    return 1.0 / alpha_bar**0.5, -((1.0 / alpha_bar - 1.0) ** 0.5)


def step_coefficients(schedule: StepSchedule, table: NoiseTable) -> list[StepCoefficients]:
    """The coefficients of every step of `schedule`, as Python floats."""
    now = table.alphas_cumprod[list(schedule.timesteps)]
    after = np.append(now[1:], 1.0)
    if schedule.sampler == "ddpm":
        columns = ddpm_step(now, after, schedule.variance)
    else:
        columns = ddim_step(now, after, schedule.eta)
    rows = [StepCoefficients(*row) for row in np.stack(columns, axis=1).tolist()]
    return [*rows[:-1], rows[-1]._replace(x_from_noise=0.0)]


def clip_to_range(x0: np.ndarray) -> np.ndarray:
    """Clip NumPy images to the data's range [-1, 1]."""
    return np.clip(x0, -1.0, 1.0)


def take_step(
    x: Any, model_output: Any, noise: Any, row: StepCoefficients, clip: Clip | None = clip_to_range
) -> Any:
    """One sampler step on arrays or tensors.

    Args:
        x: x_t, (N, H, W, C).
        model_output: ε_θ(x_t, t), of x's shape and type.
        noise: z, or None where its factor is 0.
        row: the step's coefficients.
        clip: clips x̂_0 to [-1, 1]; None leaves it as it is. Tensors need their own function.
    """
    x0 = row.x0_from_x * x + row.x0_from_model * model_output
    if clip:
        x0 = clip(x0)
    x = row.x_from_x0 * x0 + row.x_from_x * x
    return x if noise is None else x + row.x_from_noise * noise


def sample(
    denoise: Denoiser,
    schedule: StepSchedule,
    table: NoiseTable,
    noise: ImageNoise,
    *,
    clip: Clip | None = clip_to_range,
    on_step: Callable[[int], None] | None = None,
) -> Any:
    """Run the reverse process over a schedule.

    Args:
        denoise: the network; see `Denoiser`.
        schedule: timesteps and widths, in sampling order.
        table: the noise table the network was trained with.
        noise: source of x_T and of each step's noise, shape (N, H, W, C).
        clip: clips x̂_0 to [-1, 1] inside each step; None for data without that range.
        on_step: called after each step with its index, for progress bars.

    Returns:
        x_0, float (N, H, W, C), of the type that `denoise` returns.

    Raises:
        InputError: the schedule was made for another number of training timesteps.
    """
    if schedule.train_timesteps != table.train_timesteps:
        raise InputError(
            f"`schedule.train_timesteps` (={schedule.train_timesteps}) must equal the noise "
            f"table's {table.train_timesteps}"
        )
    x = noise.draw()
    rows = step_coefficients(schedule, table)
    for index, (t, width, row) in enumerate(
        zip(schedule.timesteps, schedule.widths, rows, strict=True)
    ):
        fresh = noise.draw() if row.x_from_noise else None
        x = take_step(x, denoise(x, t, width), fresh, row, clip)
        if on_step:
            on_step(index)
    return x


def sample_images(
    denoise: Denoiser,
    schedule: StepSchedule,
    table: NoiseTable,
    image_shape: tuple[int, int, int],
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    clip: Clip | None = clip_to_range,
    on_step: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Sample `count` images in batches.

    Image i depends on `seed` and i only: not on `count`, `batch_size` or the runtime.

    Args:
        image_shape: (H, W, C).
        batch_size: images at a time; the last batch may be smaller.

    Returns:
        uint8 (count, H, W, C).

    Raises:
        InputError: `count` or `batch_size` is below 1, or the network's output is not finite.
    """
    for argument, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"`{argument}` (={value}) must be at least 1")
    batches = []
    for first in range(0, count, batch_size):
        noise = ImageNoise(seed, first, min(batch_size, count - first), image_shape)
        x = np.asarray(sample(denoise, schedule, table, noise, clip=clip, on_step=on_step))
        if not np.isfinite(x).all():
            raise InputError(
                "`denoise` gave NaN or infinity; the weights are broken: train with a smaller "
                "`learning_rate`, or export again"
            )
        batches.append(to_uint8(x))
    return np.concatenate(batches)
