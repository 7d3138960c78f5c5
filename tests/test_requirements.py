"""What a command needs and does not find is said in one line, before anything takes its time."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import pytest
from conftest import run_command, run_ddsm

from ddsm_tf.console import run_safely
from ddsm_tf.errors import EXTRAS, InputError, MissingExtraError
from ddsm_tf.export import KINDS, export, tflite
from ddsm_tf.export.requirements import check_requirements
from ddsm_tf.export.serving import write_serving
from ddsm_tf.noise import NoiseTable
from ddsm_tf.training import latency
from ddsm_tf.training.demo import run_demo
from ddsm_tf.training.run import Run

ROOT = Path(__file__).parent.parent
JAX = r"`KERAS_BACKEND` \(='jax'\) must be tensorflow, .*; unset it: "
NO_LITERT = "ai_edge_litert is not installed; run: pip install 'ddsm_tf[export]'"


@pytest.fixture
def under_jax(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")


@pytest.fixture
def without_litert(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)


@pytest.mark.parametrize("kind", KINDS)
def test_no_export_under_another_backend(tiny_unet, tiny_schedule, tmp_path, under_jax, kind):
    with pytest.raises(InputError, match=JAX):
        export(kind, tiny_unet, NoiseTable.linear(1000), tiny_schedule, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_served_model_under_another_backend(tiny_unet, tiny_schedule, tmp_path, under_jax):
    with pytest.raises(InputError, match=JAX):
        write_serving(tiny_unet, NoiseTable.linear(1000), tiny_schedule, tmp_path / "models")
    assert not list(tmp_path.iterdir())


def test_the_export_command_refuses_another_backend(tiny_run, tmp_path):
    out = tmp_path / "bundle"
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = run_command("ddsm_tf.cli", "export", tiny_run, "bundle", "-o", out, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"ddsm: {JAX}.*\n", done.stderr)
    assert not out.exists()


@pytest.mark.parametrize("place", [["bundle", "-o"], ["savedmodel", "--serving"]])
def test_the_export_command_asks_before_it_loads(tiny_run, tmp_path, monkeypatch, place):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(Run, "load_unet", lambda self: pytest.fail("loaded the network first"))
    done = run_ddsm("export", tiny_run, *place, tmp_path / "out")
    assert done.returncode == 2 and re.search(JAX, done.stderr)


def test_the_demo_does_not_train_for_an_export_that_cannot_be(tmp_path, monkeypatch):
    def asked(error, words):
        with pytest.raises(error, match=words):
            run_demo(tmp_path / "demo", lambda line: pytest.fail(line))
        assert not list(tmp_path.iterdir())

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ai_edge_litert", None)
        asked(MissingExtraError, re.escape(NO_LITERT))
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    asked(InputError, JAX)


@pytest.mark.parametrize("kind", ["tflite", "bundle"])
def test_litert_is_missed_before_a_network_is_converted(
    tiny_run, tmp_path, monkeypatch, without_litert, kind
):
    monkeypatch.setattr(tflite, "convert", lambda *_, **__: pytest.fail("converted first"))
    done = run_ddsm("export", tiny_run, kind, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"ddsm: {NO_LITERT}\n")
    run = Run.open(tiny_run)
    with pytest.raises(MissingExtraError, match=re.escape(NO_LITERT)):
        export(kind, run.load_unet(), run.noise_table, run.schedule("full"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_litert_is_needed_for_its_own_files_alone(without_litert):
    check_requirements("savedmodel")
    with pytest.raises(MissingExtraError):
        check_requirements("tflite")


def test_latency_misses_litert_before_it_loads_the_network(
    tiny_run, tmp_path, monkeypatch, without_litert
):
    def load_model(self, **options):
        raise RuntimeError("loads the network")

    monkeypatch.setattr(Run, "load_model", load_model)
    run, out = Run.open(tiny_run), tmp_path / "latency.json"
    with pytest.raises(MissingExtraError, match=re.escape(NO_LITERT)):
        latency.latency_of_run(run, out)
    for runtime in ("keras", "savedmodel"):
        with pytest.raises(RuntimeError, match="loads the network"):
            latency.latency_of_run(run, out, runtime=runtime)


# Commands as where an extra's library was never installed, in one process for several.
WITHOUT = """
import sys

class Missing:
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == self.library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = Missing()
sys.meta_path.insert(0, missing)
from ddsm_tf.cli import run

for case in sys.argv[2:]:
    missing.library, command = case.split("=")
    # What has been imported stays, so that a library is missed only where it comes first.
    assert missing.library not in sys.modules, case
    print(run([command, sys.argv[1]]))
"""


# In the order of their imports; Keras, too, imports matplotlib, but does without it.
@pytest.mark.parametrize(
    "cases", [["pymoo=search", "keras_tuner=search"], ["matplotlib=importance", "jinja2=report"]]
)
def test_commands_name_the_extra_that_brings_a_library(tiny_run, tmp_path, cases):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = sorted(run.rglob("*"))
    command = [sys.executable, "-c", WITHOUT, str(run), *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n" * 2), done.stderr
    assert done.stderr.splitlines() == [
        f"ddsm: {case.split('=')[0]} is not installed; run: pip install 'ddsm_tf[train]'"
        for case in cases
    ]
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("program", ["ddsm", "ddsm-edge"])
def test_a_module_that_no_extra_brings_is_named_as_it_is(program, capsys):
    def miss(name):
        def action():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        assert run_safely(program, action) == 1
        return capsys.readouterr().err

    said = miss("tqdm")
    assert said == f"{program}: tqdm is not installed; run: pip install 'ddsm_tf[train]'\n"
    # The library is there, but not in the version that has this module.
    for name in ("matplotlib.figures", "nonsense"):
        assert miss(name).startswith(f"{program}: ModuleNotFoundError: No module named '{name}'")


def test_every_extra_brings_what_it_is_named_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def plain(name):
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()

    brought = {
        extra: {plain(requirement) for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
    }
    distributions = importlib.metadata.packages_distributions()
    for module, extra in EXTRAS.items():
        assert brought[extra] & {plain(name) for name in distributions[module]}, module
