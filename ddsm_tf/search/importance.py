"""How much each width matters at each timestep, measured before any image is sampled.

A table costs a few forward passes a width and timestep, where a single trial of the search samples
whole trajectories. What a step's error does to the final image follows from the sampler's own
coefficients (`step_gains`), so one table serves every sampler and number of steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys, read_json, write_json
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import Denoiser, step_coefficients
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.solvers import x0_from_output

FORMAT = "ddsm-importance"
VERSION = 1

_ROWS = ("error", "standard_error")


@dataclass(frozen=True, eq=False)
class ImportanceTable:
    """Held-out denoising error of every width over the timesteps.

    Attributes:
        widths: (W,), widest first.
        timesteps: (K,) integers, strictly falling.
        error: float64 (W, K), mean squared error of the predicted noise, the L[width, t] of DDSM's
            training loss (DDPM, equation 14); 0 is best, 1 is what predicting zero gives.
        standard_error: float64 (W, K), of `error`, over the images.
        image_std: standard deviation of the held-out pixels, in the data's unit ([-1, 1]).
        images: how many held-out images.
        weights: fingerprint of the network's weights, to tell a table that is out of date.

    Raises:
        InputError: widths do not fall, shapes do not fit, or a number is not finite or negative.
    """

    widths: tuple[float, ...]
    timesteps: tuple[int, ...]
    error: np.ndarray
    standard_error: np.ndarray
    image_std: float
    images: int
    weights: str = ""

    def __post_init__(self) -> None:
        # A schedule's rules for timesteps are those of this table.
        StepSchedule.uniform(1.0, self.timesteps, train_timesteps=100_000)
        object.__setattr__(self, "timesteps", tuple(self.timesteps))
        object.__setattr__(self, "widths", tuple(self.widths))
        are_numbers = all(isinstance(width, (int, float)) for width in self.widths)
        if not are_numbers or not all(1.0 >= a > b for a, b in pairwise((*self.widths, 0.0))):
            raise invalid("widths", self.widths, "must fall strictly within (0, 1]")
        for name in _ROWS:
            object.__setattr__(self, name, self._checked(name, getattr(self, name)))
        # JSON's integers may be too long for a float.
        is_number = isinstance(self.image_std, (int, float))
        if not is_number or not 0.0 < self.image_std <= sys.float_info.max:
            raise invalid("image_std", self.image_std, "must be a positive number")
        if not isinstance(self.images, int) or self.images < 2:
            raise invalid("images", self.images, "must be an integer of at least 2")

    def _checked(self, name: str, rows: Any) -> np.ndarray:
        shape = (len(self.widths), len(self.timesteps))
        try:
            rows = np.array(rows, np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise invalid(name, rows, "must be rows of numbers, one a width") from error
        if rows.shape != shape or not np.all((rows >= 0) & np.isfinite(rows)):
            rule = f"must have the shape {shape} (widths, timesteps) and finite numbers ≥ 0"
            raise invalid(name, f"shape {rows.shape}", rule)
        return rows

    def at(self, timesteps: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """`rows` (W, K) interpolated linearly to other timesteps; float64 (W, len(timesteps))."""
        known = self.timesteps[::-1]
        return np.array([np.interp(timesteps, known, row[::-1]) for row in rows])

    def excess(self, timesteps: Sequence[int]) -> np.ndarray:
        """How much larger each width's error is than the widest's, float64 (W, len(timesteps))."""
        error = self.at(timesteps, self.error)
        # A narrower width that looks better than the widest does so by chance.
        return np.maximum(error - error[0], 0.0)

    def sample_effect(self, schedule: StepSchedule, noise_table: NoiseTable) -> np.ndarray:
        """What running one step at a narrower width adds to the final image's squared error.

        Args:
            schedule: sampler and timesteps; its widths do not matter.
            noise_table: the forward process.

        Returns:
            float64 (W, steps), a mean over the pixels, to first order; 0 for the widest width.
        """
        gains = step_gains(schedule, noise_table, self.image_std)
        return gains**2 * self.excess(schedule.timesteps)

    def harm(self, schedule: StepSchedule, noise_table: NoiseTable) -> np.ndarray:
        """What the search expects of running one step at a narrower width: (1 - ᾱ_t) · excess.

        It is the squared error by which x_t's noise is misjudged. Beside the effect on the final
        pixels it counts the last steps for less: their errors are small and without shape, and a
        distance on features does not see them. It ranks schedules better (docs/search.md).

        Args:
            schedule: timesteps; its widths do not matter.
            noise_table: the forward process.

        Returns:
            float64 (W, steps); 0 for the widest width.
        """
        noise_share = 1.0 - noise_table.alphas_cumprod[list(schedule.timesteps)]
        return noise_share * self.excess(schedule.timesteps)

    def guided_harm(self, schedule: StepSchedule, noise_table: NoiseTable) -> np.ndarray:
        """`harm` of both branches of a guided schedule.

        The guided output is s · conditional + (1 - s) · unconditional. The errors that narrower
        widths make in the two are taken as independent and of one size, so they enter with s² and
        (s - 1)².

        Returns:
            float64 (W, 2 · steps): the conditional branch's, then the unconditional one's.
        """
        harm, scale = self.harm(schedule, noise_table), schedule.guidance_scale
        return np.concatenate([scale**2 * harm, (scale - 1.0) ** 2 * harm], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of `importance.json`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "widths": list(self.widths),
            "timesteps": list(self.timesteps),
            **{name: getattr(self, name).tolist() for name in _ROWS},
            "image_std": self.image_std,
            "images": self.images,
            "weights": self.weights,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write `importance.json`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> ImportanceTable:
        """Read an `importance.json`.

        Raises:
            InputError: the file cannot be read or is no such table.
        """
        value = read_json(path, argument="importance")
        required = {"widths", "timesteps", *_ROWS, "image_std", "images", "weights"}
        try:
            return cls(**check_keys(value, format=FORMAT, version=VERSION, required=required))
        except (InputError, TypeError) as error:
            raise InputError(f"importance {path}: {error}; delete it to measure again") from error


def measure_importance(
    denoise: Denoiser,
    noise_table: NoiseTable,
    images: np.ndarray,
    widths: Sequence[float],
    *,
    timesteps: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    weights: str = "",
    labels: np.ndarray | None = None,
    on_timestep: Callable[[], None] | None = None,
) -> ImportanceTable:
    """Measure the table: the same images and the same noise for every width and timestep.

    Costs `len(images)` forward passes for each width and timestep.

    Args:
        denoise: `denoise(x, t, width)`.
        noise_table: the forward process.
        images: float32 (N, H, W, C) in [-1, 1] that the network was not trained on, N ≥ 2.
        widths: the model's widths.
        timesteps: how many, spread evenly over [0, T).
        seed: of the noise.
        batch_size: images at a time.
        weights: fingerprint of the network's weights, kept with the table.
        labels: int32 (N,), the images' classes, for a model with classes.
        on_timestep: called after each timestep, for progress bars.

    Raises:
        InputError: fewer than two images, or the network's output is not finite.
    """
    if len(images) < 2:
        raise invalid("images", len(images), "must be at least 2, for a standard error")
    if images.min() == images.max():
        raise invalid("images", f"{len(images)} images", "must not all be the same")
    widths = tuple(sorted(widths, reverse=True))
    noise = np.random.RandomState(seed).standard_normal(images.shape).astype(np.float32)
    steps = even_timesteps(noise_table.train_timesteps, timesteps)
    columns = []
    for t in steps:
        columns.append(
            _errors_at(denoise, noise_table, images, noise, widths, t, batch_size, labels)
        )
        if on_timestep:
            on_timestep()
    errors = np.stack(columns, axis=1)  # (W, K, N)
    if not np.isfinite(errors).all():
        raise InputError("`denoise` gave NaN or infinity; the weights are broken")
    return ImportanceTable(
        widths=widths,
        timesteps=steps,
        error=errors.mean(axis=2),
        standard_error=errors.std(axis=2, ddof=1) / np.sqrt(len(images)),
        image_std=float(np.std(images, dtype=np.float64)),
        images=len(images),
        weights=weights,
    )


def _errors_at(
    denoise: Denoiser,
    noise_table: NoiseTable,
    images: np.ndarray,
    noise: np.ndarray,
    widths: tuple[float, ...],
    t: int,
    batch_size: int,
    labels: np.ndarray | None,
) -> np.ndarray:
    """Each image's squared error of the noise, float64 (W, N)."""
    signal_scale, noise_scale = (scale[t] for scale in noise_table.signal_and_noise_scale())
    parts = []
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        x_t = (signal_scale * images[rows] + noise_scale * noise[rows]).astype(np.float32)
        given = () if labels is None else (labels[rows],)
        predicted = np.array(
            [predicted_noise(denoise, noise_table, x_t, t, width, *given) for width in widths],
            np.float64,
        )
        parts.append(np.mean(np.square(predicted - noise[rows]), axis=(2, 3, 4)))
    return np.concatenate(parts, axis=1)


