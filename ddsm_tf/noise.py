"""Noise tables of the forward diffusion, in float64 NumPy.

Symbols follow DDPM (Ho et al., 2020, arXiv 2006.11239): x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ddsm_tf.errors import InputError, invalid


@dataclass(frozen=True, eq=False)
class NoiseTable:
    """The noise variances β_t of T training timesteps and what follows from them.

    Attributes:
        betas: float64 (T,), each in (0, 1).

    Example:
        >>> table = NoiseTable.linear(1000)
        >>> float(table.alphas_cumprod[0])
        0.9999

    Raises:
        InputError: `betas` is empty, not one-dimensional, or leaves (0, 1).
    """

    betas: np.ndarray

    def __post_init__(self) -> None:
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
        if train_timesteps < 1:
            raise invalid("train_timesteps", train_timesteps, "must be at least 1")
        return cls(np.linspace(start, end, train_timesteps, dtype=np.float64))

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

    def to_dict(self) -> dict[str, Any]:
        """A JSON value that `from_dict` reads back to the last bit."""
        return {"betas": self.betas.tolist()}

    @classmethod
    def from_dict(cls, value: Any) -> NoiseTable:
        """Read what `to_dict` wrote.

        Raises:
            InputError: `value` is not such a dictionary.
        """
        if not isinstance(value, Mapping) or set(value) != {"betas"}:
            raise InputError("`noise_table` must be an object with the one key 'betas'")
        if not isinstance(value["betas"], list) or len(value["betas"]) > 100_000:
            raise InputError("`betas` must be a list of at most 100,000 numbers")
        return cls(value["betas"])
