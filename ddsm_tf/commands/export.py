"""`ddsm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddsm_tf.commands.shared import (
    open_run,
    overwrite_option,
    quantize_option,
    run_argument,
    schedule_option,
    xla_option,
)
from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_folder


@click.command()
@run_argument
@click.argument("kind", type=click.Choice(["savedmodel", "tflite", "bundle"]))
@click.option("-o", "out", metavar="DIR", help="Folder to make; this or --serving.")
@quantize_option
@click.option(
    "--batch", type=click.IntRange(min=1), help="Images a call, fixed in the files; else any."
)
@xla_option
@click.option(
    "--optimize",
    type=click.Choice(["prune", "cluster", "qat"]),
    help="Make files that compress well, or int8 ones, by fine-tuning every width.",
)
@click.option("--optimize-steps", type=click.IntRange(min=1), help="Fine-tuning steps a width.")
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of zeros that prune makes.",
)
@click.option("--clusters", type=click.IntRange(2, 256), help="Values that cluster leaves.")
@schedule_option
@click.option(
    "--add-schedule",
    "added",
    multiple=True,
    metavar="NAME=FILE|uniform:W",
    help="A further schedule of a bundle, for `ddsm-edge --schedule NAME`; may be repeated.",
)
@overwrite_option
@click.option(
    "--serving", metavar="DIR", help="Add a version to a folder that TensorFlow Serving serves."
)
@click.option("--model", metavar="NAME", help="With --serving: the model; ddsm if left out.")
@click.option(
    "--label",
    metavar="LABEL",
    help="With --serving: the version's label; stable at first, then canary, if left out.",
)
@click.option(
    "--mount",
    metavar="PATH",
    help="With --serving: where the server sees DIR; as before, or /models, if left out.",
)
@click.option(
    "--batch-sampler",
    is_flag=True,
    help="With --serving: the server may join requests for samples.",
)
def export(
    run: str,
    kind: str,
    out: str | None,
    quantize: str,
    batch: int | None,
    xla: bool,
    optimize: str | None,
    optimize_steps: int | None,
    sparsity: float | None,
    clusters: int | None,
    schedule: str | None,
    added: tuple[str, ...],
    overwrite: bool,
    **serving: Any,
) -> None:
    """Export every width: SavedModel, TFLite, or the bundle for `ddsm-edge`."""
    tuning = {"optimize_steps": optimize_steps, "sparsity": sparsity, "clusters": clusters}
    of_out = {"overwrite": overwrite, "add_schedule": added, "batch": batch, "xla": xla}
    _check_place(kind, out, quantize, {**of_out, "optimize": optimize, **tuning}, serving)
    _check_out(run, out)
    _check_schedule(kind, quantize, schedule)
    opened = open_run(run)
    from ddsm_tf.export.requirements import check_requirements

    check_requirements(kind)
    unet, chosen = opened.load_unet(), opened.schedule(schedule)
    if out is None:
        from ddsm_tf.export.serving import write_serving

        given = {name: value for name, value in serving.items() if value is not None}
        given["autoencoder"] = opened.autoencoder
        path = write_serving(unet, opened.noise_table, chosen, given.pop("serving"), **given)
        click.echo(path)
        return
    from ddsm_tf.export import FILES, check_optimization
    from ddsm_tf.export import export as export_unet
    from ddsm_tf.training.optimize import fine_tuning

    if optimize is not None:
        # Before the images to fine-tune on are read and encoded, which may take minutes.
        check_optimization(kind, optimize, quantize, batch)
        check_folder(out, FILES[kind] if overwrite else ())
    with fine_tuning(opened, optimize, **tuning) as optimization:
        path = export_unet(
            kind,
            unet,
            opened.noise_table,
            chosen,
            out,
            quantize=quantize,
            batch=batch,
            xla=xla,
            schedules=_named_schedules(opened, added),
            provenance=opened.provenance,
            autoencoder=opened.autoencoder,
            overwrite=overwrite,
            **optimization,
        )
    click.echo(path)


def _check_place(
    kind: str, out: str | None, quantize: str, of_out: dict[str, Any], of_serving: dict[str, Any]
) -> None:
    """Raise `InputError` unless -o or --serving is given, with the options that belong to it."""
    if (out is None) == (of_serving["serving"] is None):
        raise InputError("`-o` or `--serving` must be given, and not both")
    owner, other, foreign = ("-o", "--serving", of_serving)
    if out is None:
        owner, other, foreign = ("--serving", "-o", of_out)
    for name, value in foreign.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"`{option}` belongs to {other}, not to {owner}")
    if out is None and kind != "savedmodel":
        raise invalid("kind", kind, "must be savedmodel with --serving")
    if out is None and quantize != "none":
        raise invalid("quantize", quantize, "must be none with --serving; the server runs float32")


def _check_out(run: str, out: str | None) -> None:
    """Raise `InputError` where --overwrite would take the run itself away."""
    if out is not None and Path(run).resolve().is_relative_to(Path(out).resolve()):
        raise invalid("-o", out, "is the run, or holds it; name a folder of its own")


def _check_schedule(kind: str, quantize: str, schedule: str | None) -> None:
    """Raise `InputError` where --schedule would change nothing that is written."""
    from ddsm_tf.export import needs_calibration

    if schedule is not None and kind == "tflite" and not needs_calibration(quantize):
        rule = "changes nothing in TFLite files but int8 ones, which are calibrated along it"
        raise invalid("--schedule", schedule, f"{rule}; leave it out, or export a bundle")


def _named_schedules(run: Any, texts: tuple[str, ...]) -> dict[str, Any]:
    """The schedules of `NAME=FILE` texts."""
    choices: dict[str, str] = {}
    for text in texts:
        name, _, choice = text.partition("=")
        if not name or not choice:
            raise invalid("--add-schedule", text, "must be NAME=FILE or NAME=uniform:W")
        if name in choices:
            raise invalid("--add-schedule", text, "must not give a name twice")
        choices[name] = choice
    return {name: run.schedule(choice) for name, choice in choices.items()}
