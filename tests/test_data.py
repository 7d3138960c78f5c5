"""Image sources and the order of training batches."""

import numpy as np
import pytest
from PIL import Image

from ddsm_tf.errors import InputError
from ddsm_tf.images import to_uint8
from ddsm_tf.training.data import load_images, training_batches


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def load_npz(folder, size=8, channels=1, key="", **arrays):
    np.savez(folder / "x.npz", **arrays)
    return load_images(f"npz:{folder / 'x.npz'}{key}", size, channels)


def write_folder(folder, *images):
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    return f"folder:{folder}"


def test_digits():
    digits = load_images("digits", 8, 1)
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.uint8
    # The first row of the first digit holds 0 0 5 13 9 1 0 0 sixteenths.
    assert digits.images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.labels.dtype == np.int64
    assert digits.labels[:10].tolist() == list(range(10))


def test_digits_resized_and_coloured():
    small = load_images("digits", 8, 1).images
    large = load_images("digits", 16, 3).images
    assert large.shape == (1797, 16, 16, 3)
    np.testing.assert_array_equal(large[..., 0], large[..., 1])
    np.testing.assert_array_equal(large[..., 0], large[..., 2])
    # Doubling the side keeps the brightness; the strokes' overshoot is clipped, hence the slack.
    assert large.mean() == pytest.approx(small.mean(), abs=3.0)


def test_npz_uint8(tmp_path):
    images = random_images(5, 8, 8, 3)
    read = load_npz(tmp_path, channels=3, images=images, labels=np.array([4, 3, 2, 1, 0], np.uint8))
    np.testing.assert_array_equal(read.images, images)
    assert read.labels.dtype == np.int64
    assert read.labels.tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_float(dtype, tmp_path):
    levels = random_images(3, 8, 8, 1)
    read = load_npz(tmp_path, images=(levels / 255.0).astype(dtype))
    np.testing.assert_array_equal(read.images, levels)
    assert read.labels is None


def test_npz_float_is_rounded_not_cut_off(tmp_path):
    read = load_npz(
        tmp_path, images=np.full((2, 8, 8), [0, 0.4, 0.6, 9.5001, 9.9, 254.6, 255, 1]) / 255
    )
    assert read.images[0, 0, :, 0].tolist() == [0, 0, 1, 10, 10, 255, 255, 1]


def test_npz_without_channel_axis(tmp_path):
    images = random_images(3, 8, 8)
    np.testing.assert_array_equal(load_npz(tmp_path, x_train=images).images[..., 0], images)


def test_npz_key(tmp_path):
    first, second = random_images(2, 2, 8, 8)
    arrays = {"images": first, "other": second}
    np.testing.assert_array_equal(load_npz(tmp_path, **arrays).images[..., 0], first)
    np.testing.assert_array_equal(load_npz(tmp_path, key=":other", **arrays).images[..., 0], second)


def test_npz_whose_name_holds_a_colon(tmp_path):
    images = random_images(2, 8, 8)
    np.savez(tmp_path / "a:b.npz", images=images)
    for key in ("", ":images"):
        read = load_images(f"npz:{tmp_path / 'a:b.npz'}{key}", 8, 1)
        np.testing.assert_array_equal(read.images[..., 0], images)


def test_labels_that_do_not_fit_are_left_out(tmp_path):
    images = random_images(3, 8, 8)
    assert load_npz(tmp_path, images=images, labels=np.arange(4)).labels is None
    assert load_npz(tmp_path, images=images, labels=np.array([0.5, 1.0, 2.0])).labels is None


def test_resizing_averages_instead_of_skipping_pixels(tmp_path):
    board = np.indices((16, 16)).sum(axis=0) % 2 * np.uint8(255)
    small = load_npz(tmp_path, images=np.stack([board, board]).astype(np.uint8)).images
    assert small.shape == (2, 8, 8, 1)
    # Away from the border every output pixel sees as much white as black.
    assert np.abs(small[:, 2:-2, 2:-2].astype(int) - 128).max() <= 2


@pytest.mark.parametrize("wide", [True, False])
def test_oblong_images_lose_their_margins(wide, tmp_path):
    image = np.full((8, 12), 255, np.uint8)
    image[:, 2:10] = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = image if wide else image.T
    read = load_npz(tmp_path, images=np.stack([image, image])).images[0, ..., 0]
    expected = np.arange(64).reshape(8, 8)
    np.testing.assert_array_equal(read, expected if wide else expected.T)


