"""Exports of a slimmable UNet: one plain network a width, as SavedModel, TFLite or a bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddsm_tf.edge.manifest import DEFAULT, check_name
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
    schedules: Mapping[str, StepSchedule] | None = None,
    provenance: Mapping[str, str | int | float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Export every width of a network into a new folder.

    Args:
        kind: "savedmodel" (`sampler/1/` with all widths, and a denoiser a width, `unet_1_0/1/` …,
            as TF Serving wants them), "tflite" (`unet_1_0.tflite` …) or "bundle" (the widest of
            those, what the others differ in, a manifest, the noise table and the schedules).
        unet: the trained `SlimmableUNet`.
        noise_table: the one it was trained with.
        schedule: that of the sampler's SavedModel, and a bundle's default.
        out: folder to make; it appears whole or not at all.
        quantize: see `ddsm_tf.export.tflite.convert`.
        schedules: further schedules of a bundle by name; "full", the default one's steps at the
            widest width, is always among them.
        provenance: what a bundle's manifest says of where the weights come from, beside versions
            and the weights' digest.
        overwrite: replace a folder that is there.

    Returns:
        `out` as a path.

    Raises:
        InputError: an argument breaks its rule, or `out` exists.
    """
    if kind not in KINDS:
        raise invalid("kind", kind, f"must be one of {', '.join(KINDS)}")
    if schedules and kind != "bundle":
        raise invalid("schedules", list(schedules), f"are for a bundle; {kind} holds none")
    if kind == "savedmodel" and quantize != "none":
        raise invalid("quantize", quantize, "is for tflite and bundle; a savedmodel is float32")
    named = _named(schedule, schedules or {}, unet.widths[0])
    for each in named.values():
        each.check_model(unet.widths, noise_table.train_timesteps)
    with atomic_folder(out, overwrite=overwrite) as folder:
        if kind == "savedmodel":
            from ddsm_tf.export.savedmodel import VERSION, write_sampler, write_savedmodels

            write_savedmodels(unet, folder)
            write_sampler(unet, noise_table, schedule, folder / "sampler" / VERSION)
        else:
            from ddsm_tf.export.tflite import write_tflite

            files = write_tflite(unet, folder, quantize=quantize)
            if kind == "bundle":
                from ddsm_tf.export.bundle import write_bundle

                write_bundle(
                    folder,
                    files,
                    unet,
                    noise_table,
                    named,
                    quantize=quantize,
                    provenance=provenance,
                )
    return Path(out)


def _named(
    default: StepSchedule, further: Mapping[str, StepSchedule], widest: float
) -> dict[str, StepSchedule]:
    """A bundle's schedules by name."""
    if DEFAULT in further:
        raise invalid("schedules", DEFAULT, "is the name of `schedule`; choose another")
    full = default.with_widths([widest] * len(default))
    further = {check_name(name): schedule for name, schedule in further.items()}
    return {DEFAULT: default, "full": full, **further}


def width_name(width: float) -> str:
    """The file or folder name of a width without its suffix, such as `unet_0_5`."""
    return f"unet_{str(width).replace('.', '_')}"
