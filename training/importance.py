"""The importance program: the run's table of denoising errors, measured once and kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from ddsm_tf.cost import cost_per_width, schedule_cost
from ddsm_tf.files import atomic_file
from ddsm_tf.images import to_float
from ddsm_tf.search.allocation import allocate
from ddsm_tf.search.importance import ImportanceTable, measure_importance
from ddsm_tf.training.plots import importance_plot, to_png
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run

TIMESTEPS = 50
IMAGES = 256
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def weights_fingerprint(unet: Any) -> str:
    """SHA-256 of the weights: what was measured of one network says nothing of another."""
    digest = hashlib.sha256()
    # Not `variables`: the seeds of dropout are among them and are drawn anew when it is loaded.
    for variable in unet.weights:
        digest.update(keras.ops.convert_to_numpy(variable).tobytes())
    return digest.hexdigest()


def importance_of(run: Run, model: Any) -> ImportanceTable:
    """The run's table: `importance.json` if it is of these weights, else measured and kept.

    Measured on the run's held-out images; on images it was trained on where none were held out.

    Args:
        run: a trained run.
        model: its `DiffusionModel`.
    """
    path, weights = run.importance_path, weights_fingerprint(model.unet)
    if path.exists():
        table = ImportanceTable.load(path)
        if table.weights == weights:
            return table
    training, held_out = run.load_split()
    chosen = held_out if len(held_out.images) >= 2 else training
    images = np.asarray(run.denoised(chosen.images[:IMAGES]))
    labels = chosen.labels[:IMAGES].astype(np.int32) if run.config.num_classes else None
    timesteps = min(TIMESTEPS, run.config.train_timesteps)
    with progress_bar(timesteps, "importance") as bar:
        table = measure_importance(
            model.denoise,
            run.noise_table,
            images if images.dtype == np.float32 else to_float(images),
            model.unet.widths,
            timesteps=timesteps,
            seed=run.config.seed,
            weights=weights,
            labels=labels,
            on_timestep=bar.update,
        )
    table.save(path)
    with atomic_file(path.with_suffix(".png")) as temporary:
        figure = importance_plot(table, run.schedule("full"), run.noise_table)
        temporary.write_bytes(to_png(figure))
    return table


def importance_schedules(
    run: Run,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    cost: str = "macs",
    budgets: Sequence[float] = BUDGETS,
    switch_penalty: float = 0.0,
    min_run: int = 1,
    out: str | os.PathLike | None = None,
) -> str:
    """Schedules for some budgets straight from the importance table; nothing is sampled.

    Args:
        run: a trained run.
        sampler, steps: of every schedule.
        cost: "macs", "parameters" or "latency:FILE".
        budgets: shares of full width's cost, each in (0, 1].
        switch_penalty: harm of each change of width, as a share of the harm that the narrowest
            width does over all steps.
        min_run: fewest steps at one width before it may change.
        out: folder that gets `budget_B.json` for each; None writes the table alone.

    Returns:
        A line a budget.

    Raises:
        InputError: there are no weights, or an argument leaves its range.
    """
    model = run.load_model()
    base = run.schedule("full", sampler=sampler, steps=steps)
    costs = cost_per_width(cost, model.unet)
    harm = importance_of(run, model).harm(base, run.noise_table)
    full = schedule_cost(base, costs)
    penalty = switch_penalty * float(harm[-1].sum())
    lines = []
    for budget in budgets:
        choice = allocate(
            harm,
            list(costs.values()),
            budget,
            calls=base.calls_of_steps,
            switch_penalty=penalty,
            min_run=min_run,
        )
        schedule = base.with_widths(model.unet.widths[index] for index in choice)
        done = harm[list(choice), np.arange(len(choice))].sum() / harm[-1].sum()
        share = schedule_cost(schedule, costs) / full
        lines.append(
            f"budget {budget:g}: {100 * share:.0f} % of the cost, {100 * done:.1f} % of the "
            f"narrowest width's harm: {schedule.describe()}"
        )
        if out is not None:
            schedule.save(Path(out) / f"budget_{budget:g}.json")
    return "\n".join(lines)
