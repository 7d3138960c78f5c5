"""What `pip install 'ddsm_tf[edge]'` brings. Needs a package index: run with -m slow."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
# Installers, which a device may remove and which are not of our choosing.
NOT_COUNTED = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
MAX_BYTES = 180e6


def check(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_edge_extra_is_small_and_samples(tiny_bundle, tmp_path):
    source, home = tmp_path / "source", tmp_path / "venv"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, source, ignore=left_out)
    check(sys.executable, "-m", "venv", home)
    python = home / "bin" / "python"
    install = ["install", "--quiet", "-c", ROOT / "constraints.txt", f"{source}[edge]"]
    check(python, "-m", "pip", *install, cwd=tmp_path)
    (site,) = home.glob("lib/python*/site-packages")
    names = {path.name for path in site.iterdir()}
    assert not names & {"tensorflow", "keras", "jax", "scipy", "click"}
    counted = [path for path in site.iterdir() if not path.name.startswith(NOT_COUNTED)]
    files = [file for path in counted for file in [path, *path.rglob("*")] if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    print(f"{total / 1e6:.1f} MB: {sorted(names)}")
    assert total <= MAX_BYTES
    command = [home / "bin" / "ddsm-edge", "sample", tiny_bundle, "-n", 3, "--seed", 5]
    for out in ("images.npy", "images.png"):
        check(*command, "-o", out, cwd=tmp_path)
    assert np.load(tmp_path / "images.npy").shape == (3, 8, 8, 1)
    here = [sys.executable, "-m", "ddsm_tf.edge.cli", *command[1:], "-o", "here.npy"]
    check(*here, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "here.npy"), np.load(tmp_path / "images.npy"))
