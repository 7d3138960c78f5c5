"""Images: ranges, the layout of grids, and files read back."""

import io

import numpy as np
import pytest
from PIL import Image

from ddsm_tf.errors import InputError
from ddsm_tf.images import (
    check_image_path,
    image_grid,
    png_bytes,
    save_images,
    save_png,
    to_float,
    to_uint8,
)


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_every_grey_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    floats = to_float(levels)
    assert floats.dtype == np.float32
    assert (floats[0], floats[255]) == (-1.0, 1.0)
    assert floats[51] == pytest.approx(-0.6)
    assert to_uint8(floats).dtype == np.uint8
    np.testing.assert_array_equal(to_uint8(floats), levels)


def test_values_outside_are_clipped():
    # Without the clip, uint8 would wrap round.
    x = np.array([-9.0, -1.001, 1.001, 9.0, np.inf, -np.inf])
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 255, 0]


def test_rounding_is_to_the_nearest_level():
    levels = np.array([19.49, 19.51, 100.3, 100.7, 254.6])
    assert to_uint8(levels / 127.5 - 1.0).tolist() == [19, 20, 100, 101, 255]


def test_halves_round_to_even():
    # These halves are exact in float64; truncating or rounding up would give other levels.
    halves = np.array([127.5, 32.5, 36.5, 19.5])
    x = halves / 127.5 - 1.0
    assert ((x + 1.0) * 127.5 == halves).all()
    assert to_uint8(x).tolist() == [128, 32, 36, 20]


def test_grid_layout():
    images = np.arange(1, 13, dtype=np.uint8).reshape(3, 2, 2, 1)
    expected = [
        [1, 2, 128, 5, 6],
        [3, 4, 128, 7, 8],
        [128, 128, 128, 128, 128],
        [9, 10, 128, 128, 128],
        [11, 12, 128, 128, 128],
    ]
    np.testing.assert_array_equal(image_grid(images)[..., 0], expected)


def test_grid_columns_and_gap():
    images = np.arange(1, 7, dtype=np.uint8).reshape(3, 1, 2, 1)
    assert image_grid(images, columns=3, gap=0)[..., 0].tolist() == [[1, 2, 3, 4, 5, 6]]
    tall = image_grid(images, columns=1, gap=2)[..., 0]
    assert tall[[0, 3, 6]].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert tall.shape == (7, 2)
    assert image_grid(images, columns=5).shape == (1, 14, 1)


def test_grid_of_one_image_is_the_image():
    image = random_images(1, 4, 3, 3)
    np.testing.assert_array_equal(image_grid(image), image[0])


def test_grid_keeps_channels_apart():
    images = np.zeros((2, 1, 1, 3), np.uint8)
    images[0, ..., 0], images[1, ..., 2] = 10, 20
    assert image_grid(images, columns=2).tolist() == [[[10, 0, 0], [128] * 3, [0, 0, 20]]]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_read_back(channels, mode, tmp_path):
    picture = random_images(5, 7, channels)
    save_png(picture, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (7, 5))
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), picture)


def test_png_scale_repeats_pixels():
    picture = np.array([[[1], [2]], [[3], [4]]], np.uint8)
    with Image.open(io.BytesIO(png_bytes(picture, scale=2))) as image:
        pixels = np.asarray(image).tolist()
    assert pixels == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_npy_round_trip(tmp_path):
    images = random_images(5, 4, 3, 2)
    save_images(images, tmp_path / "x.npy")
    read = np.load(tmp_path / "x.npy")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, images)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize(("side", "scale"), [(8, 6), (16, 3), (32, 1), (64, 1)])
def test_small_images_are_enlarged_in_a_grid(side, scale, tmp_path):
    images = random_images(4, side, side, 3)
    save_images(images, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == ((2 * side + 1) * scale, (2 * side + 1) * scale, 3)
    second = pixels[: side * scale : scale, (side + 1) * scale :: scale]
    np.testing.assert_array_equal(second, images[1])


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.npz", "png", ".npy"])
def test_other_suffix(name, tmp_path):
    with pytest.raises(InputError, match=r"`out` .*must end in \.png"):
        check_image_path(name)
    with pytest.raises(InputError, match="`out`"):
        save_images(random_images(1, 2, 2, 1), tmp_path / name)
    assert not list(tmp_path.iterdir())
