"""The report's images from the run's bundle: a process that imports and fails as it should."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.errors import ForeseenFailure, InputError
from ddsm_tf.training import report


def test_nothing_in_the_working_directory_is_imported(
    tiny_bundle, tiny_schedule, tmp_path, monkeypatch
):
    (tmp_path / "numpy.py").write_text("raise SystemExit('a stranger ran code')")
    monkeypatch.chdir(tmp_path)
    images = report._edge_images(SimpleNamespace(bundle_path=tiny_bundle), tiny_schedule)
    here = EdgeSampler(Bundle.load(tiny_bundle)).sample(report.GRID_IMAGES, report.SEED)
    np.testing.assert_array_equal(images, here)


def test_a_broken_bundle_is_bad_input(tiny_schedule, tmp_path):
    (tmp_path / "bundle").mkdir()
    run = SimpleNamespace(bundle_path=tmp_path / "bundle")
    with pytest.raises(InputError, match=r"^ddsm-edge: bundle .*manifest.json"):
        report._edge_images(run, tiny_schedule)


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (1, "ddsm-edge: `x.npy`: No space left on device\n", "failed: .* No space left on device"),
        (1, "INFO: a delegate\nddsm-edge: MemoryError\n", "failed: ddsm-edge: MemoryError"),
        (3, "", "failed: exit code 3"),
        (-9, "INFO: a delegate\n", "was killed by signal 9, for lack of memory perhaps"),
    ],
)
def test_what_is_not_the_input_s_fault_is_a_failure(
    tiny_schedule, tmp_path, monkeypatch, code, said, words
):
    done = subprocess.CompletedProcess([], code, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    place = rf"^sampling from {tmp_path} "
    with pytest.raises(ForeseenFailure, match=f"{place}{words}; move it away for a report"):
        report._edge_images(SimpleNamespace(bundle_path=tmp_path), tiny_schedule)
