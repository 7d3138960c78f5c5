"""The fine-tuning that `ddsm export RUN … --optimize METHOD` adds to an export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ddsm_tf.errors import invalid
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run

# Option of the command → the field it sets, and the one method that has it.
OPTIONS = {
    "optimize_steps": ("steps", None),
    "sparsity": ("sparsity", "prune"),
    "clusters": ("clusters", "cluster"),
}


@contextlib.contextmanager
def fine_tuning(run: Run, method: str | None, **options: Any) -> Iterator[dict[str, Any]]:
    """Further arguments of `ddsm_tf.export.export`, and a progress bar for as long as it runs.

    Args:
        run: fine-tunes on the images that it was trained on.
        method: "prune", "cluster", "qat", or None for an export without it.
        options: of `OPTIONS`; None takes the default of `ddsm_tf.export.optimize.Optimization`.

    Raises:
        InputError: an option without a method, or with another than its own.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        of_method = OPTIONS[name][1] or method
        if method is None or of_method != method:
            rule = f"needs --optimize {of_method or 'prune, cluster or qat'}"
            raise invalid(f"--{name.replace('_', '-')}", value, rule)
    if method is None:
        yield {}
        return
    from ddsm_tf.export.optimize import Optimization

    fields = {OPTIONS[name][0]: value for name, value in given.items()}
    config = run.config
    fields |= {"seed": config.seed, "weighting": config.weighting}
    training, _ = run.load_split()
    tuning = {"images": run.denoised(training.images)}
    if config.num_classes:
        fields["label_dropout"] = config.label_dropout
        tuning["labels"] = training.labels
    optimization = Optimization(method, **fields)
    with progress_bar(optimization.steps * len(config.widths), method) as bar:
        yield {**tuning, "optimization": optimization, "on_step": bar.update}
