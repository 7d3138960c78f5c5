"""Exports of a slimmable UNet: one plain network a width, as SavedModel, TFLite or a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddsm_tf.edge.manifest import DEFAULT, MANIFEST, check_name
from ddsm_tf.errors import invalid
from ddsm_tf.export.requirements import check_requirements
from ddsm_tf.files import atomic_folder
from ddsm_tf.labels import check_conditional
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule

KINDS = ("savedmodel", "tflite", "bundle")
FULL = "full"
QUANTIZE = ("none", "float16", "dynamic", "dynamic-mixed", "int8", "int8-mixed")
# Patterns of what each kind writes, for `check_folder`: what --overwrite may take away.
FILES = {
    "savedmodel": ("sampler/1/saved_model.pb", "sampler/1/**/*", "unet_*/1/**/*"),
    "tflite": ("unet_*.tflite", "decoder.tflite"),
    "bundle": (MANIFEST, "unet_*.tflite", "unet_*.slices", "decoder.tflite"),
}


def export(
    kind: str,
    unet: Any,
    noise_table: NoiseTable,
    schedule: StepSchedule,
    out: str | os.PathLike,
    *,
    quantize: str = "none",
    batch: int | None = None,
    xla: bool = False,
    schedules: Mapping[str, StepSchedule] | None = None,
    provenance: Mapping[str, str | int | float] | None = None,
    optimization: Any = None,
    images: Any = None,
    labels: Any = None,
    autoencoder: Any = None,
    on_step: Callable[[], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Export every width of a network into a new folder.

    Args:
        kind: "savedmodel" (`sampler/1/` with all widths, and a denoiser a width, `unet_1_0/1/` …,
            as TF Serving wants them), "tflite" (`unet_1_0.tflite` …) or "bundle" (the widest of
            those, what the others differ in, a manifest, the noise table and the schedules).
        unet: the trained `SlimmableUNet`.
        noise_table: the one it was trained with.
        schedule: that of the sampler's SavedModel, a bundle's default, and what int8 is
            calibrated on, together with a bundle's other schedules.
        out: folder to make; it appears whole or not at all.
        quantize, batch: of tflite and bundle; see `ddsm_tf.export.tflite.convert`.
        xla: of savedmodel; see `ddsm_tf.export.savedmodel.write_savedmodels`.
        schedules: further schedules of a bundle by name; "full", the default one's steps at the
            widest width, is always among them.
        provenance: what a bundle's manifest says of where the weights come from, beside versions
            and the weights' digest.
        optimization: an `Optimization` of `ddsm_tf.export.optimize`, for tflite and bundle; every
            width is fine-tuned under it.
        images: to fine-tune on, uint8 (N, H, W, C), or latents, float32.
        labels: of these images, integers (N,), for a model with classes.
        autoencoder: the `KLAutoencoder` whose latents the network denoises; its decoder becomes
            part of the sampler's SavedModel, and a file beside the networks' in the others.
        on_step: called after every step of fine-tuning.
        overwrite: replace what an earlier export of the same kind wrote, or an empty folder.

    Returns:
        `out` as a path.

    Raises:
        InputError: an argument breaks its rule, or `out` exists and may not be replaced.
        MissingExtraError: see `check_requirements`.
    """
    _check(kind, quantize, batch, xla, schedules, optimization)
    check_requirements(kind)
    named = _named(schedule, schedules or {}, unet.widths[0])
    for each in named.values():
        each.check_model(unet.widths, noise_table.train_timesteps)
        check_conditional(each.guidance_scale, unet.num_classes)
    notes = {**(provenance or {}), **(optimization.notes if optimization else {})}
    if kind == "bundle":
        from ddsm_tf.export.bundle import provenance_of

        # Before minutes of converting.
        provenance_of(unet, notes)
    with atomic_folder(out, replaces=FILES[kind] if overwrite else ()) as folder:
        if kind == "savedmodel":
            from ddsm_tf.export.savedmodel import VERSION, write_sampler, write_savedmodels

            write_savedmodels(unet, folder, xla=xla)
            path = folder / "sampler" / VERSION
            write_sampler(unet, noise_table, schedule, path, autoencoder, xla=xla)
            return Path(out)
        if optimization is None:
            from ddsm_tf.export.tflite import write_tflite

            # A bundle may be sampled with any of its schedules.
            every = list(named.values()) if kind == "bundle" else [schedule]
            samples = _calibration(unet, noise_table, every, quantize, autoencoder is None)
            files = write_tflite(unet, folder, quantize=quantize, batch=batch, calibration=samples)
        else:
            from ddsm_tf.export.optimize import write_optimized

            tuning = {"labels": labels, "quantize": quantize, "on_step": on_step}
            files = write_optimized(unet, folder, optimization, images, noise_table, **tuning)
            quantize = f"{optimization.method}, {quantize}"
        decoder = None
        if autoencoder is not None:
            from ddsm_tf.export.bundle import DECODER_FILE
            from ddsm_tf.export.decoder import decoder_tflite

            decoder = decoder_tflite(autoencoder, batch)
            (folder / DECODER_FILE).write_bytes(decoder.content)
        if kind == "bundle":
            from ddsm_tf.export.bundle import write_bundle

            made = {"quantize": quantize, "batch": batch, "provenance": notes}
            made["decoder"] = decoder
            write_bundle(folder, files, unet, noise_table, named, **made)
    return Path(out)


