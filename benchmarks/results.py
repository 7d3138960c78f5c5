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
import capacity_results
import footprint_results
import schedule_results
import speed_results
import tuning_results
from tables import measured

from ddsm_tf.files import atomic_file

INTRODUCTION = """# Results

Written by `python benchmarks/results.py` from the files in `results/`; `benchmarks/` has the
programs that measured them. Every section names its command, day and machine, and can be measured
again: into another folder than `results`, since what a file holds is not measured again, and then
`python benchmarks/results.py --results FOLDER -o PAGE.md`. Times are medians, with the quartiles in
brackets; ratios are medians of ratios within a round, in which everything compared takes its turn.
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


Section = Callable[[Mapping[str, Any]], Iterator[str]]
SECTIONS: Sequence[tuple[str, Section]] = (
    ("schedules_*.json", schedule_results.section),
    ("capacity_*.json", capacity_results.section),
    ("tuning_*.json", tuning_results.section),
    ("ablations_*.json", ablation_results.section),
    ("inference_speed*.json", speed_results.inference),
    ("trajectory_speed*.json", speed_results.trajectories),
    ("training_speed_*.json", speed_results.training),
    ("footprint.json", footprint_results.section),
)


if __name__ == "__main__":
    main()
