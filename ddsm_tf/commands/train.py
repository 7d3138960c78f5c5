"""`ddsm demo`, `presets` and `train`."""

from __future__ import annotations

from typing import Any

import click

from ddsm_tf.commands.shared import quiet_logs, quiet_tensorflow
from ddsm_tf.console import without_stderr


@click.command()
@click.option("--out", default="ddsm-demo", show_default=True, help="Run folder.")
def demo(out: str) -> None:
    """All three stages, export and report on real handwritten digits."""
    quiet_tensorflow()
    from ddsm_tf.training.demo import run_demo

    run_demo(out, click.echo)


@click.command()
@click.argument("name", metavar="[NAME|all]", required=False)
def presets(name: str | None) -> None:
    """List the presets, or show the data-sheet of one or of all."""
    from ddsm_tf.training.presets import ABOUT, PRESETS, get_preset

    if name is None:
        for preset, config in PRESETS.items():
            click.echo(f"{preset:16} {ABOUT[preset]}")
            click.echo(f"{'':16} data {config.data}, {config.steps:,} steps of {config.batch_size}")
        return
    chosen = list(PRESETS.values()) if name == "all" else [get_preset(name)]
    quiet_tensorflow()
    from ddsm_tf.training.data_sheet import costs_of, data_sheet
    from ddsm_tf.training.run import network_of

    for config in chosen:
        click.echo(data_sheet(config, costs_of(network_of(config))) + "\n")


@click.command()
@click.argument("preset")
@click.option("--out", required=True, help="Run folder.")
@click.option("--data", metavar="SOURCE", help="digits, npz:FILE[:KEY], folder:DIR, tfds:NAME")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Configuration.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps in all.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option(
    "--strategy",
    # `ddsm_tf.training.strategy.STRATEGIES`; click wants the names before TensorFlow is there.
    type=click.Choice(["auto", "single", "mirrored", "multiworker"]),
    default="auto",
    show_default=True,
    help="One device, all GPUs of this host, or the workers of TF_CONFIG.",
)
def train(
    preset: str,
    out: str,
    data: str,
    changes: tuple[str, ...],
    steps: int,
    resume: bool,
    strategy: str,
) -> None:
    """Train a slimmable UNet on every width at once."""
    from ddsm_tf.training.presets import get_preset

    config = get_preset(preset).changed(changes)
    config = config.changed([f"data={data}"] if data else [])
    config = config.changed([f"steps={steps}"] if steps else [])
    quiet_logs()
    # Workers must meet before anything else uses TensorFlow.
    placement = without_stderr(lambda: _placement(strategy))
    quiet_tensorflow()
    from ddsm_tf.training.train import open_shared_run, train_placed

    if placement.replicas > 1:
        click.echo(placement.describe(config.batch_size, config.learning_rate), err=True)
    run = open_shared_run(out, config, resume=resume, placement=placement)
    train_placed(run, placement)
    if placement.is_chief:
        click.echo(f"trained {config.steps} steps: {run.weights_path}")


def _placement(strategy: str) -> Any:
    from ddsm_tf.training.strategy import make_placement

    return make_placement(strategy)


@click.command()
@click.argument("preset", metavar="latent_…")
@click.option("--out", required=True, help="Run folder.")
@click.option("--data", metavar="SOURCE", help="digits, npz:FILE[:KEY], folder:DIR, tfds:NAME")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Configuration.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps in all.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
def autoencoder(
    preset: str, out: str, data: str, changes: tuple[str, ...], steps: int, resume: bool
) -> None:
    """Train the autoencoder whose latents a latent_… preset denoises."""
    from ddsm_tf.training.presets import get_autoencoder

    config = get_autoencoder(preset).changed(changes)
    config = config.changed([f"data={data}"] if data else [])
    config = config.changed([f"steps={steps}"] if steps else [])
    quiet_tensorflow()
    from ddsm_tf.training.autoencoder import AutoencoderRun, train_autoencoder
    from ddsm_tf.training.train import open_or_resume

    run = open_or_resume(AutoencoderRun, out, config, resume)
    report = train_autoencoder(run)
    click.echo(
        f"trained {config.steps} steps: {run.weights_path}\n"
        f"PSNR {report['psnr']:.2f} dB on {report['images']} images, KL {report['kl']:.3f} nats a "
        f"latent value, latents' standard deviation {report['latent_std']:.3f}\n"
        f"{run.path / 'reconstructions.png'}"
    )
