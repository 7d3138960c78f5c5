"""Image sources: texts such as `folder:DIR`, read one image at a time.

`digits` (inside scikit-learn), `npz:FILE[:KEY]`, `folder:DIR` or `tfds:NAME[:SPLIT]`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np

from ddsm_tf.errors import InputError, invalid, missing_extra
from ddsm_tf.training.progress import announce

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
IMAGE_KEYS = ("images", "x_train", "train_images", "x", "arr_0")
LABEL_KEYS = ("labels", "y_train", "train_labels", "y")
BROKEN_ARCHIVE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, AttributeError)
# So many unreadable files are left out with a warning; more mean that something is wrong.
UNREADABLE_FILES = 10
UNREADABLE_SHARE = 0.01


@dataclass
class Source:
    """An opened source.

    Attributes:
        name: the text that named it.
        count: how many images it announces; unreadable ones among them.
        read: gives each image, a uint8 array (H, W, C) or a Pillow image, with its label or None.
        fingerprint: changes when the images do, as far as can be told without reading them.
        classes: names of the labels, where they have any.
        unreadable: the files that could not be read so far.
    """

    name: str
    count: int
    read: Callable[[], Iterator[tuple[Any, int | None]]]
    fingerprint: str
    classes: tuple[str, ...] = ()
    unreadable: list[str] = field(default_factory=list)


def open_source(name: str) -> Source:
    """Open a source.

    Raises:
        InputError: the text is malformed, or what it names is missing, unreadable or too small.
    """
    kind, _, rest = name.partition(":")
    openers = {"digits": _digits, "npz": _npz, "folder": _folder, "tfds": _tfds}
    if kind not in openers or (kind == "digits") == bool(rest):
        rule = "must be digits, npz:FILE[:KEY], folder:DIR or tfds:NAME[:SPLIT]"
        raise invalid("data", name, rule)
    source = openers[kind](name, rest)
    if source.count < 2:
        raise invalid("data", name, f"holds {source.count} images; at least 2 are needed")
    return source


def _of_arrays(name: str, images: np.ndarray, labels: np.ndarray | None) -> Source:
    def read() -> Iterator[tuple[Any, int | None]]:
        for index, image in enumerate(images):
            yield image, None if labels is None else int(labels[index])

    return Source(name, len(images), read, fingerprint=f"{images.shape}")


def _digits(name: str, _: str) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "demo") from error
    digits = load_digits()
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    return _of_arrays(name, images, digits.target.astype(np.int64))


def _npz(name: str, rest: str) -> Source:
    path, key = _split_key(rest)
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise invalid("data", str(path), "must be an .npz archive")
        with archive:
            key = key or next((name for name in IMAGE_KEYS if name in archive.files), None)
            if key not in archive.files:
                rule = f"must name one of {archive.files}, as npz:FILE:KEY"
                raise invalid("data", f"npz:{rest}", rule)
            images = archive[key]
            label_key = next((name for name in LABEL_KEYS if name in archive.files), None)
            labels = archive[label_key] if label_key else None
    except InputError:
        raise
    except OSError as error:
        raise invalid("data", str(path), f"cannot be read: {error.strerror or error}") from error
    except BROKEN_ARCHIVE as error:
        raise invalid("data", str(path), f"is not a readable .npz archive: {error}") from error
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        labels = None
    images = check_images(images, f"npz:{rest}")
    return _of_arrays(name, images, None if labels is None else labels.astype(np.int64))


def _split_key(rest: str) -> tuple[Path, str | None]:
    """`FILE[:KEY]`; a file whose own name holds a colon wins."""
    if not Path(rest).exists() and ":" in rest:
        path, _, key = rest.rpartition(":")
        return Path(path), key
    return Path(rest), None


def check_images(images: np.ndarray, name: str) -> np.ndarray:
    """uint8 (N, H, W, C) of an array that a user gave.

    Args:
        images: (N, H, W) or (N, H, W, 1 to 4); uint8, or finite floats in [0, 1].
        name: what to call it in an error.

    Raises:
        InputError: another shape, dtype or range, or NaN.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not 1 <= images.shape[-1] <= 4 or 0 in images.shape:
        rule = f"has the shape {images.shape}; it must be (N, H, W) or (N, H, W, 1 to 4)"
        raise invalid("data", name, rule)
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise invalid("data", name, f"has the dtype {images.dtype}; it must be uint8 or float")
    if not np.isfinite(images).all():
        bad = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
        raise invalid("data", name, f"has NaN or infinity in {bad} images")
    if images.min() < 0.0 or images.max() > 1.0:
        rule = f"has floats in [{images.min():g}, {images.max():g}]; they must lie in [0, 1]"
        raise invalid("data", name, rule)
    return np.rint(images * 255.0).astype(np.uint8)


