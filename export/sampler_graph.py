"""The whole sampler as a TensorFlow graph: a loop over the steps, a switch between the widths.

Only the network of a step's width runs. The arithmetic is `ddsm_tf.sampling`'s and the noise
`ddsm_tf.seeds`', on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras import ops

from ddsm_tf.export.request_checks import (
    check,
    check_count,
    check_guidance,
    check_labels,
    check_rows,
    check_schedule,
    check_seeds,
    check_widths,
)
from ddsm_tf.export.schedule_graph import NO_GUIDANCE, PREVIOUS, Calls, calls_of, known_calls
from ddsm_tf.labels import IN_TURN
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import StepCoefficients, network_calls, take_step
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.seeds import box_muller, counter_of, philox, split

Draw = Callable[[tf.Tensor], tf.Tensor]
"""How often noise was drawn before, int32 scalar → standard normal noise, float32 (N, H, W, C)."""

# Latents: an image's activations in the decoder are many times those of the sampler.
DECODED_TOGETHER = 8


class SamplerGraph:
    """Signatures that sample, over one denoising function a width.

    Args:
        denoisers: width → tf.function of (x, t), or (x, t, labels) with classes; widest first.
        noise_table: the forward process.
        schedule: that of `sample`, `sample_images` and `sample_noise`.
        image_shape: (H, W, C) of what the networks denoise.
        num_classes: of a model with classes; its signatures take `labels`.
        decode: tf.function, latents → images, both float32; None where images are denoised.
    """

    def __init__(
        self,
        denoisers: dict[float, Callable[..., tf.Tensor]],
        noise_table: NoiseTable,
        schedule: StepSchedule,
        image_shape: tuple[int, int, int],
        num_classes: int = 0,
        decode: Callable[[tf.Tensor], tf.Tensor] | None = None,
    ) -> None:
        self.denoisers = denoisers
        self.noise_table = noise_table
        self.schedule = schedule
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.decode = decode

    def signatures(self) -> dict[str, tf.types.experimental.PolymorphicFunction]:
        """Name → tf.function; see `ddsm_tf.export.savedmodel.write_sampler`."""
        one, text = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.string)
        number = tf.TensorSpec((), tf.float32)
        numbers = tf.TensorSpec((None,), tf.float32)
        rows = tf.TensorSpec((None,), tf.int64)
        noise = tf.TensorSpec((None, None, *self.image_shape), tf.float32)
        labels = {"labels": tf.TensorSpec((None,), tf.int32)} if self.num_classes else {}
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
                    "widths": numbers,
                    "sampler": text,
                    "eta": number,
                    "variance": text,
                    **dict.fromkeys(("churn", "churn_min", "churn_max", "churn_noise"), number),
                    **({"guidance_scale": number, "guidance_widths": numbers} if labels else {}),
                },
            ),
        }
        return {
            name: _with_names(method, {**specs, **labels}) for name, (method, specs) in some.items()
        }

    def sample(self, seed: tf.Tensor, count: tf.Tensor, labels: Any = None) -> tf.Tensor:
        """Images 0 … count - 1 of a seed, both int64 scalars; uint8 (count, H, W, C).

        `labels` are int32 (count,), or (1,) for all images; `IN_TURN` is the image's index modulo
        the number of classes.
        """
        return self.sample_images(*_images_from(seed, tf.constant(0, tf.int64), count), labels)

    def sample_images(self, seed: tf.Tensor, index: tf.Tensor, labels: Any = None) -> tf.Tensor:
        """Image `index[n]` of `seed[n]`, int64 (N,) each; uint8 (N, H, W, C)."""
        labels = self._labels(labels, index)
        return self._run(self._default_calls(), self._seeded(seed, index), labels)

    def sample_noise(self, noise: tf.Tensor, labels: Any = None) -> tf.Tensor:
        """Images of given noise, float32 (N, D, H, W, C); uint8 (N, H, W, C).

        D is how often the schedule draws: once for x_T, and once for each step that adds noise.
        """
        rows = [call.row for call in network_calls(self.schedule, self.noise_table)]
        needed = 1 + sum(bool(row.x_from_noise) for row in rows)
        message = f"`noise` must have {needed} draws for this schedule: (N, {needed}, H, W, C)"
        checks = [*check(tf.shape(noise)[1] == needed, message), *check_rows("noise", noise)]
        with tf.control_dependencies(checks):
            noise = tf.identity(noise)
        labels = self._labels(labels, tf.range(tf.shape(noise)[0], dtype=tf.int64))
        return self._run(self._default_calls(), lambda draw: tf.gather(noise, draw, axis=1), labels)

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
        churn: tf.Tensor,
        churn_min: tf.Tensor,
        churn_max: tf.Tensor,
        churn_noise: tf.Tensor,
        guidance_scale: tf.Tensor | None = None,
        guidance_widths: tf.Tensor | None = None,
        labels: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Images first … first + count - 1 of a seed, with a schedule of the caller's own.

        The other inputs are the fields of a `StepSchedule`; a negative `churn_max` is no limit, and
        empty `guidance_widths` are those of the steps.
        """
        options = {
            "sampler": sampler,
            "eta": eta,
            "variance": variance,
            "churn": churn,
            "churn_min": churn_min,
            "churn_max": churn_max,
            "churn_noise": churn_noise,
        }
        known, steps = list(self.denoisers), tf.size(timesteps)
        checks = [
            *check_schedule(timesteps, options, self.noise_table.train_timesteps),
            *check_widths("widths", widths, known, steps),
        ]
        guided = guidance_scale is not None
        if guided:
            follows = tf.size(guidance_widths) == 0
            unconditional = tf.cond(follows, lambda: widths, lambda: guidance_widths)
            checks += check_widths("guidance_widths", unconditional, known, steps, ", or none")
            checks += check_guidance(guidance_scale)
        with tf.control_dependencies(checks):
            timesteps = tf.identity(timesteps)
        places, at, factors = calls_of(self.noise_table, {"timesteps": timesteps, **options})
        branches = tf.gather(self._nearest(widths), places)
        guidance = tf.fill(tf.shape(branches), NO_GUIDANCE)
        if guided:
            without = tf.gather(self._nearest(unconditional), places)
            guidance = tf.where(guidance_scale != 1.0, without, guidance)
        calls = Calls.of(at, branches, guidance, factors)
        seed, index = _images_from(seed, first, count)
        labels = self._labels(labels, index)
        return self._run(calls, self._seeded(seed, index), labels, guidance_scale)

    def _nearest(self, widths: tf.Tensor) -> tf.Tensor:
        """The network of each width, int32."""
        apart = tf.abs(widths[:, None] - tf.constant(list(self.denoisers), tf.float32)[None, :])
        return tf.argmin(apart, axis=1, output_type=tf.int32)

    def _default_calls(self) -> Calls:
        return known_calls(network_calls(self.schedule, self.noise_table), list(self.denoisers))

    def _labels(self, labels: tf.Tensor | None, index: tf.Tensor) -> tf.Tensor | None:
        """The label of each image, int32 (N,)."""
        if labels is None:
            return None
        with tf.control_dependencies(check_labels(labels, tf.size(index), self.num_classes)):
            labels = tf.broadcast_to(labels, tf.shape(index))
        in_turn = tf.cast(index % self.num_classes, tf.int32)
        return tf.where(labels == IN_TURN, in_turn, labels)

    def _seeded(self, seed: tf.Tensor, index: tf.Tensor) -> Draw:
        """`ImageNoise` of image `index[n]` of `seed[n]`."""
        values = math.prod(self.image_shape)
        blocks = tf.range(-(-values // 4), dtype=tf.int64)
        with tf.control_dependencies(check_seeds(seed, index)):
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

    def _run(
        self,
        calls: Calls,
        draw: Draw,
        labels: tf.Tensor | None = None,
        scale: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The loop of `ddsm_tf.sampling.sample`; uint8 (N, H, W, C)."""
        scale = self.schedule.guidance_scale if scale is None else scale
        remembers = self._remembers(calls)

        def body(k: tf.Tensor, x: tf.Tensor, previous: tf.Tensor) -> tuple[tf.Tensor, ...]:
            row = StepCoefficients(*tf.unstack(calls.factors[k]))
            output = self._predict(calls, k, row.model_from_x * x, labels, scale)
            noise = tf.cond(
                row.x_from_noise > 0.0, lambda: draw(calls.draws[k]), lambda: tf.zeros_like(x)
            )
            before = previous if remembers else None
            x, x0 = take_step(x, output, noise, row, self._clip, before)
            x = tf.ensure_shape(x, (None, *self.image_shape))
            return k + 1, x, tf.ensure_shape(x0, x.shape) if remembers else previous

        count = tf.size(calls.timesteps)
        x = draw(tf.constant(0))
        previous = tf.zeros_like(x) if remembers else tf.zeros((0, *self.image_shape))
        _, x, _ = tf.while_loop(
            lambda k, *state: k < count, body, (0, x, previous), parallel_iterations=1
        )
        x = tf.debugging.check_numerics(x, "the network gave NaN or infinity; export it again")
        if self.decode is not None:
            x = in_parts(self.decode, x, DECODED_TOGETHER)
            x = tf.debugging.check_numerics(x, "the decoder gave NaN or infinity; export it again")
        # As `ddsm_tf.images.to_uint8`.
        return tf.cast(tf.round((tf.clip_by_value(x, -1.0, 1.0) + 1.0) * 127.5), tf.uint8)

    def _remembers(self, calls: Calls) -> bool:
        """Whether a call may need the estimate of the one before."""
        factors = tf.get_static_value(calls.factors)
        return factors is None or bool((factors[:, PREVIOUS] != 0.0).any())

    def _clip(self, x0: tf.Tensor) -> tf.Tensor:
        return x0 if self.decode is not None else tf.clip_by_value(x0, -1.0, 1.0)

    def _predict(
        self, calls: Calls, k: tf.Tensor, x: tf.Tensor, labels: tf.Tensor | None, scale: Any
    ) -> tf.Tensor:
        """The output of a call, guided where it is."""
        t = tf.fill(tf.shape(x)[:1], tf.cast(calls.timesteps[k], tf.float32))

        def run(branch: tf.Tensor, *given: tf.Tensor) -> tf.Tensor:
            networks = [lambda f=f: f(x, t, *given) for f in self.denoisers.values()]
            return tf.switch_case(branch, networks)

        if labels is None:
            return run(calls.branches[k])
        output = run(calls.branches[k], labels)
        guidance = tf.get_static_value(calls.guidance)
        if guidance is not None and (guidance == NO_GUIDANCE).all():
            return output

        def guided() -> tf.Tensor:
            without = run(calls.guidance[k], tf.fill(tf.shape(labels), self.num_classes))
            return without + scale * (output - without)

        return tf.cond(calls.guidance[k] >= 0, guided, lambda: output)


def in_parts(function: Callable[[tf.Tensor], tf.Tensor], rows: tf.Tensor, size: int) -> tf.Tensor:
    """`function(rows)`, at most `size` rows at a time."""
    count, shape = tf.shape(rows)[0], rows.shape[1:]
    size = tf.clip_by_value(count, 1, size)
    # One part at least, for no rows: `map_fn` needs to know what its function gives.
    blank = tf.maximum(-count % size, 1 - count)
    padded = tf.concat([rows, tf.zeros((blank, *shape), rows.dtype)], axis=0)
    parts = tf.reshape(padded, (-1, size, *shape))
    outputs = tf.map_fn(
        lambda part: function(tf.ensure_shape(part, (None, *shape))), parts, parallel_iterations=1
    )
    joined = tf.concat([[count + blank], tf.shape(outputs)[2:]], axis=0)
    return tf.reshape(outputs, joined)[:count]


def _images_from(
    seed: tf.Tensor, first: tf.Tensor, count: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    with tf.control_dependencies(check_count(count)):
        index = first + tf.range(count)
    return tf.fill(tf.shape(index), seed), index


def _with_names(
    method: Callable[..., tf.Tensor], specs: dict[str, tf.TensorSpec]
) -> tf.types.experimental.PolymorphicFunction:
    """A tf.function whose inputs and output bear the names that a client uses."""
    named = [tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items()]

    @tf.autograph.experimental.do_not_convert
    def signature(*inputs: Any) -> dict[str, tf.Tensor]:
        return {"images": method(*inputs)}

    return tf.function(signature, input_signature=named)
