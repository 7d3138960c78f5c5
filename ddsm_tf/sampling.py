"""The one loop that runs a step schedule with any sampler, on arrays or tensors.

The samplers' equations are in `solvers`. Every network call is followed by an affine step whose
factors are computed once on the host in float64, so the same code serves NumPy arrays on a small
device and tensors on a server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddsm_tf.errors import InputError
from ddsm_tf.images import to_uint8
from ddsm_tf.labels import check_conditional, check_labels, no_class
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import ImageNoise
from ddsm_tf.solvers import (
    Update,
    ddim,
    ddpm,
    dpmpp_2m,
    heun_correction,
    with_churn,
    x0_from_output,
)

Denoiser = Callable[..., Any]
"""`denoise(x, t, width)`: the network's output for x of shape (N, H, W, C) float32, all N at
timestep t. Models with classes take `denoise(x, t, width, labels)` with labels int32 (N,)."""

Clip = Callable[[Any], Any]

# EDM's limit of S_churn / N (algorithm 2, line 4).
MAX_CHURN = 2.0**0.5 - 1.0


class StepCoefficients(NamedTuple):
    """Host-computed factors of one network call; the equations are in `ddsm_tf.solvers`."""

    x0_from_x: float
    x0_from_model: float
    x_from_x0: float
    x_from_x: float
    x_from_noise: float
    x_from_previous: float = 0.0
    model_from_x: float = 1.0


class NetworkCall(NamedTuple):
    """One call of the network, and the affine step after it.

    Attributes:
        timestep: at which it runs.
        width: at which it runs.
        guidance_width: of the unconditional branch; None without guidance.
        step: the schedule's step that it belongs to.
        row: the step's factors.
    """

    timestep: int
    width: float
    guidance_width: float | None
    step: int
    row: StepCoefficients


def network_calls(schedule: StepSchedule, table: NoiseTable) -> list[NetworkCall]:
    """Every network call of a schedule, in order.

    A call a step, but for Heun's second one at the step's end; the step to the image itself has
    none. Under churn a step begins at a noisier timestep than the schedule's.

    Raises:
        InputError: the schedule was made for another number of training timesteps.
    """
    if schedule.train_timesteps != table.train_timesteps:
        raise InputError(
            f"`schedule.train_timesteps` (={schedule.train_timesteps}) must equal the noise "
            f"table's {table.train_timesteps}"
        )
    places, timesteps, updates = _updates(schedule, table)
    prefactors = x0_from_output(table.prediction, table.alphas_cumprod[timesteps], table.data_std)
    rows = np.stack([*prefactors, *updates], axis=1).tolist()
    guidance = schedule.unconditional_widths if schedule.guided else [None] * len(schedule)
    calls = []
    for place, timestep, row in zip(places.tolist(), timesteps.tolist(), rows, strict=True):
        x0_from_x, x0_from_model, model_from_x, from_x0, from_x, previous, from_noise = row
        coefficients = StepCoefficients(
            x0_from_x, x0_from_model, from_x0, from_x, from_noise, previous, model_from_x
        )
        width = schedule.widths[place]
        calls.append(NetworkCall(timestep, width, guidance[place], place, coefficients))
    # DDPM's fixed-large variance is not zero there.
    last = calls[-1]
    return [*calls[:-1], last._replace(row=last.row._replace(x_from_noise=0.0))]


def step_coefficients(schedule: StepSchedule, table: NoiseTable) -> list[StepCoefficients]:
    """The factors of every network call of `schedule`, as Python floats."""
    return [call.row for call in network_calls(schedule, table)]


def _updates(schedule: StepSchedule, table: NoiseTable) -> tuple[np.ndarray, np.ndarray, Update]:
    """Each call's step of the schedule, its timestep, and the update after it."""
    begins = churned_timesteps(schedule, table)
    now = table.alphas_cumprod[begins]
    after = np.append(table.alphas_cumprod[list(schedule.timesteps[1:])], 1.0)
    places = np.arange(len(schedule))
    timesteps = begins
    if schedule.sampler == "ddpm":
        update = ddpm(now, after, schedule.variance)
    elif schedule.sampler == "dpmpp_2m":
        update = dpmpp_2m(np.append(now[:1], now[:-1]), now, after)
    else:
        update = ddim(now, after, schedule.eta if schedule.sampler == "ddim" else 0.0)
    if schedule.sampler == "heun":
        # The correction of each step but the last stands between its call and the next one's.
        corrections = heun_correction(now[:-1], after[:-1])
        behind = np.arange(1, len(schedule))
        places = np.insert(places, behind, places[:-1])
        timesteps = np.insert(begins, behind, np.array(schedule.timesteps[1:], int))
        pairs = zip(update, corrections, strict=True)
        update = Update(*(np.insert(first, behind, second) for first, second in pairs))
    return places, timesteps, _churned(update, places, after, begins, schedule, table)