@pytest.mark.parametrize(
    ("channels", "pixel"),
    [(1, [76]), (2, [76, 255]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])],
)
def test_red_in_every_number_of_channels(channels, pixel, tmp_path):
    red = np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    read = load_npz(tmp_path, channels=channels, images=red)
    assert read.images.shape == (2, 8, 8, channels)
    assert np.unique(read.images.reshape(-1, channels), axis=0).tolist() == [pixel]


def test_folder(tmp_path):
    grey, colour = random_images(8, 8), random_images(8, 8, 3)
    (tmp_path / "sub").mkdir()
    source = write_folder(tmp_path, grey, colour)
    write_folder(tmp_path / "sub", grey)
    (tmp_path / "notes.txt").write_text("not an image")
    read = load_images(source, 8, 3)
    assert read.labels is None
    expected = [np.stack([grey] * 3, axis=-1), colour, np.stack([grey] * 3, axis=-1)]
    np.testing.assert_array_equal(read.images, np.stack(expected))


def test_folder_of_several_sizes(tmp_path):
    source = write_folder(tmp_path, *(np.full((h, w), 77, np.uint8) for h, w in [(8, 8), (20, 9)]))
    np.testing.assert_array_equal(load_images(source, 16, 1).images, np.full((2, 16, 16, 1), 77))


@pytest.mark.parametrize(
    "source", ["", "digit", "digits:x", "npz", "npz:", "folder:", "tfds", "http://x"]
)
def test_unknown_source(source):
    with pytest.raises(InputError, match=r"`data` .*must be digits, npz:FILE"):
        load_images(source, 8, 1)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": np.full((2, 8, 8), np.nan)}, "NaN or infinity in 2 images"),
        ({"images": np.full((2, 8, 8), np.inf)}, "NaN or infinity"),
        ({"images": np.zeros((2, 8, 8), np.int64)}, "dtype int64"),
        ({"images": np.zeros((2, 8, 8), bool)}, "dtype bool"),
        ({"images": np.zeros((2, 8, 8), complex)}, "dtype complex"),
        ({"images": np.zeros((2, 8, 8), "U1")}, "dtype <U1"),
        ({"images": np.zeros((8, 8), np.uint8)}, r"shape \(8, 8\)"),
        ({"images": np.zeros((), np.uint8)}, r"shape \(\)"),
        ({"images": np.zeros((2, 1, 8, 8, 1), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 8, 8, 5), np.uint8)}, r"\(2, 8, 8, 5\)"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 0, 8, 1), np.uint8)}, "shape"),
        ({"images": np.full((2, 8, 8), 1.1)}, r"floats in \[1.1, 1.1\]"),
        ({"images": np.full((2, 8, 8), -0.1)}, r"floats in \[-0.1, -0.1\]"),
        ({"images": np.zeros((1, 8, 8), np.uint8)}, "1 images; at least 2"),
        ({"images": np.array([{}, 1], dtype=object)}, "Object arrays cannot be loaded"),
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, "must name one of .'pictures'."),
    ],
)
def test_bad_npz(arrays, reason, tmp_path):
    with pytest.raises(InputError, match=f"`data` .*{reason}"):
        load_npz(tmp_path, **arrays)


def test_number_of_bad_images_is_told(tmp_path):
    images = np.zeros((5, 8, 8, 3))
    images[1, 2, 3, 0] = images[4, 0, 0, 2] = np.nan
    with pytest.raises(InputError, match="in 2 images"):
        load_npz(tmp_path, channels=3, images=images)


def test_npz_without_that_key(tmp_path):
    with pytest.raises(InputError, match=r"must name one of \['images'\]"):
        load_npz(tmp_path, key=":faces", images=random_images(2, 8, 8))


@pytest.mark.parametrize("content", [b"", b"plain text", b"PK\x03\x04 cut off"])
def test_file_that_is_no_npz(content, tmp_path):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"`data` .*x\.npz.*not a readable"):
        load_images(f"npz:{tmp_path / 'x.npz'}", 8, 1)


def test_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    with pytest.raises(InputError, match="Object arrays"):
        load_npz(tmp_path, images=np.array([Trap(), Trap()], dtype=object))
    assert not (tmp_path / "ran").exists()


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "x.npz", images=random_images(4, 8, 8))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable"):
        load_images(f"npz:{tmp_path / 'x.npz'}", 8, 1)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_missing_source(kind, tmp_path):
    with pytest.raises(InputError, match=r"`data` .*nothing"):
        load_images(f"{kind}:{tmp_path / 'nothing'}", 8, 1)