def _check(
    kind: str,
    quantize: str,
    batch: int | None,
    xla: bool,
    schedules: Any,
    optimization: Any,
) -> None:
    if kind not in KINDS:
        raise invalid("kind", kind, f"must be one of {', '.join(KINDS)}")
    if quantize not in QUANTIZE:
        raise invalid("quantize", quantize, f"must be one of {', '.join(QUANTIZE)}")
    if schedules and kind != "bundle":
        raise invalid("schedules", list(schedules), f"are for a bundle; {kind} holds none")
    if kind == "savedmodel" and quantize != "none":
        raise invalid("quantize", quantize, "is for tflite and bundle; a savedmodel is float32")
    if kind == "savedmodel" and batch is not None:
        raise invalid("batch", batch, "is for tflite and bundle; a savedmodel takes any")
    if kind != "savedmodel" and xla:
        raise invalid("xla", xla, "is for savedmodel; TFLite has no XLA")
    if optimization is not None:
        check_optimization(kind, optimization.method, quantize, batch)


def check_optimization(kind: str, method: str, quantize: str, batch: int | None = None) -> None:
    """`InputError` if exports of a kind and precision cannot be optimized by a method."""
    if kind == "savedmodel":
        raise invalid("optimize", method, "is for tflite and bundle")
    if method == "qat" and quantize != "none":
        raise invalid("quantize", quantize, "does not go with qat, whose files are int8 already")
    if needs_calibration(quantize):
        raise invalid("quantize", quantize, f"does not go with {method}; use none or dynamic")
    if batch is not None:
        raise invalid("batch", batch, f"does not go with {method}, whose files take any batch")


def needs_calibration(quantize: str) -> bool:
    """Whether activations' ranges must be known beforehand."""
    return quantize.startswith("int8")


def _calibration(
    unet: Any,
    noise_table: NoiseTable,
    schedules: Sequence[StepSchedule],
    quantize: str,
    clip: bool,
) -> Any:
    """Each width's calibration samples, if the precision needs any."""
    from ddsm_tf.export.calibration import samples_of_all
    from ddsm_tf.models.compiled import CompiledDenoiser

    if not needs_calibration(quantize):
        return None
    denoise = CompiledDenoiser(unet)
    return samples_of_all(
        denoise,
        schedules,
        noise_table,
        unet.image_shape,
        unet.widths,
        num_classes=unet.num_classes,
        clip=clip,
    )


def _named(
    default: StepSchedule, further: Mapping[str, StepSchedule], widest: float
) -> dict[str, StepSchedule]:
    """A bundle's schedules by name."""
    own = {DEFAULT: default, FULL: default.at_width(widest)}
    for name in further:
        if check_name(name) in own:
            raise invalid("schedules", name, "is the name of one that every bundle has")
    return {**own, **further}
