"""Kernel distance between sets of features (KID where the features are Inception's)."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import invalid

SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_distance(
    first: np.ndarray,
    second: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy, unbiased, over random subsets.

    The kernel is (x·y / D + 1)³ (Bińkowski et al., 2018, arXiv 1801.01401, section 4).

    Args:
        first, second: features (N, D) and (M, D).
        subsets: how many pairs of subsets.
        subset_size: features of a subset; fewer where there are not so many.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets; the mean of equal distributions is 0.

    Raises:
        InputError: fewer than two features, or other dimensions.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise invalid("features", (len(first), len(second)), "must be at least 2 each")
    if first.shape[1:] != second.shape[1:]:
        raise invalid("second", second.shape, f"must have the dimension of {first.shape}")
    random = np.random.default_rng(seed)
    values = [
        _mmd2(
            first[random.choice(len(first), size, replace=False)],
            second[random.choice(len(second), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 4 of Gretton et al. (2012): the diagonals are left out."""
    count = len(x)
    within = sum(
        kernel.sum() - np.trace(kernel)
        for kernel in (polynomial_kernel(x, x), polynomial_kernel(y, y))
    )
    return within / (count * (count - 1)) - 2.0 * polynomial_kernel(x, y).mean()


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x·y / D + 1)³, float64 (N, M)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x @ y.T / x.shape[1] + 1.0) ** 3
