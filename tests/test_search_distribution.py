"""A search on many workers: Keras Tuner's chief and its workers, as processes of this machine."""

import contextlib
import itertools
import multiprocessing
import os
import socket
import sys
import threading
import time
import types
from concurrent import futures
from multiprocessing import forkserver
from pathlib import Path

import grpc
import numpy as np
import pytest
from keras_tuner.src import protos
from keras_tuner.src.distribute import oracle_chief
from keras_tuner.src.engine import oracle as oracle_module
from search_stand_ins import GENERATION, TRIALS, Climber, contents, make_oracle, measure

from ddsm_tf.errors import InputError
from ddsm_tf.search import ScheduleOracle, ScheduleTuner, distribution

pytestmark = pytest.mark.timeout(120)
PATIENCE = 40.0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a single process finds."""
    folder = tmp_path_factory.mktemp("alone")
    ScheduleTuner(ScheduleOracle(Climber(), TRIALS), measure, folder).search()
    found = contents(folder)
    assert len(found) == TRIALS
    return found


# Processes


def take_part(tuner_id, port, folder, fingerprint="", hold=(), **constants):
    """A process: the chief, or a worker, of the search in `folder`.

    Each evaluation leaves a file. A worker whose `hold` has an evaluation's number waits with that
    one until there is a file "go".
    """
    log = os.open(folder / f"{tuner_id}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment(tuner_id, port))
    for name, value in constants.items():
        setattr(distribution, name, value)
    # The chief sleeps for twenty seconds where a worker is slow to leave.
    oracle_chief.time = types.SimpleNamespace(sleep=lambda _: time.sleep(0.1))
    random, numbers = np.random.default_rng(sum(map(ord, tuner_id))), itertools.count()

    def measured(schedule):
        number = next(numbers)
        text = "-".join(map(str, schedule.widths[::2]))
        (folder / f"evaluation_{text}_{tuner_id}_{number}").touch()
        time.sleep(random.uniform(0.0, 0.1))
        while number in hold and not (folder / "go").exists():
            time.sleep(0.02)
        return measure(schedule)

    finished = []
    oracle = ScheduleOracle(Climber(), TRIALS, fingerprint)
    tuner = ScheduleTuner(oracle, measured, folder, on_trial=lambda: finished.append(1))
    tuner.search()
    (folder / f"{tuner_id}.finished").write_text(str(len(finished)))


def environment(tuner_id, port):
    names = distribution.IP, distribution.PORT, distribution.TUNER_ID
    return dict(zip(names, ("127.0.0.1", str(port), tuner_id), strict=True))


@pytest.fixture(scope="module")
def context():
    """Starts processes that have imported everything: forks of one that did, without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("KERAS_BACKEND", "numpy")
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(context, tmp_path):
    """Starts a process of the search in `tmp_path`; none outlives the test."""
    started, port = [], free_port()

    def start(tuner_id, **options):
        process = context.Process(target=take_part, args=(tuner_id, port, tmp_path), kwargs=options)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def evaluations(folder, tuner_id="*"):
    """The schedules that were evaluated, once for each time."""
    return [file.name.split("_")[1] for file in folder.glob(f"evaluation_*_{tuner_id}_*")]


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def join(processes, folder):
    """Wait for processes; returns their exit codes and all that they have printed."""
    for process in processes:
        process.join(PATIENCE)
    printed = "".join(file.read_text() for file in sorted(folder.glob("*.log")))
    return [process.exitcode for process in processes], printed


def test_three_workers_find_what_one_process_finds(start, tmp_path, alone):
    workers = [start(tuner_id, hold=[0]) for tuner_id in ("w0", "w1", "w2")]
    processes = [start("chief"), *workers]
    wait_for(lambda: len(evaluations(tmp_path)) == 3)
    (tmp_path / "go").touch()
    assert join(processes, tmp_path) == ([0] * 4, "")
    assert contents(tmp_path) == alone
    assert len(evaluations(tmp_path)) == len(set(evaluations(tmp_path))) == TRIALS
    counts = {file.stem: int(file.read_text()) for file in tmp_path.glob("*.finished")}
    assert counts.pop("chief") == sum(counts.values()) == TRIALS
    assert min(counts.values()) > 0


def test_a_killed_workers_trial_is_run_by_another(start, tmp_path, alone):
    quick = {"WORKER_TIMEOUT": 3.0, "TICK": 0.1, "HEARTBEAT": 0.1}
    chief, victim = start("chief", **quick), start("victim", hold=[0], **quick)
    wait_for(lambda: evaluations(tmp_path, "victim"))
    others = [start(tuner_id, **quick) for tuner_id in ("w0", "w1")]
    wait_for(lambda: len(evaluations(tmp_path)) == GENERATION)
    victim.kill()
    assert join([chief, *others], tmp_path) == ([0] * 3, "")
    assert contents(tmp_path) == alone
    everybodys, lost = evaluations(tmp_path), evaluations(tmp_path, "victim")
    assert sorted(everybodys) == sorted([*set(everybodys), *lost])


