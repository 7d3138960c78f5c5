"""What networks are trained to put out: the sampler must read an image's own target back as it."""

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.models.objective import (
    loss_weights,
    model_input_scale,
    target_factors,
    timestep_probabilities,
)
from ddsm_tf.noise import PREDICTIONS, NoiseTable
from ddsm_tf.solvers import x0_from_output

TABLES = [NoiseTable.linear(1000), NoiseTable.cosine(50), NoiseTable.edm(200, data_std=0.6)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("table", TABLES, ids=["linear", "cosine", "edm"])
def test_sampler_reads_the_target_back_as_the_image(table, prediction):
    table = table.predicting(prediction)
    image, noise = 0.37, -1.21
    signal, scale = table.signal_and_noise_scale()
    x_t = signal * image + scale * noise
    of_image, of_noise = target_factors(table)
    x0_from_x, x0_from_model, _ = x0_from_output(prediction, table.alphas_cumprod, table.data_std)
    read = x0_from_x * x_t + x0_from_model * (of_image * image + of_noise * noise)
    # Where ᾱ is 1e-9 the noise hides the image to that factor of float64's precision.
    np.testing.assert_allclose(read, image, rtol=1e-6)


def test_targets_by_hand():
    table = NoiseTable([0.36])  # ᾱ = 0.64: signal 0.8, noise 0.6, σ = 0.75
    of = {p: [float(f[0]) for f in target_factors(table.predicting(p, 0.5))] for p in PREDICTIONS}
    assert of["epsilon"] == [0.0, 1.0]
    assert of["x0"] == [1.0, 0.0]
    assert of["v"] == pytest.approx([-0.6, 0.8])
    # EDM: c_skip = 0.25 / 0.8125, c_out = 0.375 / sqrt(0.8125).
    c_skip, c_out = 0.25 / 0.8125, 0.375 / np.sqrt(0.8125)
    assert of["edm"] == pytest.approx([(1 - c_skip) / c_out, -c_skip * 0.75 / c_out])


def test_edm_inputs_and_targets_have_unit_variance():
    table = NoiseTable.edm(300, data_std=0.5)
    signal, scale = table.signal_and_noise_scale()
    of_image, of_noise = target_factors(table)
    inputs = model_input_scale(table) ** 2 * (signal**2 * 0.25 + scale**2)
    np.testing.assert_allclose(inputs, 1.0, rtol=1e-9)
    np.testing.assert_allclose(of_image**2 * 0.25 + of_noise**2, 1.0, rtol=1e-9)
    assert (model_input_scale(NoiseTable.linear(10)) == 1.0).all()


@pytest.mark.parametrize(
    ("weighting", "prediction", "expected"),
    [
        # Hang et al., section 3.4: min(SNR, 5) over SNR for ε, over SNR + 1 for v, itself for x_0.
        ("min_snr", "epsilon", lambda snr: np.minimum(snr, 5.0) / snr),
        ("min_snr", "v", lambda snr: np.minimum(snr, 5.0) / (snr + 1.0)),
        ("min_snr", "x0", lambda snr: np.minimum(snr, 5.0)),
        # What "uniform" is for v, as far as SNR = 4.
        ("min_snr_plus_one", "v", lambda snr: np.where(snr <= 4.0, 1.0, 5.0 / (snr + 1.0))),
        ("min_snr_plus_one", "epsilon", lambda snr: np.minimum(snr + 1.0, 5.0) / snr),
        ("min_snr_plus_one", "x0", lambda snr: np.minimum(snr + 1.0, 5.0)),
    ],
)
def test_weights_of_clipped_snr(weighting, prediction, expected):
    table = NoiseTable.linear(1000).predicting(prediction)
    snr = table.alphas_cumprod / (1.0 - table.alphas_cumprod)
    np.testing.assert_allclose(loss_weights(table, weighting), expected(snr), rtol=1e-9)
    assert (loss_weights(table, "uniform") == 1.0).all()


def test_unknown_weighting():
    with pytest.raises(InputError, match="uniform, min_snr"):
        loss_weights(NoiseTable.linear(10), "snr")


def test_edm_draws_log_normal_noise_levels():
    table = NoiseTable.edm(4000)
    probabilities = timestep_probabilities(table)
    log_sigma = np.log(table.sigmas)
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    mean = (probabilities * log_sigma).sum()
    assert mean == pytest.approx(-1.2, abs=0.01)
    deviation = np.sqrt((probabilities * (log_sigma - mean) ** 2).sum())
    assert deviation == pytest.approx(1.2, abs=0.01)
    assert timestep_probabilities(NoiseTable.linear(10)) is None
