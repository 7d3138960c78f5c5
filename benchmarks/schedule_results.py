"""The section of RESULTS.md about what schedules save on a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tables import table

SEARCHED, FULL = "searched", "full"


def section(content: Mapping[str, Any]) -> Iterator[str]:
    """A table for each sampler, with its plot and its images."""
    run = content["run"]
    samplers = [name for name in content if name not in ("run", "provenance")]
    yield f"## What schedules save: `{run['preset']}`"
    yield ""
    yield (
        f"{run['image_size']}×{run['image_size']} images, base {run['base_channels']}, trained for "
        f"{run['training_steps']:,} steps of {run['batch_size']} images, each at the widest, the "
        f"narrowest and {run['middle_widths']} of the other widths: `{training_command(run)}`. "
        "Distance: "
        "Fréchet, on features of a classifier of these images, from noise that no search has seen; "
        "mean ± standard deviation over seeds. Beside full: the mean difference from the same "
        'seeds ± its standard error. "searched" is the cheapest that was as good as full width '
        'when the search confirmed its finalists, "searched, 50%" the nearest that it found for '
        "so many MACs. Random and two-stage schedules cost about what the last of these costs."
    )
    yield ""
    head = ["searched", "MACs saved", "distance", "full width", "beside full"]
    budgets = [
        row["name"].removeprefix(f"{SEARCHED}, ")
        for row in content[samplers[0]]["rows"]
        if row["name"].startswith(f"{SEARCHED}, ")
    ]
    head += [f"beside full, {budget} of the MACs" for budget in budgets]
    yield from table(head, [_summary(name, content[name], budgets) for name in samplers])
    for name in samplers:
        found = content[name]
        yield ""
        yield f"### {name}"
        yield ""
        yield (
            f"{found['trials']} trials of {found['images']} images, "
            f"{found['search_calls']:,.0f} network calls at full width; sampled in "
            f"{found['precision']}, measured with {found['fresh_images']} images a seed. "
            f"{found['images']} real images have {found['floor']:.2f}."
        )
        yield ""
        head = ["schedule", "MACs", "distance", "beside full"]
        yield from table(head, [_row(row, row_of(found, FULL)) for row in found["rows"]])
        yield ""
        for row in found["rows"]:
            if row["name"].startswith(SEARCHED):
                yield f"- {row['name']}: {row['widths']}"
        yield ""
        picture = f"results/schedules_{run['preset']}_{name}"
        yield f"![Pareto front, {name}]({picture}_pareto.png)"
        yield f"![Rows: full width, searched, searched at {budgets[-1]}]({picture}_samples.png)"


def training_command(run: Mapping[str, Any], out: str = "RUN") -> str:
    """The command that trains such a run."""
    changed = dict(run["changed"])
    steps = f" --steps {changed.pop('steps')}" if "steps" in changed else ""
    settings = "".join(f" --set {name}={_setting(value)}" for name, value in changed.items())
    return f"ddsm train {run['preset']}{steps}{settings} --out {out}"


def _setting(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _summary(name: str, found: Mapping[str, Any], budgets: Sequence[str]) -> list[str]:
    full, searched = row_of(found, FULL), row_of(found, SEARCHED)
    saved = f"{1.0 - searched['macs_fraction']:.0%}"
    cells = [
        name,
        saved,
        distance_cell(searched),
        distance_cell(full),
        difference_cell(searched, full),
    ]
    return cells + [difference_cell(row_of(found, f"{SEARCHED}, {b}"), full) for b in budgets]


def row_of(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The row of a schedule."""
    return next(row for row in found["rows"] if row["name"] == name)


def _row(row: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['macs_fraction']:.1%}",
        distance_cell(row),
        difference_cell(row, full),
    ]


def distance_cell(row: Mapping[str, Any]) -> str:
    """Mean ± standard deviation over seeds."""
    distances = np.array(row["distances"])
    return f"{distances.mean():.2f} ± {distances.std(ddof=1):.2f}"


def difference_cell(row: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """Mean difference from the same seeds ± its standard error, and its share."""
    apart = np.subtract(row["distances"], full["distances"])
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    share = apart.mean() / np.mean(full["distances"])
    return f"{apart.mean():+.2f} ± {error:.2f} ({share:+.0%})"
