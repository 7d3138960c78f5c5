"""A search on many machines: Keras Tuner's chief and workers, made to outlive each other.

Keras Tuner reads from the environment what a process is. A worker asks the chief's oracle by gRPC
instead of its own, and says every few seconds that it is still there; the chief gives the trial of
a worker that fell silent to the next one that asks.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import keras_tuner
from keras_tuner.engine import trial as trial_module

# Keras Tuner has no public names for its client, nor for the gRPC stub that the client calls.
from keras_tuner.src import protos
from keras_tuner.src.distribute import oracle_client

from ddsm_tf.errors import ForeseenFailure, invalid
from ddsm_tf.search.oracle import FINGERPRINT, ScheduleOracle

IP, PORT, TUNER_ID = "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID"

START_TIMEOUT = 600.0
"""Seconds that a worker waits for a chief that it has not heard of yet."""
CHIEF_TIMEOUT = 60.0
"""Seconds without an answer after which a worker takes the chief for lost."""
WORKER_TIMEOUT = 30.0
"""Seconds of silence after which the chief takes a worker for lost."""
HEARTBEAT = 5.0
"""Seconds between two signs of life of a worker that runs a trial."""
PAUSE = 0.2
"""Seconds until a worker asks again that got nothing to do, or no answer."""
TICK = 1.0
"""Seconds between two looks of the chief at its workers."""

_GONE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


class ChiefLost(ForeseenFailure, keras_tuner.errors.FatalRuntimeError):
    """The chief no longer answers. The message names its address and the remedy.

    It is an error that Keras Tuner does not take for a failed trial.
    """


class Role(enum.Enum):
    """What Keras Tuner's environment variables make of this process."""

    ALONE = "alone"
    CHIEF = "chief"
    WORKER = "worker"

    @classmethod
    def from_environment(cls) -> Role:
        """This process's role.

        Raises:
            InputError: some variables are set and others are not, or the port is none.
        """
        values = {name: os.environ.get(name) for name in (IP, PORT, TUNER_ID)}
        if all(value is None for value in values.values()):
            return cls.ALONE
        for name, value in values.items():
            if not value:
                # Without the address, Keras Tuner would quietly run the whole search here.
                rule = f"must be set: {IP}, {PORT} and {TUNER_ID} go together; set all or none"
                raise invalid(name, value, rule)
        port = values[PORT]
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise invalid(PORT, port, "must be a whole number from 1 to 65535")
        # This is Keras Tuner's own rule.
        return cls.CHIEF if "chief" in values[TUNER_ID] else cls.WORKER

    def wait_for(self, path: str | os.PathLike) -> None:
        """Wait, if this is a worker, till the chief has written a file, for `START_TIMEOUT`.

        Raises:
            ChiefLost: there is no such file yet.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while self is Role.WORKER and not Path(path).exists():
            if time.monotonic() > deadline:
                raise ChiefLost(
                    f"the chief has not written {path} in {START_TIMEOUT:g} s; start it, and share "
                    "or copy its run folder, then start this worker"
                )
            time.sleep(PAUSE)


def check_free() -> None:
    """Check that a chief can listen where the environment says.

    gRPC would let two chiefs share a port, and deal the workers out between them.

    Raises:
        InputError: the port is taken, or the address is not of this machine.
    """
    ip, port = os.environ[IP], os.environ[PORT]
    try:
        found = socket.getaddrinfo(ip.strip("[]"), port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            rule = f"must be a free port of {ip}; choose another, or end what listens there"
            raise invalid(PORT, port, rule) from error
        raise invalid(IP, ip, "must be an address of this machine, the chief's") from error


@contextlib.contextmanager
def repeating(action: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call `action` every so many seconds, in a thread of its own, while the block runs."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            action()

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def watching(oracle: ScheduleOracle) -> contextlib.AbstractContextManager[None]:
    """Take back what silent workers hold while the block serves; Keras Tuner's chief never does."""
    return repeating(lambda: oracle.count_silence(TICK, WORKER_TIMEOUT), TICK)


class WorkerOracle(oracle_client.OracleClient):
    """The chief's oracle as a worker sees it.

    Every call is safe to repeat, and is repeated till the chief answers: a chief that is started
    again within `CHIEF_TIMEOUT` finds its workers waiting.

    Args:
        oracle: the worker's own, which says which run the worker has.

    Raises:
        ChiefLost: by any method, when the chief does not answer.
    """

    def __init__(self, oracle: ScheduleOracle) -> None:
        super().__init__(oracle)
        self.fingerprint = oracle.fingerprint
        self.on_trial: Callable[[], None] | None = None
        self.stub = _PatientStub(f"{os.environ[IP]}:{os.environ[PORT]}")

    def create_trial(self, tuner_id: str) -> Any:
        """The next trial to run.

        Raises:
            InputError: the chief searches for another run than this worker.
        """
        self.check_run()
        trial = super().create_trial(tuner_id)
        if trial.status == trial_module.TrialStatus.IDLE:
            # Keras Tuner asks again at once.
            time.sleep(PAUSE)
        return trial

    def end_trial(self, trial: Any) -> None:
        """Tell the chief that a trial has ended."""
        super().end_trial(trial)
        if self.on_trial:
            self.on_trial()

    def check_run(self) -> None:
        """Raise `InputError` if the chief searches for another run than this worker."""
        chiefs = self.get_space().values.get(FINGERPRINT)
        if chiefs != self.fingerprint:
            rule = "this worker's run differs from the chief's; copy the chief's run folder"
            raise invalid(FINGERPRINT, self.fingerprint, f"must be {chiefs!r}: {rule}")

    @contextlib.contextmanager
    def running(self, trial_id: str) -> Iterator[None]:
        """Tell the chief again and again that the trial runs, while the block runs it.

        Raises:
            InputError: at the end, if the chief was replaced by that of another run meanwhile.
        """

        def beat() -> None:
            # A chief that is gone may be back when there is a result to report.
            with contextlib.suppress(keras_tuner.errors.FatalRuntimeError):
                self.get_trial(trial_id)

        with repeating(beat, HEARTBEAT):
            yield
        self.check_run()


class _PatientStub:
    """Keras Tuner's gRPC stub; its calls bear with a chief that is away, but not for ever."""

    def __init__(self, address: str) -> None:
        # gRPC would let up to two minutes pass between two attempts to connect.
        options = [("grpc.max_reconnect_backoff_ms", 1000)]
        channel = grpc.insecure_channel(address, options)
        self._stub = protos.get_service_grpc().OracleStub(channel)
        self._address = address
        self._met = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._ask, getattr(self._stub, name))

    def _ask(self, method: Callable[..., Any], request: Any, **_hour: Any) -> Any:
        """Call `method` till it answers; Keras Tuner's own timeout of an hour is dropped."""
        patience = CHIEF_TIMEOUT if self._met else START_TIMEOUT
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = method(request, wait_for_ready=True, timeout=left)
            except grpc.RpcError as error:
                if error.code() not in _GONE:
                    message = f"the chief at {self._address} failed: {error.details()}"
                    raise keras_tuner.errors.FatalRuntimeError(message) from None
                time.sleep(PAUSE)
            else:
                self._met = True
                return answer
        raise ChiefLost(
            f"the chief at {self._address} did not answer for {patience:g} s; "
            "start it again with --resume on the same folder, then this worker"
        )
