"""What a network is trained to put out, and how much each timestep counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from ddsm_tf.errors import invalid
from ddsm_tf.noise import NoiseTable
from ddsm_tf.solvers import x0_from_output

WEIGHTINGS = ("uniform", "min_snr", "min_snr_plus_one")
MIN_SNR_GAMMA = 5.0
# Of ln σ in EDM's training (Karras et al., 2022, table 1).
EDM_LOG_SIGMA_MEAN = -1.2
EDM_LOG_SIGMA_STD = 1.2


def model_input_scale(table: NoiseTable) -> np.ndarray:
    """The factor of x_t at the network's input, float64 (T,): EDM's c_in, else 1."""
    return x0_from_output(table.prediction, table.alphas_cumprod, table.data_std)[2]


def target_factors(table: NoiseTable) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the image and of the noise whose sum the network should put out.

    ε; v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x_0; x_0; or EDM's F = (x_0 - c_skip (x_0 + σ ε)) / c_out, with
    c_skip = σ_data² / (σ² + σ_data²) and c_out = σ σ_data / sqrt(σ² + σ_data²).

    Returns:
        Two float64 (T,) arrays.
    """
    signal, noise = table.signal_and_noise_scale()
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    if table.prediction == "epsilon":
        return zero, one
    if table.prediction == "v":
        return -noise, signal
    if table.prediction == "x0":
        return one, zero
    sigma, data = table.sigmas, table.data_std
    total = np.sqrt(sigma**2 + data**2)
    return sigma / (data * total), -data / total


def check_weighting(weighting: str) -> None:
    """Raise `InputError` unless it is one of `WEIGHTINGS`."""
    if weighting not in WEIGHTINGS:
        raise invalid("weighting", weighting, f"must be one of {', '.join(WEIGHTINGS)}")


def loss_weights(table: NoiseTable, weighting: str) -> np.ndarray:
    """The factor of the squared error of the network's output, float64 (T,).

    Args:
        table: noise and prediction.
        weighting: "uniform" leaves the output's error as it is, which for v is SNR + 1 times the
            squared error of x̂_0 (Salimans and Ho, 2022, arXiv 2202.00512, section 4). "min_snr"
            makes that factor min(SNR, 5) (Hang et al., 2023, arXiv 2303.09556, equation 8) and
            "min_snr_plus_one" min(SNR + 1, 5): v's, but for the least noisy timesteps, where
            much of a small network's capacity would go into details that nobody sees.

    Raises:
        InputError: another weighting.
    """
    check_weighting(weighting)
    if weighting == "uniform":
        return np.ones(table.train_timesteps)
    snr = 1.0 / table.sigmas**2
    _, x0_from_model, _ = x0_from_output(table.prediction, table.alphas_cumprod, table.data_std)
    factor = snr if weighting == "min_snr" else snr + 1.0
    return np.minimum(factor, MIN_SNR_GAMMA) * x0_from_model**2


def timestep_probabilities(table: NoiseTable) -> np.ndarray | None:
    """How often training visits each timestep, float64 (T,); None means all alike.

    EDM draws ln σ ~ N(-1.2, 1.2²) (table 1); each timestep gets the mass between the midpoints to
    its neighbours, so that the table stands for the density.
    """
    if table.prediction != "edm" or table.train_timesteps == 1:
        return None
    level = (np.log(table.sigmas) - EDM_LOG_SIGMA_MEAN) / EDM_LOG_SIGMA_STD
    between = (level[1:] + level[:-1]) / 2.0
    below = [0.5 * (1.0 + math.erf(edge / math.sqrt(2.0))) for edge in between]
    return np.diff([0.0, *below, 1.0])


class AtTimesteps(NamedTuple):
    """Factors at the timesteps of a batch, each float32 (N, 1, 1, 1)."""

    signal: Any
    noise: Any
    input_scale: Any
    target_image: Any
    target_noise: Any
    weight: Any


@dataclass(frozen=True)
class Objective:
    """A noise table's training objective, as tables for a graph.

    Attributes:
        factors: float32 (T,) each.
        cumulative_probabilities: float32 (T - 1,), of the timesteps below each but the first; None
            where all are drawn alike.
    """

    factors: AtTimesteps
    cumulative_probabilities: np.ndarray | None

    @classmethod
    def of(cls, table: NoiseTable, weighting: str) -> Objective:
        """The objective of a table; `InputError` for an unknown weighting."""
        columns = [
            *table.signal_and_noise_scale(),
            model_input_scale(table),
            *target_factors(table),
            loss_weights(table, weighting),
        ]
        probabilities = timestep_probabilities(table)
        cumulative = None
        if probabilities is not None:
            cumulative = np.cumsum(probabilities)[:-1].astype(np.float32)
        return cls(AtTimesteps(*(column.astype(np.float32) for column in columns)), cumulative)

    def at(self, t: Any) -> AtTimesteps:
        """The factors at timesteps t, int32 (N,)."""
        return AtTimesteps(*(ops.take(f, t)[:, None, None, None] for f in self.factors))

    def numpy_at(self, t: np.ndarray) -> AtTimesteps:
        """The factors at timesteps t, integers (N,), as arrays."""
        return AtTimesteps(*(factor[t, None, None, None] for factor in self.factors))

    def probabilities_of(self, timesteps: Sequence[int]) -> np.ndarray:
        """How often training visits each of some timesteps, float64 (N,)."""
        cumulative = self.cumulative_probabilities
        if cumulative is None:
            return np.full(len(timesteps), 1.0 / len(self.factors.signal))
        return np.diff(cumulative.astype(np.float64), prepend=0.0, append=1.0)[list(timesteps)]

    def draw_timesteps(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Timesteps as training visits them, int64 (count,)."""
        if self.cumulative_probabilities is None:
            return random.integers(len(self.factors.signal), size=count)
        return np.searchsorted(self.cumulative_probabilities, random.random(count))
