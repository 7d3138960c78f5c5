"""`ddsm importance`, `search` and `latency`: which width each step needs, and what it costs."""

from __future__ import annotations

from typing import Any

import click

from ddsm_tf.commands.shared import (
    cost_option,
    open_run,
    overwrite_option,
    quantize_option,
    run_argument,
    sampler_option,
    seed_option,
    steps_option,
    xla_option,
)
from ddsm_tf.schedule import MAX_GUIDANCE


@click.command()
@run_argument
@sampler_option
@steps_option
@cost_option
@click.option(
    "--budget",
    "budgets",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    help="Share of full width's cost; may be repeated.",
)
@click.option(
    "--switch-penalty",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Harm of a change of width, as a share of the narrowest width's harm.",
)
@click.option(
    "--min-run",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Fewest steps before the width may change.",
)
@click.option("-o", "out", metavar="DIR", help="Write the schedules there.")
def importance(run: str, budgets: tuple[float, ...], **options: Any) -> None:
    """Measure each width's error over t, and read schedules off it without sampling."""
    opened = open_run(run)
    from ddsm_tf.training.importance import BUDGETS, importance_schedules

    click.echo(importance_schedules(opened, budgets=budgets or BUDGETS, **options))
    click.echo(opened.importance_path)


@click.command()
@run_argument
@sampler_option
@steps_option
@click.option(
    "--guidance",
    "guidance_scale",
    type=click.FloatRange(0, MAX_GUIDANCE),
    metavar="SCALE",
    help="Guidance of every schedule, for models with classes; the run's if left out.",
)
@click.option(
    "--guidance-widths",
    type=click.Choice(["same", "free"]),
    default="same",
    show_default=True,
    help="Whether the unconditional branch has widths of its own.",
)
@click.option(
    "--method",
    default="nsga2",
    show_default=True,
    metavar="nsga2|importance|random|ramps|paper",
    help="All but the first are baselines; their trials join the comparison.",
)
@cost_option
@click.option("--trials", type=click.IntRange(min=1), help="Schedules to try.")
@click.option("--images", type=click.IntRange(min=2), help="Images a trial.")
@click.option("--segments", type=click.IntRange(min=1), help="Parts with a width of their own.")
@click.option(
    "--refinements",
    type=click.IntRange(0, 8),
    default=0,
    show_default=True,
    help="How many times each segment is split in two as the search goes on.",
)
@click.option("--skips", is_flag=True, help="Steps may also be left out.")
@click.option("--budget", type=float, help="Choose the best within this share of full cost.")
@click.option("--max-distance", type=float, help="Choose the cheapest within this distance.")
@click.option(
    "--tolerance",
    type=float,
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Choose the cheapest whose distance exceeds full width's by no more than this share.",
)
@click.option(
    "--confirm-images",
    type=click.IntRange(min=2),
    help="Images for each of the seeds that confirm the choice; twice a trial's if left out.",
)
@click.option(
    "--memory",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="MiB for the states that schedules share.",
)
@xla_option
@seed_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted search.")
def search(run: str, resume: bool, **options: Any) -> None:
    """Search which width each step needs."""
    opened = open_run(run)
    from ddsm_tf.training.search import SearchOptions, search_run

    click.echo(search_run(opened, SearchOptions(**options), resume=resume))


@click.command()
@run_argument
@click.option(
    "--runtime",
    type=click.Choice(["litert", "savedmodel", "keras"]),
    default="litert",
    show_default=True,
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images a step."
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="CPU threads; 0 is the runtime's own choice: one for LiteRT, all for TensorFlow.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Timed steps a width.",
)
@quantize_option
@xla_option
@click.option("-o", "out", required=True, metavar="FILE.json")
@overwrite_option
def latency(run: str, out: str, runtime: str, threads: int, **options: Any) -> None:
    """Time a step of every width here, for `ddsm search --cost latency:FILE`."""
    # LiteRT has threads of its own; TensorFlow's must be known before it starts.
    opened = open_run(run, 0 if runtime == "litert" else threads)
    from ddsm_tf.training.latency import latency_of_run

    click.echo(latency_of_run(opened, out, runtime=runtime, threads=threads, **options))
