"""What a sampler's graph refuses: assertions whose message is the rule.

They say what `StepSchedule` and the client say, for a server is also asked by others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from ddsm_tf.labels import IN_TURN
from ddsm_tf.schedule import DEFAULTS, MAX_GUIDANCE, OWNERS, SAMPLERS, VARIANCES

MAX_IMAGES = 1024
"""Of one request: a number mistyped must not take the server's memory."""

# As `StepSchedule`; NaN is refused, too, since it is not in any range.
_MAX_NUMBER = 1e6


def check(holds: tf.Tensor, message: str) -> list[tf.Operation]:
    """To be a control dependency of what must not run if `holds` is false."""
    return [tf.debugging.Assert(holds, [message])]


def check_count(count: tf.Tensor) -> list[tf.Operation]:
    """Of images that are asked for."""
    rule = f"`count` must lie in [1, {MAX_IMAGES}]; ask for more in several requests"
    return check((count >= 1) & (count <= MAX_IMAGES), rule)


def check_rows(name: str, rows: tf.Tensor) -> list[tf.Operation]:
    """Of an input with a row an image."""
    rule = f"`{name}` must have at most {MAX_IMAGES} rows; ask for more in several requests"
    return check(tf.shape(rows)[0] <= MAX_IMAGES, rule)


def check_seeds(seed: tf.Tensor, index: tf.Tensor) -> list[tf.Operation]:
    """Of rows of `seed` and `index`."""
    return [
        *check(tf.reduce_all(seed >= 0), "`seed` must lie in [0, 2**63)"),
        *check(tf.reduce_all(index >= 0), "`index` must be 0 or more"),
        *check_rows("index", index),
    ]


def check_labels(labels: tf.Tensor, images: tf.Tensor, num_classes: int) -> list[tf.Operation]:
    """Of `labels` for so many images."""
    known = (labels >= 0) & (labels <= num_classes) | (labels == IN_TURN)
    rule = f"`labels` must lie in [0, {num_classes}], or be {IN_TURN} for the classes in turn"
    size = (tf.size(labels) == 1) | (tf.size(labels) == images)
    return [
        *check(tf.reduce_all(known), rule),
        *check(size, "`labels` must be as many as images, or one for all"),
    ]


def check_widths(
    name: str, widths: tf.Tensor, known: Sequence[float], steps: tf.Tensor, remark: str = ""
) -> list[tf.Operation]:
    """Of the widths of a caller's schedule of so many steps."""
    apart = tf.abs(widths[:, None] - tf.constant(list(known), tf.float32)[None, :])
    inside = tf.reduce_all(tf.reduce_min(apart, axis=1) < 1e-6)
    return [
        *check(tf.size(widths) == steps, f"`{name}` must be as many as `timesteps`{remark}"),
        *check(inside, f"`{name}` must be among the model's {list(known)}"),
    ]


def check_guidance(scale: tf.Tensor) -> list[tf.Operation]:
    """Of a caller's `guidance_scale`."""
    inside = (scale >= 0.0) & (scale <= MAX_GUIDANCE)
    return check(inside, f"`guidance_scale` must lie in [0, {MAX_GUIDANCE:g}]")


def check_schedule(
    timesteps: tf.Tensor, options: Mapping[str, tf.Tensor], train_timesteps: int
) -> list[tf.Operation]:
    """Of a caller's timesteps and sampler.

    Args:
        timesteps: int32 (S,).
        options: `sampler`, `eta`, `variance` and the fields of churn.
        train_timesteps: of the noise table.
    """
    inside = (timesteps >= 0) & (timesteps < train_timesteps)
    sampler, variance, eta = (options[name] for name in ("sampler", "variance", "eta"))
    limit = options["churn_max"]
    numbers = tf.stack([options[name] for name in ("churn", "churn_min", "churn_noise")])
    return [
        *check(tf.size(timesteps) >= 1, "`timesteps` must hold at least one timestep"),
        *check(tf.reduce_all(inside), f"`timesteps` must lie in [0, {train_timesteps})"),
        *check(tf.reduce_all(timesteps[1:] < timesteps[:-1]), "`timesteps` must fall strictly"),
        *check(_among(sampler, SAMPLERS), f"`sampler` must be one of {SAMPLERS}"),
        *check(_among(variance, VARIANCES), f"`variance` must be one of {VARIANCES}"),
        *check((eta >= 0.0) & (eta <= 1.0), "`eta` must lie in [0, 1]"),
        *check(
            tf.reduce_all((numbers >= 0.0) & (numbers <= _MAX_NUMBER)),
            f"`churn`, `churn_min` and `churn_noise` must lie in [0, {_MAX_NUMBER:g}]",
        ),
        *check(limit <= _MAX_NUMBER, "`churn_max` must be at most 1e+06, and below 0 for no limit"),
        *(each for name in ("eta", "variance", "churn") for each in _check_owner(name, options)),
    ]


def _check_owner(name: str, options: Mapping[str, tf.Tensor]) -> list[tf.Operation]:
    """Of an option that other samplers would ignore."""
    samplers, default = OWNERS[name], DEFAULTS[name]
    unused = options[name] == tf.constant(default)
    rule = f"`{name}` is for {' and '.join(samplers)}; for others it must be {default}"
    return check(unused | _among(options["sampler"], samplers), rule)


def _among(text: tf.Tensor, choices: Sequence[str]) -> tf.Tensor:
    return tf.reduce_any(text == tf.constant(choices))
