"""Noise streams: frozen values, independence of the batch, and bad seeds."""

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.seeds import ImageNoise

# Made once with NumPy 2.4; if these change, every sample anyone has reported changes.
FIRST = [-1.8313077688217163, -0.1773543506860733, 0.038279201835393906, -0.4029516279697418]
SECOND = [0.002051332499831915, -0.09432702511548996, 3.298274517059326, 2.0120584964752197]
OTHER_IMAGE = [-0.8462426662445068, 0.93642657995224, -1.1081104278564453, 0.527085542678833]


def test_values_are_frozen():
    noise = ImageNoise(0, 0, 2, (2, 2, 1))
    first, second = noise.draw(), noise.draw()
    assert first.dtype == np.float32
    assert first.shape == (2, 2, 2, 1)
    assert first[0].ravel().tolist() == FIRST
    assert second[0].ravel().tolist() == SECOND
    assert first[1].ravel().tolist() == OTHER_IMAGE


def test_image_does_not_depend_on_its_batch():
    whole = ImageNoise(7, 0, 10, (4, 3, 2))
    part = ImageNoise(7, 5, 3, (4, 3, 2))
    for _ in range(3):
        np.testing.assert_array_equal(whole.draw()[5:8], part.draw())


def test_images_seeds_and_draws_differ():
    draws = []
    for seed in (0, 1, 2**31, 2**32 - 1):
        noise = ImageNoise(seed, 0, 3, (4, 4, 1))
        draws += [*noise.draw(), *noise.draw()]
    assert len({draw.tobytes() for draw in draws}) == 4 * 3 * 2


def test_large_seed_is_not_another_image_of_a_small_seed():
    # SeedSequence splits 2**32 into the words 0 and 1, as if seed 0 and image 1 were meant.
    large = ImageNoise(2**32, 0, 1, (4, 4, 1)).draw()
    assert not np.array_equal(large, ImageNoise(0, 1, 1, (4, 4, 1)).draw())


def test_streams_of_images_are_not_correlated():
    noise = ImageNoise(3, 0, 8, (64, 64, 1)).draw().reshape(8, -1)
    others = np.corrcoef(noise)[~np.eye(8, dtype=bool)]
    assert np.abs(others).max() < 5 / 64


def test_noise_is_standard_normal():
    noise = ImageNoise(1, 0, 16, (64, 64, 1)).draw()
    assert abs(noise.mean()) < 5 / 256
    assert abs(noise.var() - 1.0) < 5 * np.sqrt(2) / 256
    assert np.mean(np.abs(noise) < 1.0) == pytest.approx(0.6827, abs=5 * 0.466 / 256)


def test_numpy_integer_is_a_seed():
    np.testing.assert_array_equal(
        ImageNoise(np.int64(5), 0, 1, (2, 2, 1)).draw(), ImageNoise(5, 0, 1, (2, 2, 1)).draw()
    )


@pytest.mark.parametrize("seed", [-1, True, 1.5, 2**63, None, "0", float("nan")])
def test_bad_seed(seed):
    with pytest.raises(InputError, match="`seed`"):
        ImageNoise(seed, 0, 1, (2, 2, 1))
