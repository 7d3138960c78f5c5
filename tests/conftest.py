"""Fixtures that several files share: tiny networks, a tiny trained run, a tiny bundle."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# Pytest has a worker for each core, and with more threads they would wait for one another; floats
# are added in the same order each time, too, which tests of equality to the last bit need.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import fcntl
import io
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ddsm_tf.schedule import StepSchedule, even_timesteps

pytest_plugins = ["serving_fixtures"]

# η > 0, so that the noise of every step counts; the odd steps are narrow.
NOISY_SCHEDULE = StepSchedule(even_timesteps(1000, 10), (1.0, 0.5) * 5, eta=0.5)
TINY = {
    "image_size": 8,
    "channels": 1,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "attention_resolutions": (4,),
    "blocks_per_level": 1,
    "widths": (1.0, 0.5),
}
TINY_SETTINGS = [
    "base_channels=8",
    "channel_multipliers=1",
    "widths=1,0.5",
    "batch_size=16",
    "checkpoint_every=4",
    "sample_every=0",
    "log_every=2",
    "sampling_steps=4",
    "search_segments=2",
    "search_trials=6",
    "search_images=32",
]


# Minutes each: a worker that got one of them last would work while the others wait.
LONG_FILES = ("test_presets.py", "test_strategy.py", "test_cli.py", "test_training.py")


def pytest_collection_modifyitems(items):
    """The long files first, in that order (see `--no-loadscope-reorder` in the Makefile)."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def randomise(model, seed=0):
    """Give every weight a random value; output layers start at zero and would hide errors."""
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        centre = 1.0 if variable.path.endswith("gamma") else 0.0
        variable.assign(centre + 0.1 * random.standard_normal(variable.shape).astype(np.float32))
    return model


def run_command(module, *arguments, cwd=None, env=None, timeout=240):
    """Run `python -m module arguments` as a user's shell would; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def slow_but(names, *fast):
    """Names as parameters, those that are not `fast` marked as slow."""
    slow = pytest.mark.slow
    return [name if name in fast else pytest.param(name, marks=slow) for name in names]


def set_options(settings):
    """`--set` before each setting, as a command takes them."""
    return [part for setting in settings for part in ("--set", setting)]


def run_ddsm(*arguments):
    """`ddsm arguments` in this process, for another takes seconds to start TensorFlow.

    Returns what `run_command` returns.
    """
    from ddsm_tf import cli

    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        returncode = cli.run([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, returncode, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def eagerly():
    """Without graphs, whose making takes longer than a few training steps."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


# `python -c EAGER arguments` in this folder is `ddsm arguments`, eagerly.
EAGER = """
import sys
from conftest import eagerly
from ddsm_tf.cli import main
from ddsm_tf.console import without_stderr

without_stderr(lambda: __import__("tensorflow"))
with eagerly():
    main(sys.argv[1:])
"""


def made_once(tmp_path_factory, name, make):
    """The folder that `make(folder)` wrote, for all of pytest's workers; copy it to change it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            making = root / f"{name}.making"
            make(making)
            making.rename(folder)
    return folder


def cpu_seconds(module, *arguments):
    """CPU time of `python -m module arguments`, which a busy neighbour does not lengthen."""
    times = []
    for _ in range(3):
        before = os.times()
        assert run_command(module, *arguments).returncode == 0
        after = os.times()
        times.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
    return min(times)


@pytest.fixture
def run_here(capfd):
    """`run_ddsm` that notices what libraries write past Python, too."""
    from ddsm_tf import cli

    def run(*arguments):
        capfd.readouterr()
        returncode = cli.run([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, returncode, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_unet():
    """A slimmable network with random weights."""
    from ddsm_tf.models import SlimmableUNet

    return randomise(SlimmableUNet(**TINY, name="unet"))


@pytest.fixture(scope="session")
def tiny_schedule():
    """Twenty DDIM steps, half of them narrow."""
    return StepSchedule(even_timesteps(1000, 20), (0.5, 1.0) * 10)


@pytest.fixture(scope="session")
def tiny_savedmodels(tiny_unet, tmp_path_factory):
    """Every width of `tiny_unet`, and the sampler with `NOISY_SCHEDULE`."""
    from ddsm_tf.export import export
    from ddsm_tf.noise import NoiseTable

    def make(out):
        export("savedmodel", tiny_unet, NoiseTable.linear(1000), NOISY_SCHEDULE, out)

    return made_once(tmp_path_factory, "tiny_savedmodels", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_unet, tiny_schedule, tmp_path_factory):
    """A float32 bundle of `tiny_unet`; do not change it, copy it."""
    from ddsm_tf.export import export
    from ddsm_tf.noise import NoiseTable

    out = tmp_path_factory.mktemp("bundle") / "bundle"
    return export("bundle", tiny_unet, NoiseTable.linear(1000), tiny_schedule, out)


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy of `tiny_bundle` that may be broken."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run of ten training steps on the digits, made by the command line; do not change it.

    It has been evaluated once, so that no search has to train the classifier again.
    """

    def make(out):
        settings = set_options(TINY_SETTINGS)
        trained = run_ddsm("train", "digits", "--out", out, "--steps", 10, *settings)
        assert trained.returncode == 0, trained.stderr
        evaluated = run_ddsm("evaluate", out, "-n", 2)
        assert evaluated.returncode == 0, evaluated.stderr
        assert (out / "classifier.keras").is_file()

    return made_once(tmp_path_factory, "tiny_run", make)
