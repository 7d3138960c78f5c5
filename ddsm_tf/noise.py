"""Noise tables of the forward diffusion, in float64 NumPy.

Symbols follow DDPM (Ho et al., 2020, arXiv 2006.11239): x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.
EDM (Karras et al., 2022, arXiv 2206.00364) writes x_0 + σ ε, which is the same up to the factor
sqrt(ᾱ_t), with σ_t = sqrt((1 - ᾱ_t) / ᾱ_t); so one table serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid

PREDICTIONS = ("epsilon", "v", "x0", "edm")
MAX_TIMESTEPS = 100_000
_MAX_BETA = 0.999
_COSINE_OFFSET = 0.008


@dataclass(frozen=True, eq=False)
class NoiseTable:
    """The noise variances β_t of T training timesteps, and what a network makes of them.

    Attributes:
        betas: float64 (T,), each in (0, 1).
        prediction: what the network's output means: "epsilon" (DDPM), "v" (Salimans and Ho, 2022,
            arXiv 2202.00512), "x0", or "edm" (F_θ of EDM's preconditioning, table 1).
        data_std: standard deviation of the data, for "edm" alone; above 0.

    Example:
        >>> table = NoiseTable.linear(1000)
        >>> float(table.alphas_cumprod[0])
        0.9999

    Raises:
        InputError: `betas` is empty, not one-dimensional, or leaves (0, 1); or another argument
            breaks its rule.
    """

    betas: np.ndarray
    prediction: str = "epsilon"
    data_std: float = 0.5

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise invalid("prediction", self.prediction, f"must be one of {', '.join(PREDICTIONS)}")
        is_number = isinstance(self.data_std, (int, float)) and not isinstance(self.data_std, bool)
        if not is_number or not 0.0 < self.data_std < 1e6:
            raise invalid("data_std", self.data_std, "must be a number above 0")
        try:
            betas = np.array(self.betas, dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise invalid("betas", self.betas, "must be a list of numbers") from error
        if betas.ndim != 1 or betas.size == 0:
            raise invalid("betas", betas.shape, "must have the shape (T,) with T ≥ 1")
        if not np.all((betas > 0) & (betas < 1)):
            raise invalid("betas", betas.tolist(), "must lie in (0, 1)")
        betas.setflags(write=False)
        object.__setattr__(self, "betas", betas)

    @classmethod
    def linear(
        cls, train_timesteps: int = 1000, start: float = 1e-4, end: float = 0.02
    ) -> NoiseTable:
        """β rising linearly from `start` to `end` (DDPM, section 4)."""
        _check_timesteps(train_timesteps)
        return cls(np.linspace(start, end, train_timesteps, dtype=np.float64))

    @classmethod
    def cosine(cls, train_timesteps: int = 1000) -> NoiseTable:
        """ᾱ falling as a squared cosine (Nichol and Dhariwal, 2021, arXiv 2102.09672, eq. 17)."""
        _check_timesteps(train_timesteps)
        share = np.arange(train_timesteps + 1, dtype=np.float64) / train_timesteps
        angle = (share + _COSINE_OFFSET) / (1.0 + _COSINE_OFFSET) * np.pi / 2.0
        alpha_bar = np.cos(angle) ** 2
        return cls(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], _MAX_BETA))

    @classmethod
    def edm(
        cls,
        train_timesteps: int = 1000,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        data_std: float = 0.5,
    ) -> NoiseTable:
        """EDM's noise levels (equation 5) and preconditioning: σ from `sigma_min` up to
        `sigma_max`, evenly spaced in σ^(1/ρ)."""
        _check_timesteps(train_timesteps)
        if not 0.0 < sigma_min < sigma_max:
            raise invalid("sigma_min", sigma_min, f"must lie in (0, sigma_max (={sigma_max}))")
        low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
        sigmas = np.linspace(low, high, train_timesteps, dtype=np.float64) ** rho
        alpha_bar = 1.0 / (1.0 + sigmas**2)
        before = np.append(1.0, alpha_bar[:-1])
        return cls(1.0 - alpha_bar / before, prediction="edm", data_std=data_std)

    def predicting(self, prediction: str, data_std: float | None = None) -> NoiseTable:
        """The same noise for a network whose output means something else."""
        return replace(self, prediction=prediction, data_std=data_std or self.data_std)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ_t, float64 (T,), strictly falling within (0, 1)."""
        return np.cumprod(1.0 - self.betas)

    @property
    def train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return int(self.betas.size)

    def signal_and_noise_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), float64 (T,) each (DDPM, equation 4)."""
        return np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """EDM's σ_t = sqrt((1 - ᾱ_t) / ᾱ_t), float64 (T,), strictly rising."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    def nearest_timestep(self, sigma: float) -> int:
        """The timestep whose σ_t is nearest to `sigma` on a logarithmic scale."""
        return int(np.abs(np.log(self.sigmas) - np.log(sigma)).argmin())

    def to_dict(self) -> dict[str, Any]:
        """A JSON value that `from_dict` reads back to the last bit."""
        value: dict[str, Any] = {"betas": self.betas.tolist()}
        if self.prediction != "epsilon":
            value["prediction"] = self.prediction
        if self.prediction == "edm":
            value["data_std"] = self.data_std
        return value

    @classmethod
    def from_dict(cls, value: Any) -> NoiseTable:
        """Read what `to_dict` wrote.

        Raises:
            InputError: `value` is not such a dictionary.
        """
        known = {"betas", "prediction", "data_std"}
        if not isinstance(value, Mapping) or "betas" not in value or not set(value) <= known:
            raise InputError(
                "`noise_table` must be an object with the key 'betas', and 'prediction' and "
                "'data_std' at most"
            )
        if not isinstance(value["betas"], list) or len(value["betas"]) > MAX_TIMESTEPS:
            raise InputError(f"`betas` must be a list of at most {MAX_TIMESTEPS:,} numbers")
        return cls(**value)


def _check_timesteps(train_timesteps: int) -> None:
    if train_timesteps < 1:
        raise invalid("train_timesteps", train_timesteps, "must be at least 1")
