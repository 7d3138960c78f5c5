"""Class labels of conditional models.

A model of K classes takes labels 0 … K - 1, and K for "no class", which is what classifier-free
guidance compares with (Ho and Salimans, 2022, arXiv 2207.12598).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid

MAX_CLASSES = 100_000
IN_TURN = -2
"""What a server takes for "the image's index modulo the number of classes"."""


def labels_in_turn(num_classes: int, first: int, count: int) -> np.ndarray:
    """Label i mod K of images first … first + count - 1, int32 (count,)."""
    return ((first + np.arange(count)) % num_classes).astype(np.int32)


def no_class(num_classes: int, count: int) -> np.ndarray:
    """The label "no class" of `count` images, int32 (count,)."""
    return np.full(count, num_classes, np.int32)


def check_labels(labels: Any, count: int, num_classes: int) -> np.ndarray | None:
    """The labels of `count` images for a model of so many classes, int32 (count,).

    Args:
        labels: integers (count,), one integer for all of them, or None for the classes in turn.
        count: images.
        num_classes: K; 0 is a model without classes, which takes None and nothing else.

    Raises:
        InputError: another number of labels, a label that is no integer in [0, K], or labels for
            a model without classes.
    """
    if num_classes == 0:
        if labels is not None:
            raise invalid("labels", labels, "are for a model with classes; this one has none")
        return None
    if labels is None:
        return labels_in_turn(num_classes, 0, count)
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise invalid("labels", labels, "must be integers")
    if array.ndim == 0:
        array = np.full(count, array)
    if array.shape != (count,):
        raise invalid("labels", f"shape {array.shape}", f"must be ({count},): one an image")
    outside = array[(array < 0) | (array > num_classes)]
    if outside.size:
        rule = f"must lie in [0, {num_classes}); {num_classes} is no class"
        raise invalid("labels", int(outside[0]), rule)
    return array.astype(np.int32)


def parse_labels(text: str | None, count: int, num_classes: int) -> np.ndarray | None:
    """The labels that `--class` names.

    Args:
        text: one class, several separated by commas, which images take in turn, "none", or None
            for all classes in turn.
        count: images.
        num_classes: K of the model.

    Raises:
        InputError: the text is no such list, or names a class that the model lacks.
    """
    if text is None:
        return check_labels(None, count, num_classes)
    if num_classes == 0:
        raise invalid("--class", text, "is for a model with classes; this one has none")
    if text == "none":
        return no_class(num_classes, count)
    try:
        classes = np.array([int(part) for part in text.split(",")])
    except (ValueError, OverflowError) as error:
        raise invalid("--class", text, "must be classes such as 3 or 0,1,2, or none") from error
    if classes.dtype.kind != "i" or ((classes < 0) | (classes >= num_classes)).any():
        raise invalid("--class", text, f"must be classes in [0, {num_classes})")
    return check_labels(classes[np.arange(count) % len(classes)], count, num_classes)


def check_conditional(guidance_scale: float, num_classes: int) -> None:
    """`InputError` if a schedule asks for guidance that a model without classes cannot give."""
    if guidance_scale != 1.0 and num_classes == 0:
        raise InputError(
            f"`guidance_scale` (={guidance_scale:g}) needs a model with classes; train one with "
            "`--set num_classes=K` on data with labels"
        )
