"""The section of RESULTS.md about what the size of a network has to do with what schedules save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from schedule_results import (
    FULL,
    SEARCHED,
    difference_cell,
    distance_cell,
    row_of,
    training_command,
)
from tables import table

SIZE = "base "
UNIFORM = "uniform:"


def section(content: Mapping[str, Any]) -> Iterator[str]:
    """What is saved at each size, and every width of every size by its MACs."""
    sizes = [found for name, found in content.items() if name.startswith(SIZE)]
    sizes.sort(key=lambda found: found["base_channels"])
    first = sizes[0]
    side = first["image_size"]
    yield f"## The size of the network: `{first['preset']}` at {side}×{side}"
    yield ""
    yield (
        f"Networks of several sizes, all trained for {first['training_steps']:,} steps of "
        f"{first['batch_size']} images, each at the widest, the narrowest and "
        f"{first['middle_widths']} of the other widths; "
        f"{first['sampler']}, {first['trials']} trials of {first['images']} images, measured with "
        f"{first['fresh_images']:,} images from each of {len(first['rows'][0]['distances'])} "
        "seeds that no search has seen. Distance: Fréchet, on features of one classifier of these "
        f"images, on which {first['images']} real ones have {first['floor']:.2f}; mean ± standard "
        "deviation over seeds. Beside full: the mean difference from the same seeds ± its "
        'standard error. "searched" is the cheapest that was as good as full width when the '
        "search confirmed its finalists. Each network was trained once: that another training "
        "would differ is not in the spreads."
    )
    yield ""
    uniform = [row["name"] for row in first["rows"] if row["name"].startswith(UNIFORM)]
    budgets = [row["name"] for row in first["rows"] if row["name"].startswith(f"{SEARCHED}, ")]
    head = ["base", "full width", "searched: MACs saved", "beside full"]
    head += [f"{name} of the MACs, beside full" for name in budgets]
    head += [f"{name}, beside full" for name in uniform]
    yield from table(head, [_size(found, [*budgets, *uniform]) for found in sizes])
    yield ""
    for found in sizes:
        base = found["base_channels"]
        yield f"- base {base}: `{training_command(found, f'b{base}')}`"
    yield ""
    yield "The same networks, one width throughout, by what a step costs:"
    yield ""
    widths = [_width(found, width) for found in sizes for width in found["macs"]]
    head = ["million MACs an image", "base", "width", "distance"]
    yield from table(head, [cells for _, cells in sorted(widths)])
    yield ""
    for found in sizes:
        base = found["base_channels"]
        picture = f"results/capacity_{found['preset']}_{base}"
        yield f"![Pareto front, base {base}]({picture}_pareto.png)"
        yield f"![Rows of base {base}: full width, searched, {budgets[-1]}]({picture}_samples.png)"


def _size(found: Mapping[str, Any], names: list[str]) -> list[str]:
    full, searched = row_of(found, FULL), row_of(found, SEARCHED)
    cells = [str(found["base_channels"]), distance_cell(full)]
    cells += [f"{1.0 - searched['macs_fraction']:.0%}", difference_cell(searched, full)]
    rows = [row_of(found, name) for name in names]
    return cells + [f"{difference_cell(row, full)} at {row['macs_fraction']:.0%}" for row in rows]


def _width(found: Mapping[str, Any], width: str) -> tuple[int, list[str]]:
    """MACs, and a row: a network at one width throughout."""
    macs = found["macs"][width]
    name = FULL if float(width) == 1.0 else f"{UNIFORM}{width}"
    cells = [f"{macs / 1e6:.1f}", str(found["base_channels"]), width]
    return macs, [*cells, distance_cell(row_of(found, name))]
