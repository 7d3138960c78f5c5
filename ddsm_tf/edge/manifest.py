"""`manifest.json`: what a bundle holds, and the digests that vouch for it.

Version 3 is a JSON object with these keys:

- `format` "ddsm-bundle", `version` 3;
- `image_shape` [H, W, C] of what the networks denoise; `num_classes`, 0 where they take no labels;
- `decoder`: null, or {"file", "image_shape"} of what turns latents into images;
- `value_range` [-1.0, 1.0] of images, `quantize` (how weights were quantised);
- `batch`: null where networks take any number of images, N where they take N and no other;
- `noise_table`: {"betas": [...]}, the forward process, and what the networks put out if not noise
  ("prediction", "data_std"; see `ddsm_tf.noise`);
- `schedule`: the default step schedule, as in `schedule.json`; `schedules`: further ones by name;
- `widths`: width → file, a `.tflite` file or a `.slices` recipe (see `ddsm_tf.edge.assembly`);
- `networks`: width → {"bytes", "sha256", "macs"} of the plain TFLite file, and "slices_of", the
  file of the widest network, where `widths` names a recipe;
- `bytes`, `sha256`: of every file in the folder but the manifest;
- `provenance`: texts and numbers that say where the weights come from;
- `manifest_sha256`: the SHA-256 of the manifest itself with these 64 digits replaced by zeros.

There were versions 1 and 2 before any release; they are not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddsm_tf.edge.files import MAX_FILE_BYTES, StoredFile
from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys
from ddsm_tf.labels import MAX_CLASSES, check_conditional
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, parse_width

FORMAT = "ddsm-bundle"
VERSION = 3
MANIFEST = "manifest.json"
DEFAULT = "default"
# The noise table and schedules of 100,000 timesteps take about 4 MB; parsing, 25 times as much.
MAX_MANIFEST_BYTES = 8 * 2**20
MAX_WIDTHS = 64
MAX_IMAGE_VALUES = 2**24
MAX_NOTES = 64
MAX_TEXT = 200
NO_DIGEST = "0" * 64

_KEYS = {"image_shape", "value_range", "quantize", "batch", "noise_table", "schedule", "schedules"}
_KEYS |= {"num_classes", "decoder", "widths", "networks", "bytes", "sha256", "provenance"}
_KEYS |= {"manifest_sha256"}

# A name that means the same on every system: no folder, no hidden file, no other alphabet.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredNetwork:
    """The network of one width.

    Attributes:
        width: in (0, 1].
        file: how it is stored: a TFLite file or a recipe.
        plain: size and digest of its TFLite file; the same as `file` where that is stored.
        slices_of: the file of the widest network, which the recipe `file` takes slices of; None for
            a TFLite file.
        macs: multiply-accumulates of one image.
    """

    width: float
    file: StoredFile
    plain: StoredFile
    slices_of: StoredFile | None
    macs: int


@dataclass(frozen=True)
class StoredDecoder:
    """What turns latents into images.

    Attributes:
        file: a TFLite file.
        image_shape: (H, W, C) of the images.
    """

    file: StoredFile
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Manifest:
    """A manifest that keeps the rules; see the module's description.

    Attributes:
        image_shape: (H, W, C) of what the networks denoise.
        num_classes: 0 where they take no labels.
        decoder: None where they denoise images.
        quantize: how the networks were quantised.
        batch: images that the networks take at once; None for any number.
        noise_table: the forward process.
        schedules: name → schedule; "default" is always there.
        networks: width → its network, widest first.
        files: name → size and digest of every file but the manifest.
        provenance: where the weights come from, for people to read.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    decoder: StoredDecoder | None
    quantize: str
    batch: int | None
    noise_table: NoiseTable
    schedules: Mapping[str, StepSchedule]
    files: Mapping[str, StoredFile]
    networks: Mapping[float, StoredNetwork]
    provenance: Mapping[str, str | int | float]


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The text of a manifest, with its own digest as the last key."""
    content = {**manifest, "manifest_sha256": NO_DIGEST}
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=True) + "\n"
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    return text.replace(NO_DIGEST, digest).encode("ascii")


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        InputError: it is broken, of an unknown version, or breaks a rule.
    """
    value = _load(data)
    try:
        fields = check_keys(value, format=FORMAT, version=VERSION, required=_KEYS)
        _check_seal(data, fields["manifest_sha256"])
        return _manifest(fields)
    # Values may be nested so deep that an error message cannot show them.
    except RecursionError as error:
        raise invalid("manifest", MANIFEST, "is nested too deeply") from error