def predicted_noise(
    denoise: Denoiser,
    noise_table: NoiseTable,
    x_t: np.ndarray,
    t: int,
    width: float,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """The noise that the network sees in x_t, whatever its output means.

    Args:
        denoise: the network.
        noise_table: the forward process, and what the output means.
        x_t: float32 (N, H, W, C).
        t: the timestep of all of them.
        width: at which the network runs.
        labels: int32 (N,) for a model with classes.

    Returns:
        ε, (N, H, W, C).
    """
    alpha_bar = float(noise_table.alphas_cumprod[t])
    x0_from_x, x0_from_model, model_from_x = x0_from_output(
        noise_table.prediction, alpha_bar, noise_table.data_std
    )
    given = () if labels is None else (labels,)
    if noise_table.prediction == "epsilon":
        return denoise(x_t, t, width, *given)
    output = denoise((model_from_x * x_t).astype(np.float32), t, width, *given)
    x0 = x0_from_x * x_t.astype(np.float64) + x0_from_model * output
    return (x_t - alpha_bar**0.5 * x0) / (1.0 - alpha_bar) ** 0.5


def step_gains(schedule: StepSchedule, noise_table: NoiseTable, image_std: float) -> np.ndarray:
    """How far the final image moves for an error of 1 in one step's predicted noise, (steps,).

    An error enters through its own step's factor, x_from_x0 · x0_from_model, and is then carried on
    by every later step. A later step is linear in x once its network is replaced by the best linear
    denoiser of data with standard deviation s, x̂_0 = sqrt(ᾱ) s² / (ᾱ s² + 1 - ᾱ) · x: it scales x
    by x_from_x0 times that plus x_from_x. So errors made early are damped, as they are in practice;
    with the network's outputs held fixed they would seem to grow without bound. Solvers of a higher
    order and churn are taken as DDIM, which has the same limit.
    """
    first_order = StepSchedule(
        schedule.timesteps,
        schedule.widths,
        schedule.train_timesteps,
        sampler="ddpm" if schedule.sampler == "ddpm" else "ddim",
        eta=schedule.eta,
        variance=schedule.variance,
    )
    rows = step_coefficients(first_order, noise_table)
    x_from_x0, x_from_x = (
        np.array([getattr(row, name) for row in rows]) for name in ("x_from_x0", "x_from_x")
    )
    alpha_bar = noise_table.alphas_cumprod[list(schedule.timesteps)]
    # An error δ of the noise moves x̂_0 by σ_t δ.
    x0_from_noise = noise_table.sigmas[list(schedule.timesteps)]
    shrinkage = np.sqrt(alpha_bar) * image_std**2 / (alpha_bar * image_std**2 + 1.0 - alpha_bar)
    carried = x_from_x0 * shrinkage + x_from_x
    after = np.append(np.cumprod(carried[:0:-1])[::-1], 1.0)
    return np.abs(x_from_x0 * x0_from_noise) * after
