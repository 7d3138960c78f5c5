"""Step-aware diffusion (DDSM, arXiv 2310.03337) for Keras 3.

Importing the package brings in NumPy only; the models, which need Keras, load when first used.

Example:
    >>> from ddsm_tf import DiffusionModel, NoiseTable, SlimmableUNet, StepSchedule
"""

from __future__ import annotations

import importlib
from typing import Any

from ddsm_tf.errors import InputError, MissingExtraError
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, even_timesteps

__version__ = "0.1.0"

_LAZY = {"DiffusionModel": "ddsm_tf.models", "SlimmableUNet": "ddsm_tf.models"}

__all__ = [
    "DiffusionModel",
    "InputError",
    "MissingExtraError",
    "NoiseTable",
    "SlimmableUNet",
    "StepSchedule",
    "even_timesteps",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
