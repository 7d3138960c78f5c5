"""The wheel: what it holds, and that it works from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def check(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the checkout."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "ddsm_tf"
    left_out = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "dist", "ddsm-demo"
    )
    shutil.copytree(ROOT, source, ignore=left_out)
    check(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment that holds the wheel."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    check(sys.executable, "-m", "venv", "--without-pip", home)
    fresh = home / "bin" / "python"
    install = ["install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    check(sys.executable, "-m", "pip", "--python", fresh, *install, wheel)
    # Its dependencies come from this environment: the suite has no network.
    site = Path(
        check(fresh, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return fresh


def test_the_wheel_holds_the_programs_inside_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"ddsm_tf", "ddsm_tf-0.1.0.dist-info"}
    expected = ["training/demo.py", "training/templates/report.html.j2", "export/bundle.py"]
    expected += ["edge/cli.py", "models/unet.py", "search/oracle.py"]
    assert {f"ddsm_tf/{name}" for name in expected} <= set(names)
    assert "ddsm_tf-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_wheel_runs_from_an_empty_folder(python, tiny_bundle, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = {"cwd": empty, "env": environment}
    where = check(python, "-c", "import ddsm_tf.training as t; print(t.__file__)", **options)
    assert str(python.parent.parent) in where
    commands = python.parent
    assert "digits" in check(commands / "ddsm", "presets", **options)
    check(commands / "ddsm-edge", "sample", tiny_bundle, "-n", 3, "-o", "edge.npy", **options)
    assert np.load(empty / "edge.npy").shape == (3, 8, 8, 1)
    settings = ["--set", "base_channels=8", "--set", "channel_multipliers=1"]
    settings += ["--set", "widths=1", "--set", "sample_every=0"]
    train = ["train", "digits", "--out", "run", "--steps", 2, *settings]
    check(commands / "ddsm", *train, **options)
    check(commands / "ddsm", "sample", "run", "-n", 4, "--steps", 2, "-o", "x.png", **options)
    assert sorted(path.name for path in empty.iterdir()) == ["edge.npy", "run", "x.png"]


def test_a_missing_extra_names_the_command_to_run(python, tmp_path):
    # Without site, nothing but the wheel and NumPy can be imported.
    site = check(python, "-c", "import ddsm_tf; print(ddsm_tf.__path__[0])").strip()
    for name in ("numpy", "numpy.libs"):
        (tmp_path / name).symlink_to(Path(np.__file__).parent.parent / name)
    paths = [str(Path(site).parent), str(tmp_path)]

    def errors_of(code):
        start = f"import sys; sys.path += {paths!r}; {code}"
        done = subprocess.run([python, "-I", "-S", "-c", start], capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    stderr = errors_of("from ddsm_tf.cli import main; main(['presets'])")
    assert stderr == "ddsm: click is not installed; run: pip install 'ddsm_tf[train]'\n"
    stderr = errors_of("import ddsm_tf; ddsm_tf.SlimmableUNet")
    assert stderr.endswith("keras is not installed; run: pip install 'ddsm_tf[train]'\n")
    stderr = errors_of(
        "import numpy; from ddsm_tf.images import png_bytes; "
        "png_bytes(numpy.zeros((1, 1, 1), numpy.uint8))"
    )
    assert stderr.endswith("Pillow is not installed; run: pip install 'ddsm_tf[edge]'\n")
