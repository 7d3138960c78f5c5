"""Which timesteps a sampler visits: spacings that know the noise table."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import even_timesteps

SPACINGS = ("even", "karras", "log_snr")
RHO = 7.0


def spaced_timesteps(spacing: str, table: NoiseTable, steps: int) -> tuple[int, ...]:
    """`steps` strictly falling timesteps that end at 0.

    Args:
        spacing: "even" in t (DDIM), "karras" (EDM's noise levels) or "log_snr" (DPM-Solver's).
        table: the noise table.
        steps: in [1, T].

    Raises:
        InputError: another spacing, or `steps` leaves its range.
    """
    spacings = {"karras": karras_timesteps, "log_snr": log_snr_timesteps}
    if spacing not in SPACINGS:
        raise invalid("spacing", spacing, f"must be one of {', '.join(SPACINGS)}")
    if spacing == "even":
        return even_timesteps(table.train_timesteps, steps)
    return spacings[spacing](table, steps)


def karras_timesteps(table: NoiseTable, steps: int, rho: float = RHO) -> tuple[int, ...]:
    """Timesteps whose σ is evenly spaced in σ^(1/ρ), from the largest (EDM, equation 5)."""
    return _nearest(table, table.sigmas ** (1.0 / rho), steps)


def log_snr_timesteps(table: NoiseTable, steps: int) -> tuple[int, ...]:
    """Timesteps evenly spaced in λ = -log σ (DPM-Solver, arXiv 2206.00927, section 3.4)."""
    return _nearest(table, np.log(table.sigmas), steps)


def _nearest(table: NoiseTable, levels: np.ndarray, steps: int) -> tuple[int, ...]:
    """The timesteps nearest to `steps` even levels, moved apart where two would be the same."""
    count = table.train_timesteps
    if not 1 <= steps <= count:
        raise invalid("steps", steps, f"must lie in [1, train_timesteps (={count})]")
    # A single step starts from the noisiest level; otherwise the last step starts at t = 0.
    wanted = np.linspace(levels[0], levels[-1], steps) if steps > 1 else levels[-1:]
    nearest = np.abs(levels[:, None] - wanted[None, :]).argmin(axis=0)
    places = np.arange(steps)
    # Rising by one at least: nearest[i] - i must not fall; then keep room below T for the rest.
    apart = np.maximum.accumulate(nearest - places) + places
    return tuple(int(t) for t in np.minimum(apart, count - steps + places)[::-1])
