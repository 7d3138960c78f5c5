"""Spacings of timesteps that know the noise table."""

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.noise import NoiseTable
from ddsm_tf.timesteps import karras_timesteps, log_snr_timesteps, spaced_timesteps

TABLE = NoiseTable.linear(1000)


def test_karras_levels_are_even_in_the_seventh_root():
    table = NoiseTable.edm(100_000)
    timesteps = list(karras_timesteps(table, 18))
    # EDM, equation 5, with 18 steps from 80 down to 0.002.
    share = np.arange(18) / 17
    expected = (80 ** (1 / 7) + share * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(table.sigmas[timesteps], expected, rtol=5e-4)


def test_log_snr_levels_are_even():
    table = NoiseTable.edm(100_000)
    steps = np.diff(np.log(table.sigmas[list(log_snr_timesteps(table, 20))]))
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)


@pytest.mark.parametrize("spacing", ["even", "karras", "log_snr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 400, 1000])
def test_timesteps_fall_strictly_to_zero(spacing, steps):
    for table in (TABLE, NoiseTable.cosine(1000), NoiseTable.edm(1000)):
        timesteps = spaced_timesteps(spacing, table, steps)
        assert len(timesteps) == steps
        assert (np.diff(timesteps) < 0).all()
        assert 0 <= timesteps[-1] <= timesteps[0] < 1000
        assert all(type(t) is int for t in timesteps)
        if steps > 1:
            assert timesteps[-1] == 0
        if spacing != "even":
            assert timesteps[0] == 999


def test_spacings_differ():
    tables = {s: spaced_timesteps(s, TABLE, 10) for s in ("even", "karras", "log_snr")}
    assert len(set(tables.values())) == 3
    # Even steps of log σ dwell at little noise.
    assert tables["log_snr"][5] < tables["even"][5] < tables["karras"][5]


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("spacing", ["even", "karras"])
def test_steps_out_of_range(spacing, steps):
    with pytest.raises(InputError, match=rf"`steps` \(={steps}\)"):
        spaced_timesteps(spacing, TABLE, steps)


def test_unknown_spacing():
    with pytest.raises(InputError, match="even, karras, log_snr"):
        spaced_timesteps("quadratic", TABLE, 5)


def test_cosine_table_is_nichols():
    table = NoiseTable.cosine(1000)
    angles = (np.array([0, 250, 500, 999]) + 1) / 1000
    f = np.cos((angles + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(table.alphas_cumprod[[0, 250, 500]], expected[:3], rtol=1e-9)
    # The last β is cut to 0.999.
    assert table.betas[-1] == 0.999


def test_edm_table():
    table = NoiseTable.edm(1000, 0.01, 50.0, data_std=0.4)
    assert table.sigmas[[0, -1]] == pytest.approx([0.01, 50.0], rel=1e-6)
    roots = np.diff(table.sigmas ** (1 / 7))
    np.testing.assert_allclose(roots, roots.mean(), rtol=1e-6)
    assert (table.prediction, table.data_std) == ("edm", 0.4)
    assert table.nearest_timestep(table.sigmas[123] * 1.001) == 123
    again = NoiseTable.from_dict(table.to_dict())
    assert (again.prediction, again.data_std) == ("edm", 0.4)
    np.testing.assert_array_equal(again.betas, table.betas)
    with pytest.raises(InputError, match="sigma_min"):
        NoiseTable.edm(1000, 2.0, 1.0)


def test_prediction_of_a_table():
    table = TABLE.predicting("v")
    assert table.to_dict()["prediction"] == "v"
    assert "data_std" not in table.to_dict()
    assert set(TABLE.to_dict()) == {"betas"}
    with pytest.raises(InputError, match="epsilon, v, x0, edm"):
        TABLE.predicting("noise")
