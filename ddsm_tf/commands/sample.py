"""`ddsm sample`, `evaluate` and `report`."""

from __future__ import annotations

import json

import click

from ddsm_tf.commands.shared import (
    open_run,
    run_argument,
    schedule_option,
    seed_option,
)
from ddsm_tf.schedule import SAMPLERS

# A schedule file has a sampler and steps of its own.
uniform_sampler_option = click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    help="Sampler of full and uniform:W; ddim if left out.",
)
uniform_steps_option = click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Steps of full and uniform:W; the run's default if left out.",
)


@click.command()
@run_argument
@schedule_option
@uniform_sampler_option
@uniform_steps_option
@click.option("-n", "count", type=click.IntRange(min=1), default=64, show_default=True)
@seed_option
@click.option("-o", "out", required=True, metavar="FILE.png|FILE.npy")
def sample(
    run: str, schedule: str, sampler: str, steps: int, count: int, seed: int, out: str
) -> None:
    """Sample images: a grid as PNG, or uint8 NHWC as NPY."""
    from ddsm_tf.images import check_image_path

    check_image_path(out)
    opened = open_run(run)
    from ddsm_tf.training.sample import sample_to_file

    chosen = opened.schedule(schedule, sampler=sampler, steps=steps)
    sample_to_file(opened, chosen, count, seed, out)
    click.echo(out)


@click.command()
@run_argument
@schedule_option
@uniform_sampler_option
@uniform_steps_option
@click.option("-n", "count", type=click.IntRange(min=2), help="Images to compare.")
@seed_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    run: str, schedule: str, sampler: str, steps: int, count: int, seed: int, as_json: bool
) -> None:
    """Distance to the real images, MACs, share of the full cost, seconds an image."""
    opened = open_run(run)
    from ddsm_tf.training.evaluate import evaluate_run

    chosen = opened.schedule(schedule, sampler=sampler, steps=steps)
    result = evaluate_run(opened, chosen, count, seed)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            click.echo(f"{key:15} {value:.6g}" if isinstance(value, float) else f"{key:15} {value}")


@click.command()
@run_argument
def report(run: str) -> None:
    """Write one self-contained report.html."""
    opened = open_run(run)
    from ddsm_tf.training.report import write_report

    click.echo(write_report(opened))