def _load(data: bytes) -> Any:
    try:
        return json.loads(
            data.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_without_repeats
        )
    # ValueError: broken JSON or UTF-8, NaN, or more digits than Python turns into a number.
    except (ValueError, RecursionError) as error:
        raise invalid("manifest", MANIFEST, f"is not valid JSON: {error}") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write a finite number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers disagree about which of two equal keys counts.
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


def _check_seal(data: bytes, digest: Any) -> None:
    digest = _check_digest("manifest_sha256", digest)
    unsealed = data.replace(digest.encode("ascii"), NO_DIGEST.encode("ascii"))
    if hashlib.sha256(unsealed).hexdigest() != digest:
        rule = "is not that of the manifest; export or copy the bundle again"
        raise invalid("manifest_sha256", digest, rule)


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    widths = _widths(fields["widths"])
    decoder = _decoder_name(fields["decoder"])
    if decoder in widths.values():
        raise invalid("decoder", decoder, "is the file of a width")
    files = _files(fields, {*widths.values(), *([decoder] if decoder else [])})
    if fields["value_range"] != [-1.0, 1.0]:
        raise invalid("value_range", fields["value_range"], "must be [-1.0, 1.0]")
    manifest = Manifest(
        image_shape=_image_shape(fields["image_shape"]),
        num_classes=_num_classes(fields["num_classes"]),
        decoder=_decoder(fields["decoder"], files),
        quantize=_text("quantize", fields["quantize"]),
        batch=_batch(fields["batch"]),
        noise_table=_noise_table(fields["noise_table"]),
        schedules=_schedules(fields["schedule"], fields["schedules"]),
        files=files,
        networks=_networks(fields["networks"], widths, files),
        provenance=check_provenance(fields["provenance"]),
    )
    for schedule in manifest.schedules.values():
        schedule.check_model(manifest.networks, manifest.noise_table.train_timesteps)
        check_conditional(schedule.guidance_scale, manifest.num_classes)
    return manifest


def _widths(value: Any) -> dict[float, str]:
    """Width → file name, widest first."""
    if not isinstance(value, Mapping) or not 1 <= len(value) <= MAX_WIDTHS:
        raise invalid("widths", value, f"must map 1 to {MAX_WIDTHS} widths to file names")
    names: dict[float, str] = {}
    for text, name in value.items():
        width = parse_width(text)
        if width in names:
            raise invalid("widths", text, "must not repeat")
        names[width] = _file_name("widths", name)
    return dict(sorted(names.items(), reverse=True))


