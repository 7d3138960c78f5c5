"""Writes RESULTS.md from what the benchmarks measured: no number in it is typed by hand.

    python benchmarks/results.py

Reads `results/*.json`; a section whose file is not there is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ablation_results
import schedule_results
import speed_results
from tables import measured, table

from ddsm_tf.files import atomic_file

INTRODUCTION = """# Results

Written by `python benchmarks/results.py` from the files in `results/`; `benchmarks/` has the
programs that measured them. Every section names its command, day and machine, and can be measured
again. Times are medians, with the quartiles in brackets; ratios are medians of ratios within a
round, in which everything compared takes its turn.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("-o", "--out", type=Path, default=Path("RESULTS.md"))
    options = parser.parse_args()
    with atomic_file(options.out) as temporary:
        temporary.write_text(page(options.results), encoding="utf-8")


def page(folder: Path) -> str:
    """RESULTS.md of a folder of measurements."""
    parts = [INTRODUCTION]
    for pattern, section in SECTIONS:
        for path in sorted(folder.glob(pattern)):
            content = json.loads(path.read_text(encoding="utf-8"))
            parts.append("\n".join([*section(content), "", *measured(content["provenance"]), ""]))
    return "\n".join(parts)


def footprint(content: Mapping[str, Any]) -> Iterator[str]:
    """Start-up, first image, memory and disk."""
    yield "## Start-up and footprint"
    yield ""
    rows = [
        [f"`{name}`", _seconds(found["seconds"]), f"{found['peak_mb']['median']:.0f} MB"]
        for stage in ("start", "first_image")
        for name, found in content[stage].items()
    ]
    yield from table(["a whole process", "seconds", "peak memory"], rows)
    yield ""
    names = [f"`ddsm_tf[{name}]`" if name != "none" else "`ddsm_tf`" for name in content["disk_mb"]]
    sizes = [f"{megabytes:.0f} MB" for megabytes in content["disk_mb"].values()]
    yield from table(["installed", *names], [["on disk, with all it needs", *sizes]])
    yield ""
    yield from _bundle(content["bundle"])


def _bundle(bundle: Mapping[str, Any]) -> Iterator[str]:
    one, every = bundle["memory"].values()
    widths = bundle["assembly_seconds"]
    head = ["the network's bundle, float32, batch 1", *(f"width {float(w):g}" for w in widths)]
    rows = [
        ["seconds to read and assemble", *map(_seconds, widths.values())],
        ["peak memory, alone", *(f"{one['widths'][width]:.0f} MB" for width in widths)],
    ]
    yield from table(head, rows)
    yield ""
    size, widest = bundle["bytes"], bundle["widest_bytes"]
    yield (
        f"The bundle has {size / 1e6:.1f} MB, {size / widest:.4f} times its widest network's file. "
        f"A schedule of all widths takes {one['schedule']:.0f} MB "
        f"with one network resident, {every['schedule']:.0f} MB with all."
    )


def _seconds(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


Section = Callable[[Mapping[str, Any]], Iterator[str]]
SECTIONS: Sequence[tuple[str, Section]] = (
    ("schedules_*.json", schedule_results.section),
    ("ablations_*.json", ablation_results.section),
    ("inference_speed.json", speed_results.inference),
    ("trajectory_speed.json", speed_results.trajectories),
    ("training_speed_*.json", speed_results.training),
    ("footprint.json", footprint),
)


if __name__ == "__main__":
    main()
