"""The bundle that `ddsm-edge` samples from: the widest network, recipes for the others, a manifest.

See `ddsm_tf.edge.manifest` and `ddsm_tf.edge.assembly` for the formats. The same input gives the
same bytes: nothing in a bundle tells when or where it was written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddsm_tf.cost import macs_per_width
from ddsm_tf.edge.assembly import Recipe
from ddsm_tf.edge.manifest import (
    DEFAULT,
    FORMAT,
    MANIFEST,
    VERSION,
    check_provenance,
    parse_manifest,
    sealed,
)
from ddsm_tf.errors import InputError
from ddsm_tf.export.slices import make_recipe
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule

DECODER_FILE = "decoder.tflite"


class TFLiteDecoder(NamedTuple):
    """What turns latents into images on a device.

    Attributes:
        content: a TFLite file, latents → images in [-1, 1], float32, with the networks' batch.
        image_shape: (H, W, C).
    """

    content: bytes
    image_shape: tuple[int, int, int]


def write_bundle(
    folder: Path,
    files: Mapping[float, str],
    unet: Any,
    noise_table: NoiseTable,
    schedules: Mapping[str, StepSchedule],
    *,
    quantize: str = "none",
    batch: int | None = None,
    decoder: TFLiteDecoder | None = None,
    provenance: Mapping[str, str | int | float] | None = None,
) -> None:
    """Turn a folder of plain TFLite files into a bundle.

    A narrow network becomes a recipe where that is smaller than its file: always in float32 and
    float16, whose weights are slices of the widest network's.

    Args:
        folder: holds `files` and nothing else.
        files: width → file name.
        unet: the `SlimmableUNet` that the files were converted from.
        noise_table: the forward process.
        schedules: name → schedule; "default" must be there.
        quantize: how the files were quantised.
        batch: images that the networks take at once; None for any number.
        decoder: of a model of latents.
        provenance: what else the manifest should say of where the weights come from.

    Raises:
        InputError: a name or a note breaks its rule.
    """
    macs = macs_per_width(unet)
    networks = {w: _describe(folder / name, macs[w]) for w, name in files.items()}
    widest = files[max(files)]
    stored = {w: _store(folder, name, widest, unet, w) for w, name in files.items()}
    for width in files:
        if stored[width] != files[width]:
            networks[width]["slices_of"] = widest
    names = sorted(stored.values())
    if decoder is not None:
        (folder / DECODER_FILE).write_bytes(decoder.content)
        names.append(DECODER_FILE)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "image_shape": list(unet.image_shape),
        "num_classes": unet.num_classes,
        "decoder": decoder and {"file": DECODER_FILE, "image_shape": list(decoder.image_shape)},
        "value_range": [-1.0, 1.0],
        "quantize": quantize,
        "batch": batch,
        "widths": {str(width): name for width, name in stored.items()},
        "networks": {str(width): network for width, network in networks.items()},
        "bytes": {name: (folder / name).stat().st_size for name in names},
        "sha256": {name: _sha256((folder / name).read_bytes()) for name in names},
        "provenance": provenance_of(unet, provenance or {}),
        "schedule": schedules[DEFAULT].to_dict(),
        "schedules": {k: v.to_dict() for k, v in schedules.items() if k != DEFAULT},
        "noise_table": noise_table.to_dict(),
    }
    content = sealed(manifest)
    # What the reader would refuse must not be written.
    parse_manifest(content)
    (folder / MANIFEST).write_bytes(content)


def provenance_of(
    unet: Any, notes: Mapping[str, str | int | float]
) -> dict[str, str | int | float]:
    """What a manifest says of where the weights come from: versions, their digest and `notes`.

    Raises:
        InputError: a note breaks its rule.
    """
    versions = {
        name: importlib.metadata.version(name) for name in ("ddsm_tf", "tensorflow", "keras")
    }
    return check_provenance({**versions, "weights_sha256": weights_sha256(unet), **notes})


def weights_sha256(unet: Any) -> str:
    """SHA-256 over the shape and float32 values of every weight, in the network's order."""
    digest = hashlib.sha256()
    for weight in unet.weights:
        value = np.ascontiguousarray(weight, "<f4")
        digest.update(str(value.shape).encode("ascii"))
        digest.update(value)
    return digest.hexdigest()


def _describe(path: Path, macs: int) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": _sha256(content), "macs": macs}


def _store(folder: Path, name: str, widest: str, unet: Any, width: float) -> str:
    """Replace a narrow file by its recipe if that is smaller; returns the file's name."""
    if name == widest:
        return name
    narrow, wide = (folder / name).read_bytes(), (folder / widest).read_bytes()
    data = make_recipe(narrow, wide, unet, width).to_bytes()
    if len(data) >= len(narrow) or not _gives(data, narrow, wide):
        return name
    path = (folder / name).with_suffix(".slices")
    path.write_bytes(data)
    (folder / name).unlink()
    return path.name


def _gives(data: bytes, narrow: bytes, wide: bytes) -> bool:
    """Whether a device would assemble exactly the narrow file."""
    sizes = {"network_bytes": len(narrow), "source_bytes": len(wide)}
    try:
        return Recipe.from_bytes(data, **sizes).assemble(io.BytesIO(wide)) == narrow
    except InputError:
        return False


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
