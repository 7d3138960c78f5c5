"""A model of the distance that learns from finished trials, to screen schedules before sampling.

The logarithm of the distance is nearly a sum over the steps: it is modelled as a constant, plus an
unknown multiple of the importance proxy, plus a contribution of every part of the trajectory at
every width. Contributions are alike in neighbouring parts and grow with the width that is lost, and
this prior makes few trials go far. In closed form it is Gaussian process regression (Rasmussen and
Williams, 2006, chapter 2) whose two scales are picked by the marginal likelihood.
"""

from __future__ import annotations

import numpy as np

from ddsm_tf.search.space import SKIP, ScheduleSpace

PARTS = 25
"""Most parts of the trajectory that are told apart."""

CORRELATION = 0.3
"""Share of the trajectory over which contributions are alike."""

SIGNAL_SCALES = (0.3, 1.0, 3.0, 10.0, 30.0)
NOISE_SCALES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Candidates for both variances, relative to that of the data."""

SKIP_LOSS = 1.25
"""A skipped step counts as losing more than the whole width."""


class Surrogate:
    """Predicts distances of genomes from those of other genomes.

    Args:
        space: the schedules.
        genomes: int (N, segments), N ≥ 2, that were tried.
        distances: float (N,), positive.
        proxy: float (segments, choices), the importance proxy's share of each segment, or None.
    """

    def __init__(
        self,
        space: ScheduleSpace,
        genomes: np.ndarray,
        distances: np.ndarray,
        proxy: np.ndarray | None = None,
    ) -> None:
        self._space = space
        self._proxy = proxy
        self._prior = _prior(space)
        self._genomes = np.asarray(genomes, int)
        logs = np.log(np.maximum(distances, 1e-12))
        self._mean, variance = logs.mean(), max(logs.var(), 1e-12)
        self._proxy_mean = self._proxies(self._genomes).mean()
        signal, rest = self._covariances(self._genomes, self._genomes)
        best = -np.inf
        for signal_scale in SIGNAL_SCALES:
            # One decomposition serves every noise scale: noise adds to the eigenvalues.
            values, vectors = np.linalg.eigh(signal_scale * signal + rest)
            projected = vectors.T @ (logs - self._mean)
            for noise_scale in NOISE_SCALES:
                spectrum = variance * (np.maximum(values, 0.0) + noise_scale)
                likelihood = -0.5 * np.sum(projected**2 / spectrum + np.log(spectrum))
                if likelihood > best:
                    best, self._signal_scale = likelihood, signal_scale
                    self._weights = variance * (vectors @ (projected / spectrum))

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        """Predicted distances, float (N,), of int (N, segments) genomes."""
        signal, rest = self._covariances(np.asarray(genomes, int), self._genomes)
        return np.exp(self._mean + (self._signal_scale * signal + rest) @ self._weights)

    def _covariances(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the contributions, and of constant and proxy together; (len(first), len(second))."""
        signal = _shares(self._space, first) @ self._prior @ _shares(self._space, second).T
        proxies = [self._proxies(some) - self._proxy_mean for some in (first, second)]
        # The constant is known no better than to about three standard deviations.
        return signal, 10.0 + np.outer(*proxies)

    def _proxies(self, genomes: np.ndarray) -> np.ndarray:
        # One width, or widths that are all as good, have a proxy of zeros.
        if self._proxy is None or not self._proxy.any():
            return np.zeros(len(genomes))
        totals = self._proxy[np.arange(self._space.segments), genomes].sum(axis=1)
        return totals / self._proxy.max(axis=1).sum()


def _shares(space: ScheduleSpace, genomes: np.ndarray) -> np.ndarray:
    """How much of each part of the trajectory runs at each choice, (N, parts · choices)."""
    part = _part_of_segment(space)
    shares = np.zeros((len(genomes), part.max() + 1, len(space.choices)))
    lengths = np.array(space.segment_lengths) / np.bincount(part, space.segment_lengths)[part]
    for segment in range(space.segments):
        rows = np.arange(len(genomes))
        shares[rows, part[segment], genomes[:, segment]] += lengths[segment]
    return shares.reshape(len(genomes), -1)


def _part_of_segment(space: ScheduleSpace) -> np.ndarray:
    parts = min(PARTS, space.segments)
    return np.arange(space.segments) * parts // space.segments


def _prior(space: ScheduleSpace) -> np.ndarray:
    """Covariance of the contributions of (part, choice), such that a whole schedule's is about 1.

    Along the widths it is that of a random walk from the widest one, which contributes nothing.
    """
    parts = _part_of_segment(space).max() + 1
    position = np.arange(parts) / parts
    alike = np.exp(-np.abs(position[:, None] - position[None, :]) / CORRELATION)
    widest = space.widths[0]
    lost = np.array([SKIP_LOSS if c == SKIP else 1.0 - c / widest for c in space.choices])
    return np.kron(alike / alike.sum(), np.minimum(lost[:, None], lost[None, :]))
