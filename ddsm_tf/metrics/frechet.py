"""The Fréchet distance between Gaussians fitted to features, in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddsm_tf.errors import invalid


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), symmetric, unbiased.
        count: how many features it was fitted to.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """Fit to features (N, D) with N ≥ 2.

        Raises:
            InputError: another shape, or a value that is not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise invalid("features", features.shape, "must have the shape (N, D) with N ≥ 2")
        if not np.isfinite(features).all():
            raise invalid("features", features.shape, "must be finite, but hold NaN or infinity")
        covariance = np.atleast_2d(np.cov(features, rowvar=False))
        return cls(features.mean(axis=0), covariance, len(features))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) (Dowson and Landau, 1982; Heusel et al., 2017, arXiv
    1706.08500, equation 6). The trace of the root is that of the symmetric (Σ₁^½ Σ₂ Σ₁^½)^½, whose
    eigenvalues are real, so singular covariances need no special care.

    Raises:
        InputError: the two have different dimensions.
    """
    if first.mean.shape != second.mean.shape:
        raise invalid("second", second.mean.shape, f"must have the dimension {first.mean.shape}")
    root = _symmetric_root(first.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ second.covariance @ root)
    root_trace = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    distance = np.sum((first.mean - second.mean) ** 2) + traces - 2.0 * root_trace
    # Rounding takes equal Gaussians a little below zero.
    return float(max(distance, 0.0))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
