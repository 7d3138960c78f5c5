"""The bundle: a folder with `manifest.json` and one TFLite file a width."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys, read_json
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, parse_width

FORMAT = "ddsm-bundle"
VERSION = 1
MANIFEST = "manifest.json"

_KEYS = {
    "image_shape",
    "value_range",
    "quantize",
    "batch",
    "noise_table",
    "schedule",
    "widths",
    "sha256",
}


@dataclass(frozen=True)
class Bundle:
    """What a device needs to sample.

    Attributes:
        folder: where the files lie.
        image_shape: (H, W, C).
        noise_table: the forward process.
        schedule: the default schedule.
        files: width → path of its TFLite file, widest first.
        quantize: how the files were quantised.
    """

    folder: Path
    image_shape: tuple[int, int, int]
    noise_table: NoiseTable
    schedule: StepSchedule
    files: Mapping[float, Path]
    quantize: str

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Bundle:
        """Read a bundle and check every file against the manifest.

        Raises:
            InputError: the manifest is missing or breaks a rule, a file is missing, or a file is
                not the one the manifest was written for.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise invalid(
                "BUNDLE", str(folder), "must be a folder made by `ddsm export RUN bundle`"
            )
        manifest = read_json(folder / MANIFEST, argument="manifest")
        try:
            bundle = _parse(folder, manifest)
            _check_files(bundle, manifest["sha256"])
        except InputError as error:
            raise InputError(f"bundle {folder}: {error}") from error
        return bundle


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(folder: Path, manifest: Any) -> Bundle:
    check_keys(manifest, format=FORMAT, version=VERSION, required=_KEYS)
    if manifest["value_range"] != [-1.0, 1.0]:
        raise invalid("value_range", manifest["value_range"], "must be [-1.0, 1.0]")
    if not isinstance(manifest["quantize"], str):
        raise invalid("quantize", manifest["quantize"], "must be a text")
    noise_table = NoiseTable.from_dict(manifest["noise_table"])
    schedule = StepSchedule.from_dict(manifest["schedule"])
    files = _files(folder, manifest["widths"])
    schedule.check_model(files, noise_table.train_timesteps)
    return Bundle(
        folder,
        _image_shape(manifest["image_shape"]),
        noise_table,
        schedule,
        files,
        manifest["quantize"],
    )


def _image_shape(value: Any) -> tuple[int, int, int]:
    is_shape = isinstance(value, list) and len(value) == 3
    if not is_shape or not all(type(side) is int and 1 <= side <= 65_536 for side in value):
        raise invalid("image_shape", value, "must be [height, width, channels]")
    return tuple(value)


def _files(folder: Path, widths: Any) -> dict[float, Path]:
    if not isinstance(widths, Mapping) or not widths:
        raise invalid("widths", widths, "must map widths to file names")
    files = {}
    for text, name in widths.items():
        # A name with a folder in it could point anywhere on the device.
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise invalid("widths", name, "must be the name of a file in the bundle's folder")
        files[parse_width(text)] = folder / name
    return dict(sorted(files.items(), reverse=True))


def _check_files(bundle: Bundle, digests: Any) -> None:
    names = {path.name for path in bundle.files.values()}
    if not isinstance(digests, Mapping) or set(digests) != names:
        raise InputError(f"`sha256` must have one entry for each of {sorted(names)}")
    for path in bundle.files.values():
        if not path.is_file():
            raise invalid("file", path.name, "is missing; export the bundle again")
        if sha256_of(path) != digests[path.name]:
            rule = "is not the file the manifest was written for; export or copy the bundle again"
            raise invalid("file", path.name, rule)