def test_workers_end_when_the_chief_is_lost(start, tmp_path):
    quick = {"CHIEF_TIMEOUT": 1.0, "HEARTBEAT": 0.1}
    chief, busy = start("chief"), start("busy", hold=[0], **quick)
    wait_for(lambda: evaluations(tmp_path, "busy"))
    idle = start("idle", **quick)
    wait_for(lambda: len(evaluations(tmp_path)) == GENERATION)
    chief.kill()
    killed = time.monotonic()
    (tmp_path / "go").touch()
    codes, printed = join([busy, idle], tmp_path)
    assert time.monotonic() - killed < 5.0
    assert codes == [1, 1]
    lines = [line for line in printed.splitlines() if "ChiefLost: " in line]
    assert len(lines) == 2
    for line in lines:
        assert "the chief at 127.0.0.1:" in line
        assert "did not answer for 1 s; start it again with --resume on the same folder" in line


def test_a_chief_may_be_started_again_under_its_workers(start, tmp_path, alone):
    chief, busy = start("chief"), start("busy", hold=[0])
    wait_for(lambda: evaluations(tmp_path, "busy"))
    idle = start("idle")
    wait_for(lambda: len(evaluations(tmp_path)) == GENERATION)
    chief.kill()
    chief.join()
    finished = evaluations(tmp_path, "idle")
    again = start("chief")
    # The chief cannot know that the trial still runs, and gives it to the idle worker.
    wait_for(lambda: len(evaluations(tmp_path)) > GENERATION)
    (tmp_path / "go").touch()
    assert join([again, busy, idle], tmp_path) == ([0] * 3, "")
    assert contents(tmp_path) == alone
    assert len(evaluations(tmp_path)) == TRIALS + 1
    assert all(evaluations(tmp_path).count(schedule) == 1 for schedule in finished)


# One process: a chief's server and a worker of it


@pytest.fixture
def oracle(tmp_path):
    """An oracle of two trials."""
    return make_oracle(tmp_path, max_trials=2)


