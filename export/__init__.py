"""Exports of a slimmable UNet: one plain network a width, as SavedModel, TFLite or a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_folder
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule

KINDS = ("savedmodel", "tflite", "bundle")
QUANTIZE = ("none", "float16", "dynamic")


def export(
    kind: str,
    unet: Any,
    noise_table: NoiseTable,
    schedule: StepSchedule,
    out: str | os.PathLike,
    *,
    quantize: str = "none",
    optimization: Any = None,
    images: Any = None,
    on_step: Callable[[], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Export every width of a network into a new folder.

    Args:
        kind: "savedmodel" (`unet_1_0/1/` …, as TF Serving wants it), "tflite" (`unet_1_0.tflite`
            …) or "bundle" (those, a manifest, the noise table and the schedule).
        unet: the trained `SlimmableUNet`.
        noise_table: the one it was trained with.
        schedule: the schedule that a bundle samples with.
        out: folder to make; it appears whole or not at all.
        quantize: see `ddsm_tf.export.tflite.convert`.
        optimization: an `Optimization` of `ddsm_tf.export.optimize`, for tflite and bundle; every
            width is fine-tuned under it.
        images: to fine-tune on, uint8 (N, H, W, C).
        on_step: called after every step of fine-tuning.
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
    if optimization is not None:
        check_optimization(kind, optimization.method, quantize)
    schedule.check_model(unet.widths, noise_table.train_timesteps)
    with atomic_folder(out, overwrite=overwrite) as folder:
        if kind == "savedmodel":
            from ddsm_tf.export.savedmodel import write_savedmodels

            write_savedmodels(unet, folder)
        else:
            if optimization is None:
                from ddsm_tf.export.tflite import write_tflite

                files = write_tflite(unet, folder, quantize=quantize)
            else:
                from ddsm_tf.export.optimize import write_optimized

                tuning = {"quantize": quantize, "on_step": on_step}
                files = write_optimized(unet, folder, optimization, images, noise_table, **tuning)
                quantize = f"{optimization.method}, {quantize}"
            if kind == "bundle":
                from ddsm_tf.export.bundle import write_manifest

                write_manifest(folder, files, unet.image_shape, noise_table, schedule, quantize)
    return Path(out)


def check_optimization(kind: str, method: str, quantize: str) -> None:
    """`InputError` if exports of a kind and precision cannot be optimized by a method."""
    if kind == "savedmodel":
        raise invalid("optimize", method, "is for tflite and bundle")
    if method == "qat" and quantize != "none":
        raise invalid("quantize", quantize, "does not go with qat, whose files are int8 already")


def width_name(width: float) -> str:
    """The file or folder name of a width without its suffix, such as `unet_0_5`."""
    return f"unet_{str(width).replace('.', '_')}"
