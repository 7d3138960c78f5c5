"""Sources as users have them: odd files, classes, TFDS; sets too large for memory; `ddsm data`."""

import json
import socket
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from ddsm_tf.errors import InputError
from ddsm_tf.training import data as data_module
from ddsm_tf.training import sources
from ddsm_tf.training.data import Rows, check_classes, load_images, split_images
from ddsm_tf.training.pipeline import (
    TrainingBatches,
    _ahead,
    training_batches,
    training_pipeline,
)
from ddsm_tf.training.sources import UNREADABLE_FILES, open_source


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


@pytest.fixture
def odd_folder(tmp_path):
    """Every kind of file that people's folders hold, in two classes."""
    random = np.random.default_rng(0)
    folder = tmp_path / "images"
    save(folder / "cats" / "deep" / "grey.png", random.integers(0, 256, (20, 30)))
    save(folder / "cats" / "alpha.png", random.integers(0, 256, (16, 16, 4)))
    turned = np.zeros((16, 32, 3))
    turned[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: white comes to the top
    save(folder / "dogs" / "turned.jpg", turned, exif=exif, quality=95)
    palette = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).convert("P")
    palette.save(folder / "dogs" / "palette.gif")
    (folder / "dogs" / "notes.txt").write_text("no image")
    whole = folder / "dogs" / "whole.png"
    save(whole, random.integers(0, 256, (40, 40, 3)))
    (folder / "dogs" / "cut.png").write_bytes(whole.read_bytes()[:300])
    (folder / "cats" / "empty.png").write_bytes(b"")
    return folder


def test_odd_files_are_read_and_broken_ones_named(odd_folder, capsys):
    found = load_images(f"folder:{odd_folder}", 16, 3)
    assert found.images.shape == (5, 16, 16, 3)
    # alpha, deep/grey; palette, turned, whole.
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    warning = capsys.readouterr().err
    assert "2 unreadable files are left out: cats/empty.png, dogs/cut.png" in warning
    # Upright, the white half is at the top, and the square's crop keeps the middle.
    upright = found.images[3].astype(float)
    assert upright[:6].mean() > 240 and upright[-6:].mean() < 15


def test_too_many_broken_files_are_an_error(tmp_path):
    for index in range(4):
        save(tmp_path / f"good_{index}.png", np.zeros((8, 8)))
    for index in range(UNREADABLE_FILES + 1):
        (tmp_path / f"bad_{index:02d}.png").write_bytes(b"bad")
        if index < UNREADABLE_FILES:
            continue
        with pytest.raises(InputError, match=r"has 11 unreadable files.*bad_00\.png"):
            load_images(f"folder:{tmp_path}", 8, 1)
    (tmp_path / "bad_00.png").unlink()
    assert len(load_images(f"folder:{tmp_path}", 8, 1).images) == 4


def test_images_beside_folders_have_no_classes(odd_folder):
    save(odd_folder / "other.png", np.zeros((8, 8)))
    assert load_images(f"folder:{odd_folder}", 8, 1).labels is None


def test_classes_must_fit_the_labels(odd_folder):
    images = load_images(f"folder:{odd_folder}", 8, 1)
    check_classes(images, "x", 2)
    with pytest.raises(InputError, match=r"`num_classes` \(=1\).*from 0 to 1"):
        check_classes(images, "x", 1)
    with pytest.raises(InputError, match="has no labels"):
        check_classes(data_module.ImageSet(images.images, None), "x", 2)


def test_large_sets_are_mapped_and_read_once(odd_folder, tmp_path, monkeypatch):
    in_memory = load_images(f"folder:{odd_folder}", 8, 3)
    monkeypatch.setattr(data_module, "MEMORY_BYTES", 100)
    cache = tmp_path / "cache"
    mapped = load_images(f"folder:{odd_folder}", 8, 3, cache)
    assert isinstance(mapped.images, np.memmap)
    np.testing.assert_array_equal(mapped.images, in_memory.images)
    assert mapped.labels.tolist() == in_memory.labels.tolist()
    monkeypatch.setattr(data_module, "fit_image", None)
    again = load_images(f"folder:{odd_folder}", 8, 3, cache)
    np.testing.assert_array_equal(again.images, in_memory.images)
    training, held_out = split_images(again, 1, seed=0)
    assert isinstance(training.images, Rows) or len(training.images) == 5
    assert len(training.images) + len(held_out.images) == 5
    monkeypatch.undo()
    monkeypatch.setattr(data_module, "MEMORY_BYTES", 100)
    save(odd_folder / "dogs" / "new.png", np.zeros((8, 8)))
    # Another file makes it another set.
    assert len(load_images(f"folder:{odd_folder}", 8, 3, cache).images) == 6


