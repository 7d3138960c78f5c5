"""`ddsm demo`, `presets`, `train`, `tune` and `autoencoder`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import click

from ddsm_tf.commands.shared import quiet_logs, quiet_tensorflow, run_argument, schedule_option
from ddsm_tf.console import without_stderr

_TRAINING_OPTIONS = [
    click.option("--out", required=True, help="Run folder."),
    click.option("--data", metavar="SOURCE", help="digits, npz:FILE[:KEY], folder:DIR, tfds:NAME"),
    click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Configuration."),
    click.option("--steps", type=click.IntRange(min=1), help="Training steps in all."),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on from the newest checkpoint, with the run's own settings.",
    ),
]
strategy_option = click.option(
    "--strategy",
    # `ddsm_tf.training.strategy.STRATEGIES`; click wants the names before TensorFlow is there.
    type=click.Choice(["auto", "single", "mirrored", "multiworker"]),
    default="auto",
    show_default=True,
    help="One device, all GPUs of this host, or the workers of TF_CONFIG.",
)


def training_options(command: Callable) -> Callable:
    """The options of everything that trains a run."""
    for option in reversed(_TRAINING_OPTIONS):
        command = option(command)
    return command


def changes_of(changes: tuple[str, ...], data: str | None, steps: int | None) -> list[str]:
    """What `--set`, `--data` and `--steps` change of a configuration; the latter two win."""
    return [
        *changes,
        *([f"data={data}"] if data else []),
        *([f"steps={steps}"] if steps else []),
    ]


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
@training_options
@strategy_option
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

    start = get_preset(preset).or_resumed(out, resume)
    config = start.changed(changes_of(changes, data, steps))
    placement = _start(strategy)
    from ddsm_tf.training.train import last_file_of, open_run

    def opened() -> Any:
        return open_run(out, config, resume=resume)

    _train(out, config, placement, opened, last_file_of(config))


@click.command()
@run_argument
@schedule_option
@training_options
@strategy_option
def tune(
    run: str,
    schedule: str | None,
    out: str,
    data: str | None,
    changes: tuple[str, ...],
    steps: int | None,
    resume: bool,
    strategy: str,
) -> None:
    """Go on training the network of RUN for one schedule: each width where it is used.

    The result is a run of its own, which samples with that schedule. It takes a third of RUN's
    steps, at half of its learning rate, unless told otherwise.
    """
    from ddsm_tf.training.run import Run

    source = Run.open(run)
    placement = _start(strategy)
    from ddsm_tf.training.tune import LAST_FILE, open_tuned_run, schedule_to_tune_for, tuned_config

    tuned_for = schedule_to_tune_for(source, schedule)
    start = tuned_config(source).or_resumed(out, resume)
    config = start.changed(changes_of(changes, data, steps))

    def opened() -> Any:
        return open_tuned_run(out, config, source, tuned_for, resume=resume)

    _train(out, config, placement, opened, LAST_FILE)


def _start(strategy: str) -> Any:
    """The devices to train on, with TensorFlow started quietly."""
    quiet_logs()
    # Workers must meet before anything else uses TensorFlow.
    placement = without_stderr(lambda: _placement(strategy))
    quiet_tensorflow()
    return placement


def _train(
    out: str, config: Any, placement: Any, opened: Callable[[], Any], last_file: str
) -> None:
    from ddsm_tf.training.train import open_shared_run, train_placed, withdrawn_on_bad_input

    if placement.replicas > 1:
        click.echo(placement.describe(config.batch_size, config.learning_rate), err=True)
    # The folder is the chief's.
    guard = withdrawn_on_bad_input(out) if placement.is_chief else contextlib.nullcontext()
    with guard:
        run = open_shared_run(out, config, opened, placement, last_file)
        train_placed(run, placement)
    if placement.is_chief:
        click.echo(f"trained {config.steps} steps: {run.weights_path}")


def _placement(strategy: str) -> Any:
    from ddsm_tf.training.strategy import make_placement

    return make_placement(strategy)


@click.command()
@click.argument("preset", metavar="latent_…")
@training_options
def autoencoder(
    preset: str, out: str, data: str, changes: tuple[str, ...], steps: int, resume: bool
) -> None:
    """Train the autoencoder whose latents a latent_… preset denoises."""
    from ddsm_tf.training.presets import get_autoencoder

    start = get_autoencoder(preset).or_resumed(out, resume)
    config = start.changed(changes_of(changes, data, steps))
    quiet_tensorflow()
    from ddsm_tf.training.autoencoder import AutoencoderRun, train_autoencoder
    from ddsm_tf.training.train import open_or_resume, withdrawn_on_bad_input

    with withdrawn_on_bad_input(out):
        run = open_or_resume(AutoencoderRun, out, config, resume)
        report = train_autoencoder(run)
    click.echo(
        f"trained {config.steps} steps: {run.weights_path}\n"
        f"PSNR {report['psnr']:.2f} dB on {report['images']} images, KL {report['kl']:.3f} nats a "
        f"latent value, latents' standard deviation {report['latent_std']:.3f}\n"
        f"{run.path / 'reconstructions.png'}"
    )
