"""Where a run trains: one device, the devices of a host, or several hosts."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from dataclasses import dataclass
from typing import Any

import keras

from ddsm_tf.errors import InputError, invalid

STRATEGIES = ("auto", "single", "mirrored", "multiworker")


@dataclass(frozen=True)
class Placement:
    """The devices of a run.

    Attributes:
        strategy: a `tf.distribute.Strategy`, or None for one device.
        worker: this process's place among the workers.
        workers: how many processes train together.
        replicas: devices of all workers.
    """

    strategy: Any = None
    worker: int = 0
    workers: int = 1
    replicas: int = 1

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run folder; the others only read it."""
        return self.worker == 0

    def scope(self) -> contextlib.AbstractContextManager:
        """Where models and optimizers must be made."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def check_batch(self, batch_size: int) -> None:
        """Raise `InputError` unless the devices can share a batch evenly."""
        if batch_size % self.replicas:
            rule = f"must be divisible by the {self.replicas} devices that share it"
            raise invalid("batch_size", batch_size, rule)

    def describe(self, batch_size: int, learning_rate: float) -> str:
        """One line: how the global batch is shared, and that the rate is not scaled with it."""
        each = batch_size // self.replicas
        local = self.replicas // self.workers
        return (
            f"global batch {batch_size} = {self.workers} workers × {local} devices × {each} "
            f"images; learning rate {learning_rate:g}, as set, not scaled by the devices"
        )


def make_placement(choice: str = "auto") -> Placement:
    """The devices that a user asked for. Call it before anything else uses TensorFlow.

    Args:
        choice: "single"; "mirrored", every GPU of this host, or its CPU where there is none;
            "multiworker", every worker of `TF_CONFIG`; or "auto", the last of these that there is
            more than one of.

    Raises:
        InputError: another choice, a broken `TF_CONFIG`, or a backend other than TensorFlow.
    """
    if choice not in STRATEGIES:
        raise invalid("--strategy", choice, f"must be one of {', '.join(STRATEGIES)}")
    workers, worker = _cluster()
    if choice == "auto":
        choice = _best(workers)
    if choice == "single":
        return Placement()
    if keras.backend.backend() != "tensorflow":
        rule = f"needs the TensorFlow backend, not {keras.backend.backend()}"
        raise invalid("--strategy", choice, rule)
    import tensorflow as tf

    if choice == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        if len(devices) == 1:
            return Placement()
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
        return Placement(strategy, replicas=len(devices))
    if workers < 2:
        rule = "needs TF_CONFIG with two workers or more; see docs/distributed.md"
        raise invalid("--strategy", choice, rule)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    return Placement(strategy, worker, workers, strategy.num_replicas_in_sync)


def _best(workers: int) -> str:
    if keras.backend.backend() != "tensorflow":
        return "single"
    if workers > 1:
        return "multiworker"
    import tensorflow as tf

    return "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "single"


def _cluster() -> tuple[int, int]:
    """Number of workers and this one's index, of `TF_CONFIG`."""
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return 1, 0
    try:
        config = json.loads(text)
        hosts = config["cluster"]["worker"]
        kind, index = config["task"]["type"], config["task"]["index"]
        # Operators call the first worker "chief".
        chiefs = config["cluster"].get("chief", [])
        if kind not in ("chief", "worker") or not isinstance(index, int):
            raise ValueError("task must be a worker with an index")
        place = index if kind == "chief" else index + len(chiefs)
        count = len(hosts) + len(chiefs)
        if not 0 <= place < count:
            raise ValueError(f"task {place} is none of the {count} workers")
    except (ValueError, KeyError, TypeError) as error:
        rule = f'must be {{"cluster": {{"worker": [HOST:PORT, …]}}, "task": …}} ({error})'
        raise invalid("TF_CONFIG", text[:200], rule) from error
    return count, place


def peak_memory_gib() -> float:
    """Most memory used so far, in GiB: of the first GPU, or of this process where there is none."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if tf.config.list_logical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def restart_after(error: Exception, restarts: int) -> None:
    """Start this process again after a worker was lost, to go on from the last checkpoint.

    The collective operations of the workers that are left fail some seconds after one is gone, and
    cannot be taken up again in the same process.

    Args:
        error: what training raised.
        restarts: how many more times to try.

    Raises:
        InputError: none are left.
    """
    if restarts <= 0:
        raise InputError(
            f"a worker was lost and did not come back ({_first_line(error)}); start all workers "
            "again with --resume"
        ) from error
    print(f"a worker was lost ({_first_line(error)}); starting again", file=sys.stderr, flush=True)
    # As it was started: -m would import modules that lie in the working directory, which `ddsm`
    # does not, and -P would miss there what `python -m ddsm_tf.cli` found.
    arguments = [each for each in sys.orig_argv[1:] if each != "--resume"]
    environment = {**os.environ, RESTARTS: str(restarts - 1)}
    os.execve(sys.executable, [sys.executable, *arguments, "--resume"], environment)


RESTARTS = "DDSM_RESTARTS"
"""How many restarts a worker has left."""


def restarts_left() -> int:
    """Of `DDSM_RESTARTS`, 10 at first."""
    text = os.environ.get(RESTARTS, "10")
    return int(text) if text.isascii() and text.isdigit() else 10


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