def test_a_worker_takes_the_set_that_another_has_written_meanwhile(
    odd_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(data_module, "MEMORY_BYTES", 100)
    write = data_module._write_cache

    def second(source, size, channels, folder):
        if not folder.exists():
            write(source, size, channels, folder)
        write(source, size, channels, folder)

    monkeypatch.setattr(data_module, "_write_cache", second)
    assert len(load_images(f"folder:{odd_folder}", 8, 3, tmp_path / "cache").images) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_rows_are_those_of_the_array(tmp_path):
    array = np.arange(60).reshape(10, 3, 2)
    rows = Rows(array, np.array([7, 2, 5]))
    assert (len(rows), rows.shape) == (3, (3, 3, 2))
    np.testing.assert_array_equal(rows[np.array([2, 0])], array[[5, 7]])
    np.testing.assert_array_equal(rows[1:], array[[2, 5]])
    np.testing.assert_array_equal(np.asarray(rows), array[[7, 2, 5]])


# Batches ----------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 1), dtype=np.uint8)
LABELS = np.arange(23)
OPTIONS = {"batch_size": 6, "seed": 3, "flip": True, "labels": LABELS}


def same(first, second):
    for a, b in zip(first, second, strict=True):
        for x, y in zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("labels", [LABELS, None])
def test_pipelines_give_the_same_batches(labels):
    options = {**OPTIONS, "labels": labels}
    plain = list(training_batches(IMAGES, first_step=2, steps=12, **options))
    dataset = training_pipeline(IMAGES, first_step=2, steps=12, **options)
    assert isinstance(dataset, tf.data.Dataset)
    same(plain, dataset)
    same(plain, _ahead(iter(plain)))
    shape = tf.nest.flatten(dataset.element_spec)[0].shape
    assert shape.as_list() == [6, 4, 4, 1]


def test_labels_stay_with_their_images():
    for ((images, labels),) in training_batches(IMAGES, first_step=0, steps=8, **OPTIONS):
        assert labels.dtype == np.int32
        for image, label in zip(images, labels, strict=True):
            own = IMAGES[label].astype(np.float32) / 127.5 - 1
            assert np.array_equal(image, own) or np.array_equal(image, own[:, ::-1])


def test_workers_share_each_batch():
    whole = TrainingBatches(IMAGES, **OPTIONS)
    parts = [TrainingBatches(IMAGES, **OPTIONS, shard=(index, 3)) for index in range(3)]
    for step in (0, 3, 11):
        images, labels = whole(step)
        np.testing.assert_array_equal(np.concatenate([p(step)[0] for p in parts]), images)
        np.testing.assert_array_equal(np.concatenate([p(step)[1] for p in parts]), labels)
    with pytest.raises(InputError, match=r"`batch_size` \(=6\).*4 workers"):
        TrainingBatches(IMAGES, **OPTIONS, shard=(0, 4))


def test_an_error_in_the_thread_reaches_the_consumer():
    def broken():
        yield (1,)
        raise OSError("disk gone")

    batches = _ahead(broken())
    assert next(batches) == (1,)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


# TFDS -------------------------------------------------------------------------------------------


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Three labelled images of a known grey."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": tfds.features.ClassLabel(names=["dark", "bright"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, grey in enumerate((10, 200, 60)):
            image = np.full((8, 8, 3), grey, np.uint8)
            yield index, {"image": image, "label": int(grey > 100)}


def test_a_real_local_builder(tmp_path, monkeypatch):
    TinyImages(data_dir=tmp_path).download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    found = load_images("tfds:tiny_images:train", 8, 3)
    greys = found.images.mean(axis=(1, 2, 3))
    assert sorted(zip(greys, found.labels.tolist(), strict=True)) == [(10, 0), (60, 0), (200, 1)]
    assert open_source("tfds:tiny_images").classes == ("dark", "bright")
    with pytest.raises(InputError, match="cannot be prepared"):
        open_source("tfds:tiny_images:test")


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("cifar10", (32, 32, 3), 10),
        ("celeb_a_hq/64", (64, 64, 3), None),
        ("lsun/bedroom", None, None),
        ("imagenet_resized/64x64", (64, 64, 3), 1000),
    ],
)
def test_data_sets_of_the_presets(name, shape, classes, monkeypatch):
    # Mock data need no network.
    monkeypatch.setattr(sources, "_check_reachable", lambda builder: None)
    with tfds.testing.mock_data(num_examples=3):
        images = load_images(f"tfds:{name}:train", 16, 3)
    assert images.images.shape == (3, 16, 16, 3)
    if classes is not None:
        check_classes(images, name, classes)
    builder = tfds.builder(name)
    if shape:
        assert builder.info.features["image"].shape == shape


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cifar10", ["www.cs.toronto.edu has no address", "tfds build cifar10", "cifar10"]),
        ("celeb_a_hq/64", ["tfds build celeb_a_hq/64", "downloads/manual", "celeb_a_hq"]),
    ],
)
def test_without_a_network_it_says_what_to_get(name, parts, tmp_path, monkeypatch):
    def no_address(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        open_source(f"tfds:{name}")
    # TFDS itself tries for minutes.
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert "\n" not in text
    for part in [*parts, str(tmp_path)]:
        assert part in text


# ddsm data --------------------------------------------------------------------------------------


def test_data_command(odd_folder, tmp_path, run_here):
    source, picture = f"folder:{odd_folder}", tmp_path / "grid.png"
    done = run_here("data", source, "--json", "-o", picture)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == 5
    assert found["widths"] == [9, 16, 40]
    assert found["heights"] == [9, 20, 40]
    assert found["modes"] == {"RGB": 2, "RGBA": 1, "L": 1, "P": 1}
    assert found["labels"] == {"cats": 2, "dogs": 3}
    assert found["unreadable"] == 2
    assert found["unreadable_files"] == ["cats/empty.png", "dogs/cut.png"]
    with Image.open(picture) as image:
        # Five images of 9 pixels, 3 a row, enlarged.
        assert image.size == (5 * (3 * 10 - 1), 5 * (2 * 10 - 1))
    assert "cats" in run_here("data", source).stdout


def test_data_command_on_known_values(tmp_path, run_here):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    images[2:] = 200
    np.savez(tmp_path / "x.npz", images=images)
    found = json.loads(run_here("data", f"npz:{tmp_path / 'x.npz'}", "--json").stdout)
    assert (found["mean"], found["standard_deviation"]) == (100.0, 100.0)
    assert found["range"] == [0, 200] and found["labels"] is None
    bad = run_here("data", "npz:missing.npz")
    assert bad.returncode == 2 and "missing.npz" in bad.stderr
    assert run_here("data", "digits", "-o", "x.jpg").returncode == 2
