"""Exports of a slimmable UNet: one plain network a width, as SavedModel, TFLite or a bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_folder
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule

KINDS = ("savedmodel", "tflite", "bundle")
QUANTIZE = ("none", "float16", "dynamic", "dynamic-mixed", "int8", "int8-mixed")


def export(
    kind: str,
    unet: Any,
    noise_table: NoiseTable,
    schedule: StepSchedule,
    out: str | os.PathLike,
    *,
    quantize: str = "none",
    batch: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Export every width of a network into a new folder.

    Args:
        kind: "savedmodel" (`unet_1_0/1/` …, as TF Serving wants it), "tflite" (`unet_1_0.tflite`
            …) or "bundle" (those, a manifest, the noise table and the schedule).
        unet: the trained `SlimmableUNet`.
        noise_table: the one it was trained with.
        schedule: the schedule that a bundle samples with, and that int8 is calibrated on.
        out: folder to make; it appears whole or not at all.
        quantize, batch: of tflite and bundle; see `ddsm_tf.export.tflite.convert`.
        overwrite: replace a folder that is there.

    Returns:
        `out` as a path.

    Raises:
        InputError: an argument breaks its rule, or `out` exists.
    """
    if kind not in KINDS:
        raise invalid("kind", kind, f"must be one of {', '.join(KINDS)}")
    if kind == "savedmodel" and quantize != "none":
        raise invalid("quantize", quantize, "is for tflite and bundle; a savedmodel is float32")
    if kind == "savedmodel" and batch is not None:
        raise invalid("batch", batch, "is for tflite and bundle; a savedmodel takes any")
    schedule.check_model(unet.widths, noise_table.train_timesteps)
    with atomic_folder(out, overwrite=overwrite) as folder:
        if kind == "savedmodel":
            from ddsm_tf.export.savedmodel import write_savedmodels

            write_savedmodels(unet, folder)
        else:
            from ddsm_tf.export.tflite import write_tflite

            samples = _calibration(unet, noise_table, schedule, quantize)
            files = write_tflite(unet, folder, quantize=quantize, batch=batch, calibration=samples)
            if kind == "bundle":
                from ddsm_tf.export.bundle import write_manifest

                write_manifest(
                    folder, files, unet.image_shape, noise_table, schedule, quantize, batch
                )
    return Path(out)


def _calibration(unet: Any, noise_table: NoiseTable, schedule: StepSchedule, quantize: str) -> Any:
    """Each width's calibration samples, if the precision needs any."""
    from ddsm_tf.export.calibration import calibration_samples
    from ddsm_tf.export.tflite import check_quantize, needs_calibration
    from ddsm_tf.models.compiled import CompiledDenoiser

    check_quantize(quantize)
    if not needs_calibration(quantize):
        return None
    denoise = CompiledDenoiser(unet)
    return calibration_samples(denoise, schedule, noise_table, unet.image_shape, unet.widths)


def width_name(width: float) -> str:
    """The file or folder name of a width without its suffix, such as `unet_0_5`."""
    return f"unet_{str(width).replace('.', '_')}"
