"""The Fréchet distance that infinitely many images would have."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.metrics.frechet import Statistics, frechet_distance

POINTS = 15


def frechet_distance_at_infinity(
    features: np.ndarray, reference: Statistics, *, points: int = POINTS, seed: int = 0
) -> float:
    """Extrapolate the distance, whose bias falls with 1 / N, to 1 / N = 0.

    A line through the distances of subsets of N / 2 to N features over 1 / N (Chong and Forsyth,
    2020, arXiv 1911.07023, section 3.1).

    Args:
        features: (N, D) of the images to judge, N ≥ 20.
        reference: of the real images.
        points: how many sizes.
        seed: of the subsets.

    Raises:
        InputError: fewer than 20 features.
    """
    if len(features) < 20:
        raise invalid("features", len(features), "must be at least 20, to fit a line through sizes")
    random = np.random.default_rng(seed)
    sizes = np.linspace(len(features) // 2, len(features), points).astype(int)
    distances = [
        frechet_distance(
            Statistics.of(features[random.choice(len(features), size, replace=False)]), reference
        )
        for size in sizes
    ]
    return float(np.polyfit(1.0 / sizes, distances, 1)[1])
