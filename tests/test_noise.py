"""Noise tables: values in float64, storage, and refusal of bad input."""

import json
from fractions import Fraction

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.noise import NoiseTable


def exact_alpha_bar(t, train_timesteps=1000):
    """ᾱ_t of the linear table in exact rational arithmetic."""
    start, end = Fraction(1, 10_000), Fraction(2, 100)
    product = Fraction(1)
    for i in range(t + 1):
        product *= 1 - (start + (end - start) * i / (train_timesteps - 1))
    return float(product)


def test_linear_table_has_the_values_of_the_paper():
    table = NoiseTable.linear(1000)
    assert table.train_timesteps == 1000
    assert table.betas.dtype == table.alphas_cumprod.dtype == np.float64
    assert (table.betas[0], table.betas[-1]) == (1e-4, 0.02)
    assert table.alphas_cumprod[0] == 0.9999
    assert table.alphas_cumprod[-1] == pytest.approx(4.0358e-05, rel=1e-4)


@pytest.mark.parametrize("t", [1, 499, 999])
def test_alpha_bar_is_exact_to_float64(t):
    # float32 products would be wrong from the seventh digit on.
    assert NoiseTable.linear(1000).alphas_cumprod[t] == pytest.approx(exact_alpha_bar(t), rel=1e-12)


def test_alpha_bar_of_a_short_table():
    table = NoiseTable([0.5, 0.25, 0.1])
    np.testing.assert_allclose(table.alphas_cumprod, [0.5, 0.375, 0.3375], rtol=1e-15)


def test_linear_takes_its_ends():
    np.testing.assert_allclose(NoiseTable.linear(3, 0.1, 0.3).betas, [0.1, 0.2, 0.3])
    assert NoiseTable.linear(1, 0.1, 0.3).betas.tolist() == [0.1]


def test_signal_and_noise_scale():
    signal, noise = NoiseTable([0.36, 0.75]).signal_and_noise_scale()
    np.testing.assert_allclose(signal, [0.8, 0.4])
    np.testing.assert_allclose(noise, [0.6, np.sqrt(0.84)])


def test_json_round_trip_keeps_every_bit():
    betas = np.random.default_rng(0).uniform(1e-9, 0.999, 1000)
    text = json.dumps(NoiseTable(betas).to_dict())
    read = NoiseTable.from_dict(json.loads(text))
    assert read.betas.tobytes() == betas.tobytes()


def test_betas_are_a_read_only_copy():
    given = np.array([0.1, 0.2])
    table = NoiseTable(given)
    given[0] = 0.9
    assert table.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        table.betas[0] = 0.5


@pytest.mark.parametrize(
    "betas",
    [
        [],
        0.1,
        None,
        [[0.1, 0.2]],
        [0.1, [0.2]],
        [0.0, 0.1],
        [0.1, 1.0],
        [-0.1],
        [0.1, float("nan")],
        [float("inf")],
        ["a", "b"],
        {"a": 1},
        [1j],
        [True],
    ],
)
def test_bad_betas(betas):
    with pytest.raises(InputError, match="`betas`"):
        NoiseTable(betas)


@pytest.mark.parametrize("train_timesteps", [0, -5])
def test_linear_needs_a_timestep(train_timesteps):
    with pytest.raises(InputError, match="`train_timesteps`"):
        NoiseTable.linear(train_timesteps)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.02), (1e-4, 1.0), (0.02, -0.01)])
def test_linear_stays_inside_the_range(start, end):
    with pytest.raises(InputError, match="`betas`"):
        NoiseTable.linear(10, start, end)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [0.1],
        {},
        {"beta": [0.1]},
        {"betas": [0.1], "more": 1},
        {"betas": "0.1"},
        {"betas": [0.1] * 100_001},
        {"betas": ["x"]},
        {"betas": []},
    ],
)
def test_bad_json(value):
    with pytest.raises(InputError, match="betas"):
        NoiseTable.from_dict(value)


def test_integer_beyond_float64():
    with pytest.raises(InputError, match="`betas`"):
        NoiseTable.from_dict({"betas": [10**400]})
