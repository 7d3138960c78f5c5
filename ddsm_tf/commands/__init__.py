"""The commands of `ddsm`, in the order of a user's work.

Heavy modules load inside the commands, so that `--help` is quick.
"""

import click

from ddsm_tf.commands.data import data
from ddsm_tf.commands.export import export
from ddsm_tf.commands.metrics import metrics
from ddsm_tf.commands.sample import evaluate, report, sample
from ddsm_tf.commands.search import importance, latency, search
from ddsm_tf.commands.serve import serve_sample
from ddsm_tf.commands.train import autoencoder, demo, presets, train, tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddsm_tf")
def ddsm() -> None:
    """Step-aware diffusion: train a slimmable UNet, search which width each step needs,
    sample and export."""


for command in (
    demo,
    presets,
    data,
    autoencoder,
    train,
    importance,
    search,
    tune,
    sample,
    evaluate,
    metrics,
    export,
    latency,
    report,
    serve_sample,
):
    ddsm.add_command(command)