def churned_timesteps(schedule: StepSchedule, table: NoiseTable) -> np.ndarray:
    """Where each step begins: the schedule's timesteps, or nearest to σ̂ = σ + γσ under churn.

    γ = min(S_churn / N, √2 - 1) where S_tmin ≤ σ ≤ S_tmax (EDM, algorithm 2, lines 4 and 5). x_T
    is pure noise already, so the first step begins where the schedule says.
    """
    begins = np.array(schedule.timesteps)
    gamma = min(schedule.churn / len(schedule), MAX_CHURN)
    highest = np.inf if schedule.churn_max is None else schedule.churn_max
    for place, t in enumerate(schedule.timesteps[1:], 1):
        sigma = table.sigmas[t]
        if gamma and schedule.churn_min <= sigma <= highest:
            begins[place] = max(t, table.nearest_timestep(sigma * (1.0 + gamma)))
    return begins


def _churned(
    update: Update,
    places: np.ndarray,
    after: np.ndarray,
    begins: np.ndarray,
    schedule: StepSchedule,
    table: NoiseTable,
) -> Update:
    """`update` with the noise that the next step begins with added to each step's last call."""
    if not schedule.churn:
        return update
    ends = np.append(places[1:] != places[:-1], True)
    next_begins = np.append(table.alphas_cumprod[begins[1:]], 1.0)
    reached = after[places]
    churned = np.where(ends, next_begins[places], reached)
    return with_churn(update, reached, churned, schedule.churn_noise)


def clip_to_range(x0: np.ndarray) -> np.ndarray:
    """Clip NumPy images to the data's range [-1, 1]."""
    return np.clip(x0, -1.0, 1.0)


def take_step(
    x: Any,
    model_output: Any,
    noise: Any,
    row: StepCoefficients,
    clip: Clip | None = clip_to_range,
    previous: Any = None,
) -> tuple[Any, Any]:
    """The affine step after a network call, on arrays or tensors.

    Args:
        x: x_t, (N, H, W, C).
        model_output: the network's output, of x's shape and type.
        noise: z, or None where its factor is 0.
        row: the call's factors.
        clip: clips x̂_0 to [-1, 1]; None leaves it as it is. Tensors need their own function.
        previous: x̂_0 of the call before, or None where its factor is 0.

    Returns:
        x_s and this call's x̂_0.
    """
    x0 = row.x0_from_x * x + row.x0_from_model * model_output
    if clip:
        x0 = clip(x0)
    x = row.x_from_x0 * x0 + row.x_from_x * x
    if previous is not None:
        x = x + row.x_from_previous * previous
    return (x if noise is None else x + row.x_from_noise * noise), x0


def predict(
    denoise: Denoiser,
    x: Any,
    call: NetworkCall,
    labels: Any = None,
    unconditional: Any = None,
    scale: float = 1.0,
) -> Any:
    """The network's output at a call, guided where the schedule is.

    Classifier-free guidance: output + (scale - 1) · (output - output without the class) (Ho and
    Salimans, 2022, equation 6 with w = scale - 1).

    Args:
        denoise: see `Denoiser`.
        x: x_t, (N, H, W, C).
        call: timestep and widths.
        labels: int32 (N,), or None for a model without classes.
        unconditional: the labels "no class", int32 (N,), where the call is guided.
        scale: the schedule's `guidance_scale`.
    """
    if call.row.model_from_x != 1.0:
        x = call.row.model_from_x * x
    if labels is None:
        return denoise(x, call.timestep, call.width)
    output = denoise(x, call.timestep, call.width, labels)
    if call.guidance_width is None:
        return output
    without = denoise(x, call.timestep, call.guidance_width, unconditional)
    return without + scale * (output - without)


