"""What the benchmarks share: where and when numbers were measured, turns, and spreads."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ddsm_tf.errors import invalid
from ddsm_tf.files import read_json, write_json

Key = TypeVar("Key", bound=Hashable)
# Of the processor's features, those that decide how fast a network can be.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "asimddp")
# Rounds that are not counted: the first compiles, the next fill the caches.
WARM_UP = 2


def take_turns(
    functions: Mapping[Key, Callable[[], Any]],
    rounds: int,
    *,
    name: str = "",
    seed: int = 0,
    repeat: int = 2,
) -> dict[Key, np.ndarray]:
    """Time functions that take turns, in another order in every round.

    A machine that slows down meanwhile slows all of them alike, so ratios within a round hold
    where times do not. A turn is `repeat` calls and the last is timed: it finds its own weights in
    the caches, and the threads of whoever ran before have gone to sleep.

    Args:
        functions: name → what to call; it must not return before the work is done.
        rounds: timed turns each, after `WARM_UP` that are not.
        name: of the progress bar.
        seed: of the orders.
        repeat: calls a turn.

    Returns:
        Name → seconds of the timed call in each round, float64 (rounds,).
    """
    keys = list(functions)
    seconds = {key: np.empty(WARM_UP + rounds) for key in keys}
    random = np.random.default_rng(seed)
    for round_number in tqdm(range(WARM_UP + rounds), name, disable=None):
        for place in random.permutation(len(keys)):
            function = functions[keys[place]]
            for _ in range(repeat):
                started = time.perf_counter()
                function()
                elapsed = time.perf_counter() - started
            seconds[keys[place]][round_number] = elapsed
    return {key: found[WARM_UP:] for key, found in seconds.items()}


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, quartiles and number of values."""
    low, median, high = map(float, np.percentile(values, (25, 50, 75)))
    return {"median": median, "low": low, "high": high, "count": len(values)}


def results_file(folder: Path, benchmark: str, name: str | None) -> Path:
    """Where a benchmark writes: `BENCHMARK.json`, or `BENCHMARK_NAME.json` if it has a name."""
    return folder / f"{'_'.join(filter(None, (benchmark, name)))}.json"


class Stages:
    """The JSON file of a benchmark, filled stage by stage; an interrupted one goes on.

    Args:
        path: the file; what it holds already is kept.
        libraries: whose versions matter.
    """

    def __init__(self, path: Path, libraries: Sequence[str]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        known = read_json(path, argument="OUT") if path.exists() else {}
        self.present = provenance(libraries)
        self.content: dict[str, Any] = {"provenance": [], **known}

    def measure(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of a stage: measured now, unless the file has it."""
        if name not in self.content:
            self.content[name] = measure()
            self._note_provenance()
            write_json(self.path, self.content)
        return self.content[name]

    def settle(self, name: str, settings: Mapping[str, Any]) -> None:
        """Keep what all stages are measured with.

        Raises:
            InputError: the file has stages that were measured otherwise.
        """
        settings = json.loads(json.dumps(settings))
        kept = self.measure(name, lambda: settings)
        for key, value in settings.items():
            if kept.get(key) != value:
                rule = f"is {kept.get(key)!r} in {self.path}; write to another folder or --name"
                raise invalid(key, value, rule)

    def _note_provenance(self) -> None:
        """Say by which command, when and where the stage was measured, unless it is said."""
        present, noted = self.present, self.content["provenance"]
        for kept in noted:
            if {**kept, "commands": None} == {**present, "commands": None}:
                kept["commands"] = list(dict.fromkeys([*kept["commands"], *present["commands"]]))
                return
        noted.append(present)


def provenance(libraries: Sequence[str]) -> dict[str, Any]:
    """Commands, date, machine and versions: what a table must name beside its numbers.

    Nothing in it tells whose machine it is.
    """
    program = Path(sys.argv[0])
    return {
        "commands": [shlex.join(["python", f"benchmarks/{program.name}", *sys.argv[1:]])],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: _version(name) for name in ("ddsm_tf", *libraries)},
    }


def machine() -> dict[str, Any]:
    """Processor, its features, CPUs that this process may use, and memory in GiB."""
    described = _cpuinfo()
    return {
        "processor": described.get("model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "features": [each for each in FEATURES if each in described.get("flags", "").split()],
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    found = {name.strip(): value.strip() for name, _, value in pairs}
    # Arm's name for it.
    found.setdefault("flags", found.get("Features", ""))
    return found


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
