"""How long commands take to start, how soon the first image is there, memory and disk.

    python benchmarks/footprint.py -o results

Times and memory are of whole processes that take turns: seconds until they end, and their peak.
Images come from the paper's CIFAR-10 network (base 128, 32×32) with random weights; its bundle is
measured by itself: size, time to assemble a network, memory. Disk is what the installed files of
each extra's dependencies take, as `pip` recorded them. Writes `DIR/footprint.json`; an interrupted
run goes on. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Stages, spread, take_turns
from networks import paper_schedule, random_weights
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from ddsm_tf.console import without_stderr
from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge.benchmark import benchmark_memory
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import Run

LIBRARIES = ("tensorflow", "keras", "ai-edge-litert", "numpy")
PACKAGE = "ddsm_tf"
EXTRAS = ("", "edge", "serving", "export", "train", "all")
STEPS = 10
# Runs a command; prints its seconds and, as Linux counts, the KiB of its peak memory.
WAITER = """
import os, sys, time
started = time.perf_counter()
nowhere = os.open(os.devnull, os.O_WRONLY)
to = [(os.POSIX_SPAWN_DUP2, nowhere, 1), (os.POSIX_SPAWN_DUP2, nowhere, 2)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=to)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - started, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def main() -> None:
    """Run the measurements that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10", help="its architecture (cifar10)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/speed"), help="keeps exports")
    options = parser.parse_args()
    stages = Stages(options.out / "footprint.json", LIBRARIES)
    stages.measure("disk_mb", lambda: {extra or "none": megabytes(extra) for extra in EXTRAS})
    stages.measure("start", lambda: processes(start_commands(), options.rounds))
    folder = options.work / f"{options.preset}-footprint"
    commands = image_commands(folder, options.preset)
    stages.measure("first_image", lambda: processes(commands, options.rounds))
    stages.measure("bundle", lambda: bundle_footprint(folder / "bundle", options.rounds))


def start_commands() -> dict[str, list[str]]:
    """Name → command line of what starts and stops."""
    python, scripts = sys.executable, Path(sys.executable).parent
    return {
        "python": [python, "-c", "pass"],
        "import numpy": [python, "-c", "import numpy"],
        "import tensorflow": [python, "-c", "import tensorflow"],
        "import ddsm_tf": [python, "-c", "import ddsm_tf"],
        "import ddsm_tf.edge": [python, "-c", "import ddsm_tf.edge"],
        "from ddsm_tf.models import SlimmableUNet": [
            python,
            "-c",
            "from ddsm_tf.models import SlimmableUNet",
        ],
        "ddsm --help": [str(scripts / "ddsm"), "--help"],
        "ddsm presets": [str(scripts / "ddsm"), "presets"],
        "ddsm-edge --help": [str(scripts / "ddsm-edge"), "--help"],
    }


def image_commands(folder: Path, preset: str) -> dict[str, list[str]]:
    """Name → command line that samples one image from a run or a bundle of random weights."""
    from ddsm_tf.export import export

    run = Run(folder / "run", get_preset(preset))
    bundle, image = folder / "bundle", str(folder / "image.png")
    if not run.weights_path.exists():
        run.path.mkdir(parents=True, exist_ok=True)
        run.config.save(run.path / "config.json")
        model = run.new_model(random_weights(run.new_unet()))
        run.save_weights(model)
    full = run.schedule("full", steps=STEPS)
    if not bundle.exists():
        unet, table = run.load_unet(), run.noise_table
        without_stderr(lambda: export("bundle", unet, table, full, bundle, batch=1))
    scripts = Path(sys.executable).parent
    steps = ["--schedule", "full", "--steps", str(STEPS)]
    edge = [str(scripts / "ddsm-edge"), "sample", str(bundle), "-n", "1", "-o", image]
    return {
        f"ddsm sample, {STEPS} steps": [
            *(str(scripts / "ddsm"), "sample", str(run.path), "-n", "1", *steps, "-o", image)
        ],
        f"ddsm-edge sample, {STEPS} steps": edge,
        "ddsm-edge info": [str(scripts / "ddsm-edge"), "info", str(bundle)],
    }


def bundle_footprint(folder: Path, rounds: int) -> dict[str, Any]:
    """Disk, seconds to read and assemble each network, and peak memory in MB."""
    bundle = Bundle.load(folder)
    assemble = {w: functools.partial(bundle.tflite, w) for w in bundle.widths}
    seconds = take_turns(assemble, rounds, name="assembly", repeat=1)
    memory = {
        name: benchmark_memory(EdgeSampler(bundle, 2, resident), paper_schedule())
        for name, resident in {"one network resident": 1, "all resident": None}.items()
    }
    return {
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "widest_bytes": bundle.networks[bundle.widths[0]].file.bytes,
        "assembly_seconds": {str(width): spread(found) for width, found in seconds.items()},
        "memory": memory,
    }


def processes(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Any]:
    """Seconds and peak memory (MB) of commands that take turns, after one turn that fills caches.

    Raises:
        subprocess.CalledProcessError: a command fails.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in tqdm(range(rounds + 1), "processes", disable=None):
        for name, command in commands.items():
            found[name].append(measure(command))
    result = {}
    for name, runs in found.items():
        seconds, megabytes = np.transpose(runs[1:])
        result[name] = {"seconds": spread(seconds), "peak_mb": spread(megabytes)}
    return result


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Seconds until a command ends, and its peak memory in MB."""
    # A new process starts with the memory of the one that made it as its peak: a small one must.
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", WAITER, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    elapsed, kibibytes = ran.stdout.split()
    return float(elapsed), int(kibibytes) * 1024 / 1e6


def megabytes(extra: str) -> float:
    """MB that the package with an extra and all it depends on take in site-packages."""
    names: set[str] = set()
    _collect(PACKAGE, extra, names)
    return sum(map(_size, names)) / 1e6


def _collect(name: str, extra: str, names: set[str]) -> None:
    """Add a distribution and what it requires."""
    names.add(canonicalize_name(name))
    for line in importlib.metadata.distribution(name).requires or ():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        known = canonicalize_name(requirement.name) in names
        for wanted in requirement.extras or {""}:
            if not known or wanted:
                _collect(requirement.name, wanted, names)


def _size(name: str) -> int:
    files = importlib.metadata.distribution(name).files or ()
    paths = (Path(file.locate()) for file in files)
    return sum(path.stat().st_size for path in paths if path.is_file())


if __name__ == "__main__":
    main()
