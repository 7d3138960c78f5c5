"""What exports need of the machine they are made on, checked before anything takes its time."""

from __future__ import annotations

import importlib.util

from ddsm_tf.errors import invalid, missing_extra


def check_requirements(kind: str) -> None:
    """Raise unless exports of a kind can be made here.

    Args:
        kind: one of `ddsm_tf.export.KINDS`; what a server reads is made like "savedmodel".

    Raises:
        InputError: see `check_backend`.
        MissingExtraError: TFLite files are asked for, and LiteRT, which checks them, is missing.
    """
    check_backend()
    if kind != "savedmodel" and importlib.util.find_spec("ai_edge_litert") is None:
        raise missing_extra("ai_edge_litert", "export")


def check_backend() -> None:
    """Raise `InputError` unless Keras runs on TensorFlow."""
    import keras

    backend = keras.backend.backend()
    if backend != "tensorflow":
        rule = (
            "must be tensorflow, which makes exports and runs them; unset it: weights that were "
            "trained under another backend load there too"
        )
        raise invalid("KERAS_BACKEND", backend, rule)
