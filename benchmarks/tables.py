"""Markdown of measurements: tables, spreads, and under each table where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def with_quartiles(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """`median (low to high)`."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measured(provenance: Mapping[str, Any]) -> Iterator[str]:
    """The command, the day, the machine and the versions."""
    machine = provenance["machine"]
    features = ", ".join(machine["features"])
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    yield "```sh"
    yield provenance["command"]
    yield "```"
    yield ""
    yield (
        f"{provenance['date']}; {machine['processor']} ({machine['architecture']}; {features}), "
        f"{machine['cpus']} CPUs, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, {versions}."
    )
