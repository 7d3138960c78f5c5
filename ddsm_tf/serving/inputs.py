"""Inputs of the sampler's signatures, by name."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.labels import IN_TURN
from ddsm_tf.schedule import StepSchedule


def schedule_inputs(
    schedule: StepSchedule,
    count: int,
    seed: int,
    first: int = 0,
    labels: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Inputs of the signature `sample_schedule`: images first … first + count - 1.

    With `labels`, int32 (count,) or (1,), those of a model with classes.
    """
    conditional = {}
    if labels is not None:
        conditional = {
            "guidance_scale": np.float32(schedule.guidance_scale),
            # Never empty, though the signature allows it: JSON says no dtype of an empty list.
            "guidance_widths": np.array(schedule.unconditional_widths, np.float32),
            "labels": np.asarray(labels, np.int32),
        }
    return {
        "seed": np.int64(seed),
        "first": np.int64(first),
        "count": np.int64(count),
        "timesteps": np.array(schedule.timesteps, np.int32),
        "widths": np.array(schedule.widths, np.float32),
        "sampler": np.array(schedule.sampler),
        "eta": np.float32(schedule.eta),
        "variance": np.array(schedule.variance),
        "churn": np.float32(schedule.churn),
        "churn_min": np.float32(schedule.churn_min),
        # JSON has no infinity.
        "churn_max": np.float32(-1.0 if schedule.churn_max is None else schedule.churn_max),
        "churn_noise": np.float32(schedule.churn_noise),
        **conditional,
    }


def rows_of_seed(seed: int, first: int, count: int, batch_size: int) -> dict[str, np.ndarray]:
    """`seed` and `index` of at most `batch_size` images from `first` on, of `count` in all."""
    index = np.arange(first, min(first + batch_size, count), dtype=np.int64)
    return {"seed": np.full(len(index), seed, np.int64), "index": index}


def labels_of(
    labels: np.ndarray | int | None, count: int, *, in_turn: bool = True
) -> np.ndarray | None:
    """A label for each of `count` images, int32 (count,), or None.

    The server knows how many classes there are, and checks that.

    Args:
        labels: integers (count,), one for all images, or None.
        in_turn: whether `IN_TURN` may stand there.

    Raises:
        InputError: another number of labels, or one that no model can have.
    """
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.shape not in ((), (count,)):
        given = f"{array.dtype} {array.shape}"
        raise invalid("labels", given, f"must be integers ({count},) or one integer")
    wrong = array[(array < 0) & ((array != IN_TURN) | (not in_turn)) | (array >= 2**31)]
    if wrong.size:
        rule = f"must be 0 or more, or {IN_TURN} for the classes in turn"
        if not in_turn:
            rule = "must be 0 or more: each image's own class"
        raise invalid("labels", int(wrong[0]), rule)
    return np.broadcast_to(array, (count,)).astype(np.int32)
