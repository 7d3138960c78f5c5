"""Networks for benchmarks that need no trained weights."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_weights(unet: Any) -> Any:
    """Give kernels a scale that keeps activations as large as they are in a trained network."""
    random = np.random.default_rng(0)
    for variable in unet.trainable_variables:
        if variable.path.endswith("kernel"):
            scale = np.prod(variable.shape[:-1]) ** -0.5
            variable.assign(scale * random.standard_normal(variable.shape))
    return unet
