"""Markdown of measurements: tables, spreads, and under each table where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Best first: a processor that has one has those after it too, or is of another kind.
INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "asimddp": "Neon with dot products",
    "asimd": "Neon",
}


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


def instructions(provenance: Sequence[Mapping[str, Any]]) -> str:
    """The processor's best instructions for networks: what decides which runtime is fastest."""
    features = provenance[0]["machine"]["features"]
    return next((name for feature, name in INSTRUCTIONS.items() if feature in features), "no SIMD")


def measured(provenance: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The commands, the day, the machine and the versions; again for every other day or machine."""
    for place, present in enumerate(provenance):
        if place:
            yield ""
        yield from _measured(present)


def _measured(present: Mapping[str, Any]) -> Iterator[str]:
    machine = present["machine"]
    features = ", ".join(machine["features"])
    versions = ", ".join(f"{name} {number}" for name, number in present["versions"].items())
    yield "```sh"
    yield from present["commands"]
    yield "```"
    yield ""
    yield (
        f"{present['date']}; {machine['processor']} ({machine['architecture']}; {features}), "
        f"{machine['cpus']} CPUs, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, {versions}."
    )