def _file_name(argument: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == MANIFEST:
        raise invalid(argument, name, "must be the name of a file in the bundle's folder")
    return name


def _decoder_name(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or set(value) != {"file", "image_shape"}:
        raise invalid("decoder", value, "must be null or have the keys 'file' and 'image_shape'")
    return _file_name("decoder", value["file"])


def _decoder(value: Any, files: Mapping[str, StoredFile]) -> StoredDecoder | None:
    if value is None:
        return None
    return StoredDecoder(files[value["file"]], _image_shape(value["image_shape"]))


def _num_classes(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_CLASSES:
        raise invalid("num_classes", value, f"must be an integer in [0, {MAX_CLASSES}]")
    return value


def _networks(
    value: Any, widths: Mapping[float, str], files: Mapping[str, StoredFile]
) -> dict[float, StoredNetwork]:
    value = value if isinstance(value, Mapping) else {}
    entries = {parse_width(text): entry for text, entry in value.items()}
    if set(entries) != set(widths) or len(entries) < len(value):
        raise InputError(f"`networks` must have one entry for each of the widths {list(widths)}")
    widest = files[widths[max(widths)]]
    return {w: _network(w, files[name], entries[w], widest) for w, name in widths.items()}


def _network(width: float, file: StoredFile, entry: Any, widest: StoredFile) -> StoredNetwork:
    keys = {"bytes", "sha256", "macs"}
    if not isinstance(entry, Mapping) or not keys <= set(entry) <= keys | {"slices_of"}:
        raise invalid("networks", entry, f"must have the keys {sorted(keys)}")
    digest = _check_digest("sha256", entry["sha256"])
    plain = StoredFile(file.name, _size(entry["bytes"]), digest)
    macs = entry["macs"]
    if type(macs) is not int or not 1 <= macs < 2**63:
        raise invalid("macs", macs, "must be an integer of at least 1")
    if "slices_of" not in entry:
        if plain != file:
            raise invalid("networks", file.name, "has another size or digest than its file")
        return StoredNetwork(width, file, file, None, macs)
    if entry["slices_of"] != widest.name or file == widest:
        raise invalid("slices_of", entry["slices_of"], f"must be {widest.name!r}")
    return StoredNetwork(width, file, plain, widest, macs)


def _schedules(default: Any, further: Any) -> dict[str, StepSchedule]:
    if not isinstance(further, Mapping) or DEFAULT in further:
        raise InputError(f"`schedules` must map names other than {DEFAULT!r} to schedules")
    values = {DEFAULT: default, **further}
    return {check_name(name): StepSchedule.from_dict(value) for name, value in values.items()}


def check_name(name: str) -> str:
    """A schedule's name, if it is letters, digits, `_`, `.` or `-`; else `InputError`."""
    if not _NAME.fullmatch(name):
        raise invalid("schedules", name, "must be named with letters, digits, `_`, `.` or `-`")
    return name


def _noise_table(value: Any) -> NoiseTable:
    table = NoiseTable.from_dict(value)
    # Numbers of β may be so near to 0 or 1 that a step would divide by zero.
    if not table.alphas_cumprod[0] < 1.0 or not table.alphas_cumprod[-1] > 0.0:
        raise InputError("`betas` must have products of 1 - β within (0, 1)")
    return table


def check_provenance(value: Any) -> dict[str, str | int | float]:
    """Notes of a manifest, if they are few, short and printable; else `InputError`."""
    if not isinstance(value, Mapping) or len(value) > MAX_NOTES:
        raise InputError(f"`provenance` must be an object with at most {MAX_NOTES} entries")
    return {_text("provenance", key): _note(key, entry) for key, entry in value.items()}


def _note(key: str, value: Any) -> str | int | float:
    if type(value) is int and abs(value) < 2**63:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    return _text(f"provenance.{key}", value)


def _text(argument: str, value: Any) -> str:
    # Printable: a text from a stranger's file ends up on a terminal.
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        rule = f"must be a printable text of at most {MAX_TEXT} characters"
        raise invalid(argument, value, rule)
    return value


def _batch(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not 1 <= value <= 65_536):
        raise invalid("batch", value, "must be null or an integer in [1, 65536]")
    return value


def _image_shape(value: Any) -> tuple[int, int, int]:
    is_shape = isinstance(value, list) and len(value) == 3
    if not is_shape or not all(type(side) is int and side >= 1 for side in value):
        raise invalid("image_shape", value, "must be [height, width, channels]")
    if math.prod(value) > MAX_IMAGE_VALUES:
        raise invalid("image_shape", value, f"must have at most {MAX_IMAGE_VALUES} values")
    return tuple(value)


def _files(fields: Mapping[str, Any], names: set[str]) -> dict[str, StoredFile]:
    digests = _mapping("sha256", fields["sha256"], names)
    sizes = _mapping("bytes", fields["bytes"], names)
    return {
        name: StoredFile(name, _size(sizes[name]), _check_digest("sha256", digests[name]))
        for name in sorted(names)
    }


def _mapping(argument: str, value: Any, names: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or set(value) != names:
        raise InputError(f"`{argument}` must have one entry for each of {sorted(names)}")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_FILE_BYTES:
        raise invalid("bytes", value, f"must be an integer in [0, {MAX_FILE_BYTES}]")
    return value


def _check_digest(argument: str, value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise invalid(argument, value, "must be 64 hexadecimal digits")
    return value
