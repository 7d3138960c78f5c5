"""`ddsm data`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ddsm_tf.commands.shared import quiet_tensorflow
from ddsm_tf.errors import invalid


@click.command()
@click.argument("source")
@click.option("--size", type=click.IntRange(min=1), help="Side of the images in the picture.")
@click.option("--channels", type=click.IntRange(1, 4), help="Their channels.")
@click.option("-o", "out", metavar="FILE.png", help="Picture of some images.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def data(
    source: str, size: int | None, channels: int | None, out: str | None, as_json: bool
) -> None:
    """Show what an image source holds: digits, npz:FILE[:KEY], folder:DIR, tfds:NAME[:SPLIT]."""
    if out is not None and Path(out).suffix != ".png":
        raise invalid("-o", out, "must end in .png")
    for option, value in (("--size", size), ("--channels", channels)):
        if value is not None and out is None:
            raise invalid(option, value, "is of the picture; add -o FILE.png, or leave it out")
    if source.startswith("tfds:"):
        quiet_tensorflow()
    from ddsm_tf.training.inspection import inspect_source

    picture = None if out is None else Path(out)
    found = inspect_source(source, size=size, channels=channels, out=picture)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        text = f"{value:.2f}" if isinstance(value, float) else value
        click.echo(f"{key.replace('_', ' '):20} {text}")