@contextlib.contextmanager
def served(oracle, monkeypatch, tuner_id="worker"):
    """Serve `oracle`; in the block this process is a worker of it."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    servicer = oracle_chief.OracleServicer(oracle)
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with monkeypatch.context() as patch:
        for name, value in environment(tuner_id, port).items():
            patch.setenv(name, value)
        try:
            yield
        finally:
            server.stop(None).wait()


def test_a_worker_of_another_run_is_refused(oracle, tmp_path, monkeypatch):
    own = ScheduleOracle(Climber(), 2, fingerprint="mine")
    with served(oracle, monkeypatch):
        tuner = ScheduleTuner(own, measure, tmp_path / "worker")
        with pytest.raises(InputError, match="differs from the chief's; copy the chief's run"):
            tuner.search()
    assert oracle.trials == {}


def test_a_result_is_kept_from_a_chief_of_another_run(oracle, tmp_path, monkeypatch):
    """The chief is replaced while a trial runs."""
    own = ScheduleOracle(Climber(), 2)

    def replaced(schedule):
        oracle.hyperparameters = ScheduleOracle(Climber(), 2, "new").hyperparameters
        return measure(schedule)

    with served(oracle, monkeypatch):
        tuner = ScheduleTuner(own, replaced, tmp_path / "worker")
        with pytest.raises(InputError, match="copy the chief's run"):
            tuner.search()
    assert oracle.results() == {} and oracle.end_order == []


def test_a_long_trial_is_not_taken_from_a_living_worker(oracle, monkeypatch):
    monkeypatch.setattr(distribution, "HEARTBEAT", 0.05)
    with served(oracle, monkeypatch):
        worker = distribution.WorkerOracle(oracle)
        with worker.running(worker.create_trial("worker").trial_id):
            for _ in range(15):
                oracle.count_silence(1.0, 10.0)
                time.sleep(0.1)
    assert list(oracle.ongoing_trials) == ["worker"]


def test_an_idle_worker_takes_a_breath(oracle, monkeypatch):
    for tuner_id in "ab":
        oracle.create_trial(tuner_id)
    with served(oracle, monkeypatch):
        worker, before = distribution.WorkerOracle(oracle), time.monotonic()
        assert worker.create_trial("worker").status == "IDLE"
        assert time.monotonic() - before >= distribution.PAUSE


def test_what_fails_in_the_chief_ends_the_worker_in_one_line(oracle, tmp_path, monkeypatch):
    own = ScheduleOracle(Climber(), 2)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(oracle, "_save_trial", full)
    with served(oracle, monkeypatch):
        tuner = ScheduleTuner(own, measure, tmp_path / "worker")
        with pytest.raises(RuntimeError, match=r"^the chief at .* failed: .*no space left"):
            tuner.search()
    assert not oracle_module.LOCKS[oracle].locked()


def test_a_call_that_was_cut_off_is_made_again(oracle, monkeypatch):
    class CutOff(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.UNAVAILABLE

    with served(oracle, monkeypatch):
        worker, calls = distribution.WorkerOracle(oracle), []
        ask = worker.stub._stub.GetSpace

        def cut_off_once(*args, **kwargs):
            calls.append(1)
            if len(calls) == 1:
                raise CutOff
            return ask(*args, **kwargs)

        monkeypatch.setattr(worker.stub._stub, "GetSpace", cut_off_once)
        assert worker.get_space().values["search"] == "" and len(calls) == 2


def test_a_chief_lost_at_the_report_makes_no_failed_trial(oracle, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise distribution.ChiefLost("gone")

    with served(oracle, monkeypatch):
        tuner = ScheduleTuner(ScheduleOracle(Climber(), 2), measure, tmp_path / "worker")
        monkeypatch.setattr(tuner.oracle, "update_trial", lost)
        with pytest.raises(distribution.ChiefLost, match=r"^gone$"):
            tuner.search()
    assert oracle.end_order == []


def test_a_chief_that_never_starts_is_not_waited_for_in_vain(oracle, monkeypatch):
    monkeypatch.setattr(distribution, "START_TIMEOUT", 0.5)
    for name, value in environment("worker", free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distribution.ChiefLost, match=r"did not answer for 0\.5 s"):
        distribution.WorkerOracle(oracle).get_space()


# The environment


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({distribution.PORT: None}, "`KERASTUNER_ORACLE_PORT` (=None) must be set"),
        ({distribution.TUNER_ID: None}, "`KERASTUNER_TUNER_ID` (=None) must be set"),
        ({distribution.IP: None}, "`KERASTUNER_ORACLE_IP` (=None) must be set"),
        ({distribution.IP: ""}, "`KERASTUNER_ORACLE_IP` (='') must be set"),
        ({distribution.PORT: "http"}, "`KERASTUNER_ORACLE_PORT` (='http') must be a whole number"),
        ({distribution.PORT: "0"}, "`KERASTUNER_ORACLE_PORT` (='0') must be a whole number"),
        ({distribution.PORT: "65536"}, "`KERASTUNER_ORACLE_PORT` (='65536') must be a whole"),
    ],
)
def test_an_odd_environment_is_refused_in_one_line(tmp_path, monkeypatch, changes, line):
    for name, value in {**environment("w0", 8000), **changes}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        ScheduleTuner(ScheduleOracle(Climber(), 2), measure, tmp_path)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_the_environment_says_what_a_process_is(monkeypatch):
    for name in environment("", 0):
        monkeypatch.delenv(name, raising=False)
    assert distribution.Role.from_environment() is distribution.Role.ALONE
    for tuner_id, role in (("chief", distribution.Role.CHIEF), ("w0", distribution.Role.WORKER)):
        for name, value in environment(tuner_id, 8000).items():
            monkeypatch.setenv(name, value)
        assert distribution.Role.from_environment() is role


def test_a_worker_waits_for_the_chiefs_file(tmp_path, monkeypatch):
    monkeypatch.setattr(distribution, "START_TIMEOUT", 0.5)
    file, worker = tmp_path / "settings.json", distribution.Role.WORKER
    distribution.Role.CHIEF.wait_for(file)
    with pytest.raises(distribution.ChiefLost, match=r"settings\.json in 0\.5 s; start it"):
        worker.wait_for(file)
    writing = threading.Timer(0.2, file.touch)
    writing.start()
    worker.wait_for(file)
    writing.join()


def test_a_chief_takes_no_port_of_another(oracle, tmp_path, monkeypatch):
    # The other is a chief as well, with which gRPC would share.
    with served(oracle, monkeypatch, "chief"):
        tuner = ScheduleTuner(ScheduleOracle(Climber(), 2), measure, tmp_path)
        with pytest.raises(InputError, match=r"`KERASTUNER_ORACLE_PORT` \(='\d+'\) must be a free"):
            tuner.search()


def test_a_chief_listens_on_an_address_of_its_own(tmp_path, monkeypatch):
    for name, value in {**environment("chief", 8000), distribution.IP: "192.0.2.1"}.items():
        monkeypatch.setenv(name, value)
    tuner = ScheduleTuner(ScheduleOracle(Climber(), 2), measure, tmp_path)
    with pytest.raises(InputError, match=r"`KERASTUNER_ORACLE_IP` \(='192.0.2.1'\) must be an"):
        tuner.search()
