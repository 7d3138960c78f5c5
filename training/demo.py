"""The demo: every stage on real handwritten digits, from training to the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ddsm_tf.export import export
from ddsm_tf.export.requirements import check_requirements
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.report import write_report
from ddsm_tf.training.run import Run
from ddsm_tf.training.search import search_run
from ddsm_tf.training.train import open_run, train


def run_demo(out: str | os.PathLike, echo: Callable[[str], None]) -> None:
    """Train, search, export and report; stages that are done already are not done again.

    Args:
        out: run folder; an interrupted demo goes on there.
        echo: prints a line.

    Raises:
        InputError: `out` holds something else, or see `check_requirements`.
        MissingExtraError: see `check_requirements`.
    """
    # Before minutes of training and searching.
    check_requirements("bundle")
    started = time.monotonic()
    run = open_run(out, get_preset("digits"), resume=True)
    with _stage("train a slimmable UNet on real handwritten digits", echo):
        train(run)
    with _stage("search which width each step needs", echo):
        echo(search_run(run, resume=True))
    with _stage("export for devices without TensorFlow", echo):
        echo(str(_export_bundle(run)))
    with _stage("report", echo):
        path = write_report(run)
    echo(f"done in {time.monotonic() - started:.0f} s; open {path.resolve()}")


def _export_bundle(run: Run) -> os.PathLike:
    return export(
        "bundle",
        run.load_unet(),
        run.noise_table,
        run.schedule(None),
        run.bundle_path,
        provenance=run.provenance,
        overwrite=True,
    )


@contextmanager
def _stage(title: str, echo: Callable[[str], None]) -> Iterator[None]:
    echo(f"== {title}")
    started = time.monotonic()
    yield
    echo(f"   {time.monotonic() - started:.0f} s")
