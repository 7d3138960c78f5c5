"""A caller's schedule as network calls, computed in the graph: `ddsm_tf.sampling` on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import tensorflow as tf

from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import MAX_CHURN, NetworkCall
from ddsm_tf.schedule import CHURNING, SAMPLERS, VARIANCES
from ddsm_tf.solvers import (
    Update,
    ddim,
    ddpm,
    dpmpp_2m,
    heun_correction,
    with_churn,
    x0_from_output,
)

FACTORS = 7
"""Of a call: the fields of `StepCoefficients`, in its order."""
NOISE = 4
"""The place among them of what multiplies fresh noise."""
PREVIOUS = 5
"""The place of what multiplies the estimate before."""
NO_GUIDANCE = -1

# What `ddsm_tf.solvers` calls by NumPy's names.
_XP = SimpleNamespace(where=tf.where, log=tf.math.log)


class Calls(NamedTuple):
    """Network calls as tensors, S of them.

    Attributes:
        timesteps: int32 (S,).
        branches: int32 (S,), which of the networks runs.
        guidance: int32 (S,), which runs without the class; `NO_GUIDANCE` where none does.
        factors: float32 (S, 7), `StepCoefficients` of each call.
        draws: int32 (S,), how often noise was drawn before the call's own.
    """

    timesteps: tf.Tensor
    branches: tf.Tensor
    guidance: tf.Tensor
    factors: tf.Tensor
    draws: tf.Tensor

    @classmethod
    def of(cls, timesteps: Any, branches: Any, guidance: Any, factors: tf.Tensor) -> Calls:
        """Calls with the numbers of their draws; x_T is the first."""
        drawing = tf.cast(factors[:, NOISE] > 0.0, tf.int32)
        draws = 1 + tf.cumsum(drawing, exclusive=True)
        return cls(timesteps, branches, guidance, factors, draws)


def known_calls(calls: list[NetworkCall], widths: list[float]) -> Calls:
    """Calls that the host computed, as constants.

    Args:
        calls: of `ddsm_tf.sampling.network_calls`.
        widths: of the networks, in their order.
    """
    guidance = [
        NO_GUIDANCE if call.guidance_width is None else widths.index(call.guidance_width)
        for call in calls
    ]
    return Calls.of(
        tf.constant([call.timestep for call in calls], tf.int32),
        tf.constant([widths.index(call.width) for call in calls], tf.int32),
        tf.constant(guidance, tf.int32),
        tf.constant([list(call.row) for call in calls], tf.float32),
    )


def calls_of(
    table: NoiseTable, options: Mapping[str, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ddsm_tf.sampling.network_calls` of tensors.

    Args:
        table: the noise table.
        options: the fields of a `StepSchedule` but its widths: `timesteps` int32 (S,), `sampler`
            and `variance` text, `eta`, `churn`, `churn_min`, `churn_max` and `churn_noise` float32,
            where a negative `churn_max` is no limit.

    Returns:
        Of each call: the schedule's step, int32; the timestep, int32; the factors, float32 (·, 7).
    """
    alpha_bars = tf.constant(table.alphas_cumprod, tf.float64)
    timesteps = options["timesteps"]
    begins = _begins(table, options)
    now = tf.gather(alpha_bars, begins)
    one = tf.ones((1,), tf.float64)
    after = tf.concat([tf.gather(alpha_bars, timesteps[1:]), one], 0)
    # Where the next step begins; the image itself is not disturbed.
    churned = tf.concat([now[1:], one], 0)

    def finished(update: Update) -> tf.Tensor:
        """(S, 4), with the noise that the next step begins with."""
        noisy = with_churn(update, after, churned, tf.cast(options["churn_noise"], tf.float64))
        plain = tf.stack(update, 1)
        return tf.where(options["churn"] > 0.0, tf.stack(noisy, 1), plain)

    def single(update: Update) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return tf.range(tf.size(timesteps)), begins, finished(update)

    def heun() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        first = tf.stack(ddim(now, after), 1)
        # The step to the image has no second half; any ᾱ below 1 keeps its numbers finite.
        safe = tf.minimum(after, 1.0 - 1e-9)
        second = finished(heun_correction(now, safe))
        ends = tf.concat([timesteps[1:], timesteps[-1:]], 0)
        places = tf.repeat(tf.range(tf.size(timesteps)), 2)
        return places[:-1], _interleaved(begins, ends)[:-1], _interleaved(first, second)[:-1]

    eta = tf.cast(options["eta"], tf.float64)
    large = options["variance"] == VARIANCES[0]
    before = tf.concat([now[:1], now[:-1]], 0)
    branches = {
        "ddim": lambda: single(ddim(now, after, eta)),
        "ddpm": lambda: single(
            Update(*(tf.where(large, *pair) for pair in zip(*_variances(now, after), strict=True)))
        ),
        "euler": lambda: single(ddim(now, after)),
        "heun": heun,
        "dpmpp_2m": lambda: single(dpmpp_2m(before, now, after, _XP)),
    }
    index = tf.argmax(tf.constant(SAMPLERS) == options["sampler"], output_type=tf.int32)
    places, timesteps, update = tf.switch_case(index, [branches[name] for name in SAMPLERS])
    return places, timesteps, _factors(table, tf.gather(alpha_bars, timesteps), update)


def _begins(table: NoiseTable, options: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """`ddsm_tf.sampling.churned_timesteps`, int32 (S,)."""
    timesteps = options["timesteps"]
    sigmas = tf.constant(table.sigmas, tf.float64)
    sigma = tf.gather(sigmas, timesteps)
    churn, low, high = (
        tf.cast(options[name], tf.float64) for name in ("churn", "churn_min", "churn_max")
    )
    gamma = tf.minimum(churn / tf.cast(tf.size(timesteps), tf.float64), MAX_CHURN)
    apart = tf.abs(tf.math.log(sigma * (1.0 + gamma))[:, None] - tf.math.log(sigmas)[None, :])
    nearest = tf.maximum(tf.argmin(apart, axis=1, output_type=tf.int32), timesteps)
    inside = (sigma >= low) & ((sigma <= high) | (high < 0.0))
    inside &= tf.range(tf.size(timesteps)) > 0
    inside &= tf.reduce_any(options["sampler"] == tf.constant(CHURNING)) & (churn > 0.0)
    return tf.where(inside, nearest, timesteps)


def _variances(now: tf.Tensor, after: tf.Tensor) -> tuple[Update, Update]:
    return ddpm(now, after, VARIANCES[0]), ddpm(now, after, VARIANCES[1])


def _interleaved(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Rows of two tensors in turn."""
    both = tf.stack([first, second], 1)
    return tf.reshape(both, (-1, *first.shape[1:]))


def _factors(table: NoiseTable, alpha_bar: tf.Tensor, update: tf.Tensor) -> tf.Tensor:
    x0_from_x, x0_from_model, model_from_x = x0_from_output(
        table.prediction, alpha_bar, table.data_std
    )
    from_x0, from_x, from_previous, from_noise = tf.unstack(update, axis=1)
    columns = [x0_from_x, x0_from_model, from_x0, from_x, from_noise, from_previous, model_from_x]
    rows = tf.stack(columns, 1)
    last = tf.one_hot(tf.shape(rows)[0] - 1, tf.shape(rows)[0], dtype=tf.float64)
    without_noise = tf.one_hot(NOISE, FACTORS, dtype=tf.float64)
    return tf.cast(rows * (1.0 - last[:, None] * without_noise), tf.float32)