def run_call(
    denoise: Denoiser,
    call: NetworkCall,
    x: Any,
    previous: Any,
    draw: Callable[[], Any],
    labels: Any = None,
    unconditional: Any = None,
    scale: float = 1.0,
    clip: Clip | None = clip_to_range,
) -> tuple[Any, Any]:
    """One network call and the step after it; see `predict` and `take_step`.

    Args:
        draw: gives fresh noise; called where the step needs any.
    """
    output = predict(denoise, x, call, labels, unconditional, scale)
    fresh = draw() if call.row.x_from_noise else None
    previous = previous if call.row.x_from_previous else None
    return take_step(x, output, fresh, call.row, clip, previous)


def sample(
    denoise: Denoiser,
    schedule: StepSchedule,
    table: NoiseTable,
    noise: ImageNoise,
    *,
    labels: Any = None,
    unconditional: Any = None,
    clip: Clip | None = clip_to_range,
    on_step: Callable[[int], None] | None = None,
) -> Any:
    """Run the reverse process over a schedule.

    Args:
        denoise: the network; see `Denoiser`.
        schedule: timesteps and widths, in sampling order.
        table: the noise table the network was trained with.
        noise: source of x_T and of each step's noise, shape (N, H, W, C).
        labels: int32 (N,) for a model with classes, or None.
        unconditional: the labels "no class", int32 (N,), where the schedule is guided.
        clip: clips x̂_0 to [-1, 1] inside each step; None for data without that range.
        on_step: called after each step with its index, for progress bars.

    Returns:
        x_0, float (N, H, W, C), of the type that `denoise` returns.

    Raises:
        InputError: the schedule was made for another number of training timesteps, or is guided and
            there are no labels.
    """
    if schedule.guided and (labels is None or unconditional is None):
        raise InputError(
            f"`guidance_scale` (={schedule.guidance_scale:g}) needs `labels`, and those of no class"
        )
    calls = network_calls(schedule, table)
    x, previous = noise.draw(), None
    scale = schedule.guidance_scale
    for index, call in enumerate(calls):
        x, previous = run_call(
            denoise, call, x, previous, noise.draw, labels, unconditional, scale, clip
        )
        ends = index + 1 == len(calls) or calls[index + 1].step != call.step
        if on_step and ends:
            on_step(call.step)
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
    labels: np.ndarray | None = None,
    num_classes: int = 0,
    clip: Clip | None = clip_to_range,
    decode: Callable[[np.ndarray], Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Sample `count` images in batches.

    Image i depends on `seed`, i and its label only: not on `count`, `batch_size` or the runtime.

    Args:
        image_shape: (H, W, C) of what the network denoises.
        batch_size: images at a time; the last batch may be smaller.
        labels: int32 (count,) in [0, num_classes], for a model with classes; see `check_labels`.
        num_classes: of the model.
        clip: clips each estimate of the image to [-1, 1]; None for latents.
        decode: latents float32 (N, H, W, C) → images in [-1, 1]; None where images are denoised.

    Returns:
        uint8 (count, H, W, C).

    Raises:
        InputError: `count` or `batch_size` is below 1, or the network's output is not finite.
    """
    for argument, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"`{argument}` (={value}) must be at least 1")
    check_conditional(schedule.guidance_scale, num_classes)
    labels = check_labels(labels, count, num_classes)
    batches = []
    for first in range(0, count, batch_size):
        size = min(batch_size, count - first)
        x = sample(
            denoise,
            schedule,
            table,
            ImageNoise(seed, first, size, image_shape),
            labels=None if labels is None else labels[first : first + size],
            unconditional=no_class(num_classes, size) if schedule.guided else None,
            clip=clip,
            on_step=on_step,
        )
        batches.append(finished_images(x, decode))
    return np.concatenate(batches)


def finished_images(x: Any, decode: Callable[[np.ndarray], Any] | None = None) -> np.ndarray:
    """What the sampler gave as uint8 (N, H, W, C) images.

    Args:
        x: x_0, float (N, H, W, C).
        decode: see `sample_images`.

    Raises:
        InputError: the network's output is not finite.
    """
    x = np.asarray(x)
    if np.isfinite(x).all():
        x = x if decode is None else np.asarray(decode(x))
    if not np.isfinite(x).all():
        raise InputError(
            "`denoise` gave NaN or infinity; the weights are broken: train with a smaller "
            "`learning_rate`, or export again"
        )
    return to_uint8(x)
