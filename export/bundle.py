"""The bundle that `ddsm-edge` samples from: TFLite files and one manifest that vouches for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ddsm_tf.edge.bundle import FORMAT, MANIFEST, VERSION, sha256_of
from ddsm_tf.files import write_json
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule


def write_manifest(
    folder: Path,
    files: Mapping[float, str],
    image_shape: tuple[int, int, int],
    noise_table: NoiseTable,
    schedule: StepSchedule,
    quantize: str,
    batch: int | None = None,
) -> None:
    """Write `manifest.json` beside the files.

    Args:
        folder: holds `files`.
        files: width → file name.
        image_shape: (H, W, C).
        noise_table: the forward process.
        schedule: the default schedule.
        quantize: how the files were quantised.
        batch: images that the files take at once; None for any number.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "image_shape": list(image_shape),
        "value_range": [-1.0, 1.0],
        "quantize": quantize,
        "batch": batch,
        "noise_table": noise_table.to_dict(),
        "schedule": schedule.to_dict(),
        "widths": {str(width): name for width, name in files.items()},
        "sha256": {name: sha256_of(folder / name) for name in files.values()},
    }
    write_json(folder / MANIFEST, manifest)
