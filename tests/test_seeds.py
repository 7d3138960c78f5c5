"""Noise streams: frozen values, independence of the batch, and bad seeds."""

import numpy as np
import pytest

from ddsm_tf.errors import InputError
from ddsm_tf.seeds import ImageNoise, box_muller, philox

# Made once with NumPy 2.4; if these change, every sample anyone has reported changes.
FIRST = [0.991137683391571, -0.9246625900268555, -0.6176089644432068, -0.48206859827041626]
SECOND = [1.1363673210144043, -0.6758829951286316, 1.2405917644500732, 0.2242511361837387]
OTHER_IMAGE = [1.0675901174545288, -0.4253441393375397, -2.3679730892181396, -0.2314968854188919]
# Counter, key and output as published with the generator (Random123's known answers).
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    found = philox(tuple(map(np.uint64, counter)), tuple(map(np.uint64, key)))
    assert tuple(map(int, found)) == words


def test_box_muller_of_known_words():
    quarter, half = 2.0**30, 2.0**31
    radius = np.sqrt(-2 * np.log((half + 0.5) / 2**32))
    found = box_muller([np.array([half]), np.array([quarter]), np.array([half]), np.zeros(1)], np)
    np.testing.assert_allclose(found, [[0.0, radius, radius, 0.0]], atol=1e-12)
    extreme = box_muller([np.zeros(1)] * 4, np)
    assert 6.7 < extreme.max() < 6.8


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


def test_an_image_of_a_size_that_is_no_multiple_of_four():
    odd = ImageNoise(7, 0, 2, (3, 3, 1)).draw()
    whole = ImageNoise(7, 0, 2, (3, 4, 1)).draw()
    np.testing.assert_array_equal(odd.reshape(2, -1), whole.reshape(2, -1)[:, :9])


def test_draws_of_one_image_are_not_correlated():
    noise = ImageNoise(3, 5, 1, (64, 64, 1))
    draws = np.stack([noise.draw().ravel() for _ in range(8)])
    others = np.corrcoef(draws)[~np.eye(8, dtype=bool)]
    assert np.abs(others).max() < 5 / 64


def test_images_seeds_and_draws_differ():
    draws = []
    for seed in (0, 1, 2**31, 2**32 - 1):
        noise = ImageNoise(seed, 0, 3, (4, 4, 1))
        draws += [*noise.draw(), *noise.draw()]
    assert len({draw.tobytes() for draw in draws}) == 4 * 3 * 2


def test_large_seed_is_not_another_image_of_a_small_seed():
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
