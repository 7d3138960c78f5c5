"""Precision and recall of generated images: how many are real, how much of the real is there."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import invalid

NEIGHBOURS = 3
_ROWS = 1024


def precision_and_recall(
    real: np.ndarray, generated: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares of each set that lie within the other's manifold.

    The manifold of a set is the union of balls around its features, each as large as the distance
    to the k-th nearest other one (Kynkäänniemi et al., 2019, arXiv 1904.06991, equations 1 and 2).

    Args:
        real, generated: features (N, D) and (M, D).
        neighbours: k.

    Returns:
        Precision, the share of generated features in the real manifold, and recall, the reverse.

    Raises:
        InputError: a set has no more than k features.
    """
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= neighbours:
            rule = f"must be more than neighbours (={neighbours})"
            raise invalid(name, f"{len(features)} images", rule)
    return _share_within(generated, real, neighbours), _share_within(real, generated, neighbours)


def _share_within(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    radii = np.concatenate(
        [
            np.partition(rows, neighbours, axis=1)[:, neighbours]
            for rows in _blocks(manifold, manifold)
        ]
    )
    inside = [(rows <= radii).any(axis=1) for rows in _blocks(points, manifold)]
    return float(np.mean(np.concatenate(inside)))


def _blocks(x: np.ndarray, y: np.ndarray):
    """Squared distances of some rows of x to all of y, (rows, len(y)); of a point to itself 0."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.square(y).sum(axis=1)
    for first in range(0, len(x), _ROWS):
        some = x[first : first + _ROWS]
        squares = np.square(some).sum(axis=1)[:, None] + norms - 2.0 * some @ y.T
        yield np.maximum(squares, 0.0)
