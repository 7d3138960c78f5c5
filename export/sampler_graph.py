"""The whole sampler as a TensorFlow graph: a loop over the steps, a switch between the widths.

Only the network of a step's width runs. The arithmetic is `ddsm_tf.sampling`'s and the noise
`ddsm_tf.seeds`', on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops

from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import StepCoefficients, step_coefficients, take_step
from ddsm_tf.schedule import VARIANCES, StepSchedule
from ddsm_tf.seeds import box_muller, counter_of, philox, split
from ddsm_tf.solvers import ddim, ddpm, x0_from_output

SAMPLERS = ("ddim", "ddpm")

MAX_IMAGES = 1024
"""Of one request: a number mistyped must not take the server's memory."""

Draw = Callable[[tf.Tensor], tf.Tensor]
"""How often noise was drawn before, int32 scalar → standard normal noise, float32 (N, H, W, C)."""


class Steps(NamedTuple):
    """A schedule as tensors.

    Attributes:
        timesteps: int32 (S,).
        branches: int32 (S,), which of the networks runs.
        coefficients: float32 (S, 7), `StepCoefficients` of each step.
        draws: int32 (S,), how often noise was drawn before the step's own.
    """

    timesteps: tf.Tensor
    branches: tf.Tensor
    coefficients: tf.Tensor
    draws: tf.Tensor


