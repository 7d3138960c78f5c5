"""`ddsm metrics`."""

from __future__ import annotations

import click

from ddsm_tf.commands.shared import quiet_tensorflow


@click.group()
def metrics() -> None:
    """What the published metrics need."""


@metrics.command("convert-inception")
@click.argument("file", metavar="FILE.pth")
@click.option("-o", "out", required=True, metavar="FILE.npz")
@click.option("--allow-other", is_flag=True, help="Take weights that are not FID's.")
def convert_inception(file: str, out: str, allow_other: bool) -> None:
    """Convert FID's Inception weights, pt_inception-2015-12-05-6726825d.pth; needs PyTorch."""
    quiet_tensorflow()
    from ddsm_tf.metrics import inception

    sha256 = inception.convert_inception(file, out, allow_other=allow_other)
    click.echo(f"{out}: SHA-256 of the weights {sha256}")
