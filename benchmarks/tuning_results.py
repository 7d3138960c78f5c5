"""The section of RESULTS.md about networks that went on training for one schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from schedule_results import difference_cell, distance_cell
from tables import table

UNTUNED, TRAINING = "untuned", "training "


def section(content: Mapping[str, Any]) -> Iterator[str]:
    """What each training on was, and distances before and after."""
    run = content["run"]
    trainings = {
        name.removeprefix(TRAINING): found
        for name, found in content.items()
        if name.startswith(TRAINING)
    }
    rows = [found for name, found in content.items() if " at " in name]
    full = max((row for row in rows if row["network"] == UNTUNED), key=_cost)
    full_on = max((row for row in rows if row["network"] != UNTUNED), key=_cost)
    yield f"## Training on for one schedule: `{run['preset']}`"
    yield ""
    yield (
        f"The network of `ddsm train {run['preset']}` ({run['training_steps']:,} steps of "
        f"{run['batch_size']} images, weighting {run['weighting']}), and what `ddsm tune` made of "
        f"it; {run['sampler']}, {rows[0]['images']:,} images from each of "
        f"{len(rows[0]['distances'])} seeds, the same "
        "noise for all. Distance: Fréchet, on features of a classifier of these images; mean ± "
        "standard deviation over seeds, differences seed by seed ± their standard error. A step of "
        "tuning trains one width: its MACs are beside those of a step that trains full width alone."
    )
    yield ""
    yield from table(
        ["network", "tuned for", "weighting", "steps", "MACs a step"],
        [
            [
                name,
                found["schedule"],
                found["weighting"],
                f"{found['steps']:,} of {found['batch_size']} images",
                f"{found['step_macs']:.0%}",
            ]
            for name, found in trainings.items()
        ],
    )
    yield ""
    head = ["network", "schedule", "MACs", "distance"]
    head += ["beside full width, untuned", f"beside full width, {full_on['network']}"]
    yield from table(head, [_row(row, full, full_on) for row in rows])
    yield ""
    picture = f"results/tuning_{run['preset']}_samples.png"
    yield f"![Rows: the networks of the table, in its order]({picture})"


def _cost(row: Mapping[str, Any]) -> float:
    return row["macs_fraction"]


def _row(row: Mapping[str, Any], *beside: Mapping[str, Any]) -> list[str]:
    cells = [row["network"], row["widths"], f"{row['macs_fraction']:.1%}", distance_cell(row)]
    return cells + [difference_cell(row, other) for other in beside]