class SamplerGraph:
    """Signatures that sample, over one denoising function a width.

    Args:
        denoisers: width → tf.function of (x, t), widest first.
        noise_table: the forward process.
        schedule: that of `sample`, `sample_images` and `sample_noise`.
        image_shape: (H, W, C).
    """

    def __init__(
        self,
        denoisers: dict[float, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]],
        noise_table: NoiseTable,
        schedule: StepSchedule,
        image_shape: tuple[int, int, int],
    ) -> None:
        self.denoisers = denoisers
        self.noise_table = noise_table
        self.schedule = schedule
        self.image_shape = image_shape

    def signatures(self) -> dict[str, tf.types.experimental.PolymorphicFunction]:
        """Name → tf.function; see `ddsm_tf.export.savedmodel.write_sampler`."""
        one, text = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.string)
        rows = tf.TensorSpec((None,), tf.int64)
        noise = tf.TensorSpec((None, None, *self.image_shape), tf.float32)
        some = {
            "sample": (self.sample, {"seed": one, "count": one}),
            "sample_images": (self.sample_images, {"seed": rows, "index": rows}),
            "sample_noise": (self.sample_noise, {"noise": noise}),
            "sample_schedule": (
                self.sample_schedule,
                {
                    "seed": one,
                    "first": one,
                    "count": one,
                    "timesteps": tf.TensorSpec((None,), tf.int32),
                    "widths": tf.TensorSpec((None,), tf.float32),
                    "sampler": text,
                    "eta": tf.TensorSpec((), tf.float32),
                    "variance": text,
                },
            ),
        }
        return {name: _with_names(method, specs) for name, (method, specs) in some.items()}

    def sample(self, seed: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """Images 0 … count - 1 of a seed, both int64 scalars; uint8 (count, H, W, C)."""
        return self.sample_images(*_images_from(seed, tf.constant(0, tf.int64), count))

    def sample_images(self, seed: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Image `index[n]` of `seed[n]`, int64 (N,) each; uint8 (N, H, W, C)."""
        return self._run(self._default_steps(), self._seeded(seed, index))

    def sample_noise(self, noise: tf.Tensor) -> tf.Tensor:
        """Images of given noise, float32 (N, D, H, W, C); uint8 (N, H, W, C).

        D is how often the schedule draws: once for x_T, and once for each step that adds noise.
        """
        steps = self._default_steps()
        needed = 1 + sum(bool(row.x_from_noise) for row in self._rows())
        message = f"`noise` must have {needed} draws for this schedule: (N, {needed}, H, W, C)"
        checks = [*_check(tf.shape(noise)[1] == needed, message), *_check_rows("noise", noise)]
        with tf.control_dependencies(checks):
            noise = tf.identity(noise)
        return self._run(steps, lambda draw: tf.gather(noise, draw, axis=1))

    def sample_schedule(
        self,
        seed: tf.Tensor,
        first: tf.Tensor,
        count: tf.Tensor,
        timesteps: tf.Tensor,
        widths: tf.Tensor,
        sampler: tf.Tensor,
        eta: tf.Tensor,
        variance: tf.Tensor,
    ) -> tf.Tensor:
        """Images first … first + count - 1 of a seed, with a schedule of the caller's own.

        The other inputs are the fields of a `StepSchedule`.
        """
        known = tf.constant(list(self.denoisers), tf.float32)
        apart = tf.abs(widths[:, None] - known[None, :])
        checks = [
            *self._schedule_checks(timesteps, widths, sampler, eta, variance),
            *_check(
                tf.reduce_all(tf.reduce_min(apart, axis=1) < 1e-6),
                f"`widths` must be among the model's {list(self.denoisers)}",
            ),
        ]
        with tf.control_dependencies(checks):
            timesteps = tf.identity(timesteps)
        rows = self._coefficients(timesteps, sampler, eta, variance)
        steps = _steps(timesteps, tf.argmin(apart, axis=1, output_type=tf.int32), rows)
        return self._run(steps, self._seeded(*_images_from(seed, first, count)))

    def _schedule_checks(self, timesteps, widths, sampler, eta, variance) -> list[tf.Operation]:
        table = self.noise_table.train_timesteps
        inside = (timesteps >= 0) & (timesteps < table)
        falling = tf.reduce_all(timesteps[1:] < timesteps[:-1])
        return [
            *_check(tf.size(timesteps) >= 1, "`timesteps` must hold at least one timestep"),
            *_check(tf.reduce_all(inside), f"`timesteps` must lie in [0, {table})"),
            *_check(falling, "`timesteps` must fall strictly"),
            *_check(
                tf.size(widths) == tf.size(timesteps), "`widths` must be as many as `timesteps`"
            ),
            *_check(_among(sampler, SAMPLERS), f"`sampler` must be one of {SAMPLERS}"),
            *_check(_among(variance, VARIANCES), f"`variance` must be one of {VARIANCES}"),
            *_check((eta >= 0.0) & (eta <= 1.0), "`eta` must lie in [0, 1]"),
        ]

    def _rows(self) -> list[StepCoefficients]:
        return step_coefficients(self.schedule, self.noise_table)

    def _default_steps(self) -> Steps:
        branches = [list(self.denoisers).index(width) for width in self.schedule.widths]
        rows = tf.constant(self._rows(), tf.float32)
        return _steps(tf.constant(self.schedule.timesteps), tf.constant(branches), rows)

    def _coefficients(self, timesteps, sampler, eta, variance) -> tf.Tensor:
        """`step_coefficients` of tensors, float32 (S, 7)."""
        table = tf.constant(self.noise_table.alphas_cumprod, tf.float64)
        now = tf.gather(table, timesteps)
        after = tf.concat([now[1:], tf.ones((1,), tf.float64)], 0)
        x0 = x0_from_output(self.noise_table.prediction, now, self.noise_table.data_std)

        def rows_of(update: Any) -> tf.Tensor:
            columns = (x0[0], x0[1], update[0], update[1], update[3], update[2], x0[2])
            return tf.stack(columns, 1)

        implicit = rows_of(ddim(now, after, tf.cast(eta, tf.float64)))
        large, small = (rows_of(ddpm(now, after, which)) for which in VARIANCES)
        ancestral = tf.where(variance == VARIANCES[0], large, small)
        rows = tf.where(sampler == "ddpm", ancestral, implicit)
        last = tf.one_hot(tf.size(timesteps) - 1, tf.size(timesteps), dtype=tf.float64)
        without_noise = tf.one_hot(4, 7, dtype=tf.float64)
        return tf.cast(rows * (1.0 - last[:, None] * without_noise), tf.float32)

    def _seeded(self, seed: tf.Tensor, index: tf.Tensor) -> Draw:
        """`ImageNoise` of image `index[n]` of `seed[n]`."""
        values = math.prod(self.image_shape)
        blocks = tf.range(-(-values // 4), dtype=tf.int64)
        checks = [
            *_check(tf.reduce_all(seed >= 0), "`seed` must lie in [0, 2**63)"),
            *_check(tf.reduce_all(index >= 0), "`index` must be 0 or more"),
            *_check_rows("index", index),
        ]
        with tf.control_dependencies(checks):
            key = split(tf.cast(seed, tf.uint64)[:, None])
        images, blocks = tf.cast(index, tf.uint64)[:, None], tf.cast(blocks, tf.uint64)

        def draw(drawn: tf.Tensor) -> tf.Tensor:
            # Accelerators lack some kernels for 64-bit integers, and round doubles their own way.
            with tf.device("/CPU:0"):
                words = philox(counter_of(blocks, tf.cast(drawn, tf.uint64), images), key)
                normal = box_muller([tf.cast(word, tf.float64) for word in words], ops)
                flat = tf.reshape(normal, (-1, 4 * blocks.shape[0]))[:, :values]
                return tf.reshape(tf.cast(flat, tf.float32), (-1, *self.image_shape))

        return draw

    def _run(self, steps: Steps, draw: Draw) -> tf.Tensor:
        """The loop of `ddsm_tf.sampling.sample`; uint8 (N, H, W, C)."""

        def body(k: tf.Tensor, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            row = StepCoefficients(*tf.unstack(steps.coefficients[k]))
            t = tf.fill(tf.shape(x)[:1], tf.cast(steps.timesteps[k], tf.float32))
            networks = [lambda f=f: f(x, t) for f in self.denoisers.values()]
            epsilon = tf.switch_case(steps.branches[k], networks)
            noise = tf.cond(
                row.x_from_noise > 0.0, lambda: draw(steps.draws[k]), lambda: tf.zeros_like(x)
            )
            x, _ = take_step(x, epsilon, noise, row, lambda x0: tf.clip_by_value(x0, -1.0, 1.0))
            return k + 1, tf.ensure_shape(x, (None, *self.image_shape))

        count = tf.size(steps.timesteps)
        _, x = tf.while_loop(
            lambda k, x: k < count, body, (0, draw(tf.constant(0))), parallel_iterations=1
        )
        x = tf.debugging.check_numerics(x, "the network gave NaN or infinity; export it again")
        # As `ddsm_tf.images.to_uint8`.
        return tf.cast(tf.round((tf.clip_by_value(x, -1.0, 1.0) + 1.0) * 127.5), tf.uint8)


def _steps(timesteps: tf.Tensor, branches: tf.Tensor, rows: tf.Tensor) -> Steps:
    # x_T is the first draw.
    draws = 1 + tf.cumsum(tf.cast(rows[:, 4] > 0.0, tf.int32), exclusive=True)
    return Steps(timesteps, branches, rows, draws)


def _images_from(
    seed: tf.Tensor, first: tf.Tensor, count: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    rule = f"`count` must lie in [1, {MAX_IMAGES}]; ask for more in several requests"
    with tf.control_dependencies(_check((count >= 1) & (count <= MAX_IMAGES), rule)):
        index = first + tf.range(count)
    return tf.fill(tf.shape(index), seed), index


def _check_rows(name: str, rows: tf.Tensor) -> list[tf.Operation]:
    rule = f"`{name}` must have at most {MAX_IMAGES} rows; ask for more in several requests"
    return _check(tf.shape(rows)[0] <= MAX_IMAGES, rule)


def _among(text: tf.Tensor, choices: Sequence[str]) -> tf.Tensor:
    return tf.reduce_any(text == tf.constant(choices))


def _check(holds: tf.Tensor, message: str) -> list[tf.Operation]:
    return [tf.debugging.Assert(holds, [message])]


def _with_names(
    method: Callable[..., tf.Tensor], specs: dict[str, tf.TensorSpec]
) -> tf.types.experimental.PolymorphicFunction:
    """A tf.function whose inputs and output bear the names that a client uses."""
    named = [tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items()]

    @tf.autograph.experimental.do_not_convert
    def signature(*inputs: Any) -> dict[str, tf.Tensor]:
        return {"images": method(*inputs)}

    return tf.function(signature, input_signature=named)
