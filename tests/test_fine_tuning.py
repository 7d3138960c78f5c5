"""Batches of the diffusion loss that exports are fine-tuned with."""

import numpy as np
import pytest

from ddsm_tf.export.fine_tuning import NoisedImages
from ddsm_tf.noise import NoiseTable

TABLE = NoiseTable.linear(1000)
IMAGES = np.random.default_rng(0).integers(0, 2, (50, 4, 4, 1), np.uint8) * np.uint8(255)


def test_batches_follow_the_forward_process_and_their_seed():
    (x_t, t), noise, weight = NoisedImages(IMAGES, TABLE, 4000, 3, seed=1)[2]
    assert (x_t.dtype, t.dtype, noise.dtype, weight.dtype) == (np.float32,) * 4
    assert t.min() < 5 and t.max() > 994 and 470 < t.mean() < 530
    signal, spread = (scale[t.astype(int)] for scale in TABLE.signal_and_noise_scale())
    early = t < 900
    images = ((x_t.T - spread * noise.T) / signal).T[early]
    np.testing.assert_allclose(np.abs(images), 1.0, atol=1e-3)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert (weight == 1).all()
    again = NoisedImages(IMAGES, TABLE, 4000, 3, seed=1)
    np.testing.assert_array_equal(again[2].inputs[0], x_t)
    assert not np.array_equal(again[1].target, noise)
    other = NoisedImages(IMAGES, TABLE, 4000, 3, seed=2)[2]
    assert not np.array_equal(other.target, noise)
    assert len(list(again)) == 3


def test_batches_have_the_target_of_the_prediction():
    options = {"weighting": "min_snr"}
    table = TABLE.predicting("v")
    (x_t, t), v, weight = NoisedImages(IMAGES, table, 500, 1, **options)[0]
    signal, spread = (
        scale[t.astype(int), None, None, None] for scale in TABLE.signal_and_noise_scale()
    )
    # x_0 = sqrt(ᾱ) x_t - sqrt(1 - ᾱ) v (Salimans and Ho, 2022).
    np.testing.assert_allclose(np.abs(signal * x_t - spread * v), 1.0, atol=1e-4)
    snr = (signal / spread) ** 2
    np.testing.assert_allclose(weight, np.minimum(snr, 5.0) * spread**2, rtol=1e-4)


def test_edm_batches_are_scaled_and_at_training_s_noise_levels():
    table = NoiseTable.edm(100, data_std=0.5)
    (x, t), _, _ = NoisedImages(IMAGES, table, 4000, 1)[0]
    log_sigma = np.log(table.sigmas)[t.astype(int)]
    assert abs(log_sigma.mean() + 1.2) < 0.1 and abs(log_sigma.std() - 1.2) < 0.1
    # c_in makes the variance one for data of that deviation; these pixels are -1 and 1.
    sigma = np.exp(log_sigma)
    expected = np.sqrt((1 + sigma**2) / (sigma**2 + 0.25))
    for chosen in (sigma < 0.1, sigma > 2):
        assert x[chosen].std() == pytest.approx(expected[chosen].mean(), rel=0.05)


def test_some_labels_are_hidden_and_the_others_belong_to_their_images():
    labels = (IMAGES[:, 0, 0, 0] > 0).astype(np.int64)
    options = {"labels": labels, "num_classes": 2, "label_dropout": 0.25}
    (x_t, t, chosen), *_ = NoisedImages(IMAGES, TABLE, 4000, 1, **options)[0]
    assert chosen.dtype == np.int32
    assert 0.22 < np.mean(chosen == 2) < 0.28
    seen = (chosen < 2) & (t < 50)
    assert seen.sum() > 50
    np.testing.assert_array_equal(x_t[seen, 0, 0, 0] > 0, chosen[seen] == 1)
