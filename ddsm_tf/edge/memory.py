"""How much memory sampling takes: the peak of a process that does nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddsm_tf.edge.bundle import Bundle
from ddsm_tf.edge.sampler import EdgeSampler
from ddsm_tf.errors import ForeseenFailure
from ddsm_tf.labels import no_class


def peak_memory(
    bundle: Bundle,
    stages: Sequence[float | None],
    *,
    batch: int = 1,
    threads: int | None = None,
    max_resident: int | None = None,
) -> float | None:
    """Run stages of sampling in a fresh process; returns its peak memory.

    Args:
        bundle: what to load.
        stages: in this order; a width stands for a step at it, None for decoding latents.
        batch: images a step.
        threads: CPU threads of the interpreter.
        max_resident: see `EdgeSampler`.

    Returns:
        Megabytes (10^6 bytes) of resident memory, Python and its libraries included; None where
        the system does not tell.

    Raises:
        ForeseenFailure: the process failed or was killed, for lack of memory perhaps.
    """
    order = [str(bundle.folder), list(stages), batch, threads, max_resident]
    # -P: a module that lies beside a stranger's bundle must not be imported.
    command = [sys.executable, "-P", "-m", "ddsm_tf.edge.memory", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise ForeseenFailure(
            f"the process whose memory is measured was killed by signal {-done.returncode}, for "
            "lack of memory perhaps; make `max_resident` or `batch` smaller"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ForeseenFailure(f"the process whose memory is measured failed: {reason}")
    return json.loads(done.stdout)


def process_peak() -> float | None:
    """Peak resident memory of this process so far, in megabytes; None if the system is silent."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux counts it from the process's own start; getrusage also has its parent's.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 / 1e6 if found else None
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _main(order: str) -> None:
    folder, stages, batch, threads, max_resident = json.loads(order)
    bundle = Bundle.load(folder)
    sampler = EdgeSampler(bundle, threads, max_resident)
    x = np.zeros((batch, *bundle.image_shape), np.float32)
    labels = no_class(bundle.num_classes, batch) if bundle.num_classes else None
    for width in stages:
        if width is None:
            sampler.decode(x)
        else:
            sampler.denoise(x, 0, width, labels)
    print(json.dumps(process_peak()))


if __name__ == "__main__":
    _main(sys.argv[1])