def _folder(name: str, rest: str) -> Source:
    folder = Path(rest)
    if not folder.is_dir():
        raise invalid("data", name, "must name a folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    parts = [file.relative_to(folder).parts for file in files]
    # Folders side by side are classes; images beside them are not.
    names = sorted({part[0] for part in parts})
    labelled = len(names) > 1 and all(len(part) > 1 for part in parts)
    labels = [names.index(part[0]) if labelled else None for part in parts]
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())

    def read() -> Iterator[tuple[Any, int | None]]:
        source.unreadable.clear()
        for file, label in zip(files, labels, strict=True):
            image = _open_image(file)
            if image is None:
                source.unreadable.append(str(file.relative_to(folder)))
                _check_unreadable(source)
            else:
                yield image, label

    classes = tuple(names) if labelled else ()
    source = Source(name, len(files), read, digest.hexdigest(), classes)
    return source


def _open_image(file: Path) -> Any:
    """The upright image of a file, or None if there is none in it."""
    Image = pillow()
    from PIL import ImageOps

    try:
        with Image.open(file) as image:
            image.load()
            # Cameras store how they were held; a picture of the pixels alone lies on its side.
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _check_unreadable(source: Source) -> None:
    count = len(source.unreadable)
    if count > max(UNREADABLE_FILES, UNREADABLE_SHARE * source.count) or count == source.count:
        rule = (
            f"has {count} unreadable files among the first of {source.count}, such as "
            f"{source.unreadable[0]}; mend or remove them"
        )
        raise invalid("data", source.name, rule)


def _tfds(name: str, rest: str) -> Source:
    dataset, _, split = rest.partition(":")
    split = split or "train"
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise missing_extra("tensorflow-datasets", "train") from error
    try:
        # TFDS itself reads the variable once, when it is imported.
        builder = tfds.builder(dataset, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except Exception as error:  # TFDS raises as many types as it has builders
        raise invalid("data", name, f"is no data set of TFDS: {_first_line(error)}") from error
    try:
        if not builder.is_prepared():
            _check_reachable(builder)
            announce(f"preparing {dataset} in {builder.data_dir}")
        builder.download_and_prepare()
        count = int(builder.as_dataset(split=split).cardinality())
    except Exception as error:
        raise invalid("data", name, _how_to_get(builder, dataset, error)) from error
    if "image" not in builder.info.features:
        found = ", ".join(builder.info.features)
        raise invalid("data", name, f"has no feature `image`; it has {found}")
    # No dictionary: it has no `get`.
    label = builder.info.features["label"] if "label" in set(builder.info.features) else None
    classes = tuple(map(str, getattr(label, "names", None) or ()))

    def read() -> Iterator[tuple[Any, int | None]]:
        for example in tfds.as_numpy(builder.as_dataset(split=split)):
            known = example.get("label")
            yield example["image"], None if known is None else int(known)

    fingerprint = f"{builder.info.full_name} {split} {count}"
    return Source(name, count, read, fingerprint, classes)


def _check_reachable(builder: Any) -> None:
    """`OSError` where TFDS has downloaded nothing yet and no host of its files has an address.

    TFDS itself would try for three minutes before it says so.
    """
    downloads = Path(builder._data_dir_root, "downloads")
    hosts = sorted({urlsplit(url).hostname or "" for url in builder.url_infos})
    # A proxy resolves names by itself.
    if not hosts or getproxies() or any(file.is_file() for file in downloads.rglob("*")):
        return
    for host in hosts:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            return
    raise OSError(f"no network: {hosts[0]} has no address")


def _how_to_get(builder: Any, dataset: str, error: Exception) -> str:
    """What to download and where to put it, for a machine without a network."""
    folder = Path(builder.data_dir)
    manual = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    by_hand = ""
    if manual:
        place = Path(builder._data_dir_root, "downloads", "manual")
        by_hand = f"; put what its page names into {place}: {' '.join(manual.split())[:200]}"
    return (
        f"cannot be prepared ({_first_line(error)}); run `tfds build {dataset}` where there is a "
        f"network and copy the result to {folder}{by_hand}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def pillow() -> Any:
    """Pillow's `Image`; `MissingExtraError` without it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("Pillow", "train") from error
    return Image
