"""`ddsm sample`, `evaluate` and `report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from ddsm_tf.commands.shared import (
    open_run,
    run_argument,
    schedule_option,
    seed_option,
    xla_option,
)
from ddsm_tf.errors import invalid
from ddsm_tf.schedule import MAX_GUIDANCE, SAMPLERS
from ddsm_tf.timesteps import SPACINGS

# What full and uniform:W are made of; a schedule file has its own.
_UNIFORM_OPTIONS = [
    click.option("--sampler", type=click.Choice(SAMPLERS), help="The run's if left out."),
    click.option("--steps", type=click.IntRange(min=1), help="The run's if left out."),
    click.option(
        "--timesteps",
        "spacing",
        type=click.Choice(SPACINGS),
        help="How the steps are spaced: in t, by Karras's noise levels, or in log-SNR.",
    ),
    click.option("--eta", type=click.FloatRange(0, 1), help="Noise of ddim; 0 if left out."),
    click.option("--churn", type=click.FloatRange(min=0), help="S_churn of euler and heun."),
    click.option(
        "--guidance",
        "guidance_scale",
        type=click.FloatRange(0, MAX_GUIDANCE),
        metavar="SCALE",
        help="Classifier-free guidance of a model with classes; 1 is none.",
    ),
    click.option(
        "--guidance-width",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="W",
        help="Width of the unconditional branch; the step's own if left out.",
    ),
]


def uniform_options(command: Callable) -> Callable:
    """The options of the schedules full and uniform:W."""
    for option in reversed(_UNIFORM_OPTIONS):
        command = option(command)
    return command


@click.command()
@run_argument
@schedule_option
@uniform_options
@click.option("-n", "count", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--class",
    "classes",
    metavar="K|K,K,…|none",
    help="Classes that the images take in turn; all of the model's if left out.",
)
@seed_option
@xla_option
@click.option("-o", "out", required=True, metavar="FILE.png|FILE.npy")
def sample(
    run: str,
    schedule: str,
    count: int,
    classes: str | None,
    seed: int,
    xla: bool,
    out: str,
    **options: Any,
) -> None:
    """Sample images: a grid as PNG, or uint8 NHWC as NPY."""
    from ddsm_tf.images import check_image_path
    from ddsm_tf.labels import parse_labels

    check_image_path(out)
    opened = open_run(run)
    from ddsm_tf.training.sample import sample_to_file

    chosen = opened.schedule(schedule, **options)
    labels = parse_labels(classes, count, opened.config.num_classes)
    sample_to_file(opened, chosen, count, seed, out, labels=labels, xla=xla)
    click.echo(out)


@click.command()
@run_argument
@schedule_option
@uniform_options
@click.option("-n", "count", type=click.IntRange(min=2), help="Images to compare.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    # A search chooses what does well from its own seeds, 0 and the next few.
    default=1000,
    show_default=True,
    help="Of the noise; the default is none that `ddsm search` chooses by.",
)
@click.option(
    "--metrics",
    metavar="NAME,…",
    default="",
    help="Also fid, kid, is, precision_recall, per_class, fid_infinity.",
)
@click.option(
    "--inception",
    metavar="FILE",
    help="Weights of `ddsm metrics convert-inception`; without, the data's own classifier judges.",
)
@xla_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    run: str,
    schedule: str,
    count: int,
    seed: int,
    metrics: str,
    inception: str | None,
    xla: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Distance to the real images, MACs, share of the full cost, seconds an image."""
    opened = open_run(run)
    from ddsm_tf.training.evaluate import evaluate_run

    chosen = opened.schedule(schedule, **options)
    names = [name for name in metrics.split(",") if name]
    if inception is not None and not names:
        raise invalid("--inception", inception, "is for --metrics, such as fid,kid")
    judging = {"metrics": names, "inception": inception}
    result = evaluate_run(opened, chosen, count, seed, **judging, xla=xla)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    judged = result.pop("metrics", {})
    for key, value in result.items():
        click.echo(f"{key:15} {value:.6g}" if isinstance(value, float) else f"{key:15} {value}")
    for values in judged.values():
        name = values.pop("name")
        numbers = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        click.echo(f"{name}: {numbers}")
    if judged:
        click.echo(f"Such numbers depend on how many images there are (here {result['images']}).")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(each)}" for key, each in value.items()) + "}"
    return f"{value:.4g}"


@click.command()
@run_argument
def report(run: str) -> None:
    """Write one self-contained report.html."""
    opened = open_run(run)
    from ddsm_tf.training.report import write_report

    click.echo(write_report(opened))