def test_bad_folder(tmp_path):
    with pytest.raises(InputError, match="0 images"):
        load_images(f"folder:{tmp_path}", 8, 1)
    source = write_folder(tmp_path, random_images(8, 8))
    with pytest.raises(InputError, match="1 images"):
        load_images(source, 8, 1)
    (tmp_path / "junk.png").write_bytes(b"junk")
    with pytest.raises(InputError, match="holds 1 readable images"):
        load_images(source, 8, 1)


def test_npy_instead_of_npz(tmp_path):
    np.save(tmp_path / "x.npy", random_images(2, 8, 8))
    with pytest.raises(InputError, match=r"must be an \.npz archive"):
        load_images(f"npz:{tmp_path / 'x.npy'}", 8, 1)


def test_damaged_compressed_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=random_images(40, 8, 8) // 32)
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(byte ^ 0x5A for byte in content[300:400])
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable"):
        load_images(f"npz:{path}", 8, 1)


def test_16_bit_png_keeps_its_greys(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    read = load_images(write_folder(tmp_path, ramp, ramp), 8, 1)
    assert np.abs(read.images[0, ..., 0].astype(int) - ramp // 257).max() <= 1


def numbered(count):
    """Images whose every pixel is the index of the image."""
    return np.repeat(np.arange(count, dtype=np.uint8), 4).reshape(count, 2, 2, 1)


def batches(images, **changes):
    settings = {"batch_size": 4, "seed": 0, "first_step": 0, "steps": 15, "flip": False}
    return [batch for (batch,) in training_batches(images, **{**settings, **changes})]


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_every_epoch_visits_each_image_once(batch_size):
    visited = [to_uint8(b)[:, 0, 0, 0] for b in batches(numbered(10), batch_size=batch_size)]
    assert {len(rows) for rows in visited} == {batch_size}
    visited = np.concatenate(visited)
    epochs = visited[: len(visited) // 10 * 10].reshape(-1, 10)
    assert len(epochs) >= 1
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(to_uint8(batch)[:, 0, 0, 0])
        for seed in (0, 1)
        for batch in batches(numbered(50), batch_size=50, steps=4, seed=seed)
    ]
    assert len({*orders, tuple(range(50))}) == 9


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("first_step", [1, 2, 7, 14])
def test_resumed_run_sees_the_same_batches(first_step, flip):
    images = random_images(10, 8, 8, 3)
    whole = batches(images, flip=flip)
    resumed = batches(images, flip=flip, first_step=first_step)
    assert len(resumed) == 15 - first_step
    np.testing.assert_array_equal(np.stack(resumed), np.stack(whole[first_step:]))


def test_no_batch_is_left_at_the_end():
    assert batches(numbered(10), first_step=15) == []


def test_values_of_a_batch():
    images = random_images(10, 8, 8, 3)
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    for batch in batches(images):
        assert batch.dtype == np.float32
        assert batch.shape == (4, 8, 8, 3)
        assert (batch.min(), batch.max()) == (-1.0, 1.0)
    known = {image.tobytes() for image in images}
    assert {image.tobytes() for batch in batches(images) for image in to_uint8(batch)} == known


def test_flip_mirrors_about_half_from_left_to_right():
    image = np.zeros((10, 3, 5, 1), np.uint8)
    image[:, 0, 0] = 255
    batch = np.concatenate(batches(image, batch_size=100, steps=20, flip=True))[..., 0]
    left, right = batch[:, 0, 0] == 1.0, batch[:, 0, 4] == 1.0
    assert (left ^ right).all()
    # Five standard errors of a fair coin thrown 2000 times.
    assert abs(right.mean() - 0.5) < 5 * 0.5 / np.sqrt(2000)
    assert ((batch == 1.0).sum(axis=(1, 2)) == 1).all()
    # Each step has coins of its own.
    steps = right.reshape(20, 100)
    assert len({step.tobytes() for step in steps}) == 20


def test_without_flip_nothing_is_mirrored():
    image = np.zeros((10, 3, 5, 1), np.uint8)
    image[:, 0, 0] = 255
    assert (np.concatenate(batches(image))[:, 0, 0] == 1.0).all()
