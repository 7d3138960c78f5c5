"""The edge sampler: no TensorFlow, no trust in the bundle."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import run_command

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule

BANNED = """
import sys

class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tensorflow", "keras", "jax", "torch", "click", "PIL", "scipy"}:
            raise ImportError(name + " is banned here")

sys.meta_path.insert(0, Ban())
from ddsm_tf.edge.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy that may be broken."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def change(bundle, **fields):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest.update(fields)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_process_without_tensorflow_gives_the_same_images(bundle, tmp_path):
    (tmp_path / "banned.py").write_text(BANNED)
    out = tmp_path / "images.npy"
    env = {"PYTHONPATH": str(tmp_path)}
    done = run_command("banned", "sample", bundle, "-n", 6, "--seed", 5, "-o", out, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    here = EdgeSampler(Bundle.load(bundle)).sample(6, seed=5)
    np.testing.assert_array_equal(np.load(out), here)


def test_the_ban_bites(tmp_path):
    (tmp_path / "banned.py").write_text(BANNED.replace("from ddsm_tf.edge.cli", "import keras #"))
    done = run_command("banned", env={"PYTHONPATH": str(tmp_path)})
    assert "keras is banned here" in done.stderr


def test_a_schedule_of_ones_own(bundle, tmp_path):
    schedule = StepSchedule.uniform(0.5, (900, 400, 0), sampler="ddpm")
    schedule.save(tmp_path / "mine.json")
    out = tmp_path / "images.npy"
    arguments = ["sample", bundle, "-n", 2, "-o", out, "--schedule", tmp_path / "mine.json"]
    assert run_command("ddsm_tf.edge.cli", *arguments).returncode == 0
    here = EdgeSampler(Bundle.load(bundle)).sample(2, schedule=schedule)
    np.testing.assert_array_equal(np.load(out), here)


def test_only_the_widths_of_the_schedule_are_loaded(bundle):
    sampler = EdgeSampler(Bundle.load(bundle))
    sampler.sample(1, schedule=StepSchedule.uniform(0.5, (500, 0)))
    assert list(sampler.resident) == [0.5]


def test_benchmark_prints_what_a_latency_search_reads(bundle, tmp_path):
    from ddsm_tf.cost import read_latency

    arguments = ["benchmark", bundle, "--batch", 2, "--threads", 1, "--rounds", 5, "--json"]
    done = run_command("ddsm_tf.edge.cli", *arguments)
    result = json.loads(done.stdout)
    assert set(result["widths"]) == {"1.0", "0.5"}
    assert (result["batch"], result["threads"], result["rounds"]) == (2, 1, 5)
    times = result["widths"]["1.0"]
    assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"] < 1000
    (tmp_path / "latency.json").write_text(done.stdout)
    table = read_latency(f"latency:{tmp_path / 'latency.json'}", (1.0, 0.5))
    assert table == {w: result["widths"][str(w)]["median_ms"] for w in (1.0, 0.5)}
    with pytest.raises(InputError, match="median_ms"):
        read_latency(f"latency:{tmp_path / 'latency.json'}", (1.0, 0.75))


def test_info_tells_what_a_bundle_holds(bundle):
    done = run_command("ddsm_tf.edge.cli", "info", bundle, "--json")
    info = json.loads(done.stdout)
    assert info["image_shape"] == [8, 8, 1]
    assert info["width_counts"] == {"1": 10, "0.5": 10}
    assert info["file_bytes"]["1"] == (bundle / "unet_1_0.tflite").stat().st_size


def test_a_tampered_file_is_refused(bundle):
    file = bundle / "unet_0_5.tflite"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"unet_0_5.tflite.*not the file the manifest"):
        Bundle.load(bundle)


def test_a_missing_file_is_refused(bundle):
    (bundle / "unet_1_0.tflite").unlink()
    with pytest.raises(InputError, match=r"unet_1_0.tflite.*missing"):
        Bundle.load(bundle)


CHANGES = {
    "format": {"format": "zip"},
    "version": {"version": 2},
    "image_shape": {"image_shape": [8, 8]},
    "value_range": {"value_range": [0, 1]},
    "noise_table": {"noise_table": {}},
    "betas": {"noise_table": {"betas": [0.5, 2.0]}},
    "timesteps": {"schedule": {**StepSchedule.uniform(1.0, (1, 0)).to_dict(), "timesteps": [0, 1]}},
    "is not a width of the model": {"schedule": StepSchedule.uniform(0.3, (1, 0)).to_dict()},
    "name of a file in the bundle": {"widths": {"1.0": "../unet_1_0.tflite"}},
    r"number in \(0, 1\]": {"widths": {"2.0": "unet_1_0.tflite"}},
    "sha256": {"sha256": {}},
    "unknown keys": {"surprise": 1},
}


@pytest.mark.parametrize("rule", CHANGES)
def test_a_changed_manifest_is_refused(bundle, rule):
    change(bundle, **CHANGES[rule])
    with pytest.raises(InputError, match=rule):
        Bundle.load(bundle)


def test_a_truncated_manifest_is_refused(bundle):
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="not valid JSON"):
        Bundle.load(bundle)


def test_a_file_that_is_no_network_is_refused_with_one_line(bundle, tmp_path):
    (bundle / "unet_1_0.tflite").write_bytes(b"not a network")
    digests = json.loads((bundle / "manifest.json").read_text())["sha256"]
    digests["unet_1_0.tflite"] = hashlib.sha256(b"not a network").hexdigest()
    change(bundle, sha256=digests)
    done = run_command("ddsm_tf.edge.cli", "sample", bundle, "-o", tmp_path / "x.png")
    assert done.returncode == 2
    assert "unet_1_0.tflite" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["sample", "{bundle}"], "-o"),
        (["sample", "{bundle}", "-o", "x.jpg"], ".png"),
        (["sample", "{bundle}", "-o", "x.png", "-n", "0"], "at least 1"),
        (["sample", "{bundle}", "-o", "x.png", "--seed", "-1"], "seed"),
        (["sample", "nowhere", "-o", "x.png"], "nowhere"),
        (["sample", "{bundle}", "-o", "x.png", "--schedule", "nothing.json"], "nothing.json"),
        (["benchmark", "{bundle}", "--threads", "x"], "threads"),
    ],
)
def test_bad_usage_is_one_line_and_code_two(bundle, tmp_path, arguments, words):
    arguments = [text.format(bundle=bundle) for text in arguments]
    done = run_command("ddsm_tf.edge.cli", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_importing_the_edge_sampler_brings_in_no_other_library():
    script = "import sys, ddsm_tf.edge.cli; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = {"tensorflow", "keras", "jax", "click", "PIL", "scipy", "ai_edge_litert", "tqdm"}
    assert not heavy & set(done.stdout.split())


def test_bad_arguments_of_the_sampler_are_refused(bundle):
    sampler = EdgeSampler(Bundle.load(bundle))
    with pytest.raises(InputError, match="width"):
        sampler.denoise(np.zeros((1, 8, 8, 1), np.float32), 0, 0.75)
    with pytest.raises(InputError, match="train_timesteps"):
        sampler.sample(1, schedule=StepSchedule.uniform(0.5, (1, 0), train_timesteps=10))
    with pytest.raises(InputError, match="threads"):
        EdgeSampler(Bundle.load(bundle), threads=0)
