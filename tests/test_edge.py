"""The edge sampler and its command, without TensorFlow."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_seconds, run_command

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge.cli import run as run_cli
from ddsm_tf.edge.network import Network
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


def run_edge(*arguments):
    return run_cli(list(map(str, arguments)))


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


def test_schedules_of_the_bundle_by_name(bundle, tmp_path):
    out = tmp_path / "images.npy"
    done = run_command(
        "ddsm_tf.edge.cli", "sample", bundle, "-n", 2, "-o", out, "--schedule", "full"
    )
    assert done.returncode == 0
    loaded = Bundle.load(bundle)
    assert loaded.schedules["full"] == loaded.schedule.with_widths([1.0] * 20)
    here = EdgeSampler(loaded).sample(2, schedule=loaded.schedules["full"])
    np.testing.assert_array_equal(np.load(out), here)
    assert not np.array_equal(here, EdgeSampler(loaded).sample(2))


def test_only_the_widths_of_the_schedule_are_loaded_and_when_they_are_needed(bundle):
    sampler = EdgeSampler(Bundle.load(bundle))
    sampler.sample(1, schedule=StepSchedule.uniform(0.5, (500, 0)))
    assert sampler.resident == (0.5,)
    seen = []
    schedule = StepSchedule((900, 500, 100), (0.5, 1.0, 0.5))
    sampler = EdgeSampler(Bundle.load(bundle))
    sampler.sample(1, schedule=schedule, on_step=lambda step: seen.append(sampler.resident))
    assert seen == [(0.5,), (0.5, 1.0), (1.0, 0.5)]


def test_one_network_at_a_time_gives_the_same_images(bundle, monkeypatch):
    loaded, schedule = [], StepSchedule((900, 700, 500, 100), (0.5, 1.0, 1.0, 0.5))
    sampler, tflite = EdgeSampler(Bundle.load(bundle), max_resident=1), Bundle.tflite
    monkeypatch.setattr(
        Bundle, "tflite", lambda self, width: loaded.append(width) or tflite(self, width)
    )
    seen = []
    images = sampler.sample(
        2, 3, schedule=schedule, on_step=lambda step: seen.append(sampler.resident)
    )
    assert seen == [(0.5,), (1.0,), (1.0,), (0.5,)]
    assert loaded == [0.5, 1.0, 0.5]
    np.testing.assert_array_equal(
        images, EdgeSampler(Bundle.load(bundle)).sample(2, 3, schedule=schedule)
    )


def test_a_network_is_dropped_before_the_next_one_is_read(bundle, monkeypatch):
    sampler = EdgeSampler(Bundle.load(bundle), max_resident=1)
    resident, tflite = [], Bundle.tflite
    monkeypatch.setattr(
        Bundle,
        "tflite",
        lambda self, width: resident.append(sampler.resident) or tflite(self, width),
    )
    sampler.network(1.0)
    sampler.network(0.5)
    assert resident == [(), ()]


def test_info_tells_what_a_bundle_holds(bundle):
    done = run_command("ddsm_tf.edge.cli", "info", bundle, "--json")
    info = json.loads(done.stdout)
    assert info["image_shape"] == [8, 8, 1]
    assert info["width_counts"] == {"1": 10, "0.5": 10}
    sizes = {path.name: path.stat().st_size for path in bundle.iterdir()}
    assert info["file_bytes"] == {"1": sizes["unet_1_0.tflite"], "0.5": sizes["unet_0_5.slices"]}
    assert info["network_bytes"]["0.5"] == len(Bundle.load(bundle).tflite(0.5))
    macs = [network.macs for network in Bundle.load(bundle).networks.values()]
    saved = pytest.approx((macs[0] - macs[1]) / (2 * macs[0]), abs=1e-4)
    assert info["macs_saved"] == {"default": saved, "full": 0.0}
    assert info["provenance"]["keras"].startswith("3.")


def test_unpack_writes_the_plain_files(bundle, tmp_path):
    out = tmp_path / "plain"
    assert run_edge("unpack", bundle, "-o", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["unet_0_5.tflite", "unet_1_0.tflite"]
    loaded = Bundle.load(bundle)
    assert (out / "unet_0_5.tflite").read_bytes() == loaded.tflite(0.5)
    assert (out / "unet_1_0.tflite").read_bytes() == (bundle / "unet_1_0.tflite").read_bytes()
    (out / "precious").touch()
    assert run_edge("unpack", bundle, "-o", out) == 2 and (out / "precious").exists()
    assert run_edge("unpack", bundle, "-o", out, "--overwrite") == 2
    assert sorted(path.name for path in out.iterdir())[0] == "precious"
    (out / "precious").unlink()
    (out / "unet_0_5.tflite").rename(out / "unet_0_25.tflite")
    assert run_edge("unpack", bundle, "-o", out, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["unet_0_5.tflite", "unet_1_0.tflite"]


@pytest.mark.parametrize("out", ["bundle", "bundle/../bundle", ".", "bundle/plain", "link"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_unpack_leaves_its_bundle_alone(bundle, tmp_path, capfd, out, options):
    (tmp_path / "link").symlink_to(bundle)
    assert run_edge("unpack", bundle, "-o", tmp_path / out, *options) == 2
    assert "is the bundle, holds it or lies in it" in capfd.readouterr().err
    assert Bundle.load(bundle).widths == (1.0, 0.5)


def test_samples_are_not_written_into_the_bundle(bundle, capfd):
    assert run_edge("sample", bundle, "-o", bundle / "images.png") == 2
    assert "lies in it; name another place" in capfd.readouterr().err
    assert Bundle.load(bundle).widths == (1.0, 0.5)


def test_a_terminal_sees_the_steps_and_the_time_left(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run_edge("sample", bundle, "-n", 2, "--batch", 1, "-o", tmp_path / "x.npy") == 0
    bars = capsys.readouterr().err.split("\r")[1:]
    assert len(bars) == 40 and bars[0].startswith("1/40 steps, ")
    assert bars[-1] == "40/40 steps, 0 s left  \n"


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
        (["sample", "{bundle}", "-o", "x.png", "--max-resident", "0"], "at least 1"),
        (["benchmark", "{bundle}", "--threads", "x"], "threads"),
        (["unpack", "{bundle}"], "-o"),
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


def test_the_six_lines_in_the_documentation(bundle, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "edge.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) == 6
    # The same stand in the class's own documentation.
    assert [line.split("#")[0].split() for line in lines] == [
        line.split("#")[0].split()[1:]
        for line in EdgeSampler.__doc__.splitlines()
        if line.strip().startswith(">>>")
    ]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "edge.md", "exec"), found)
    np.testing.assert_array_equal(found["images"], EdgeSampler(Bundle.load(bundle)).sample(16))
    assert (tmp_path / "images.png").read_bytes()[:4] == b"\x89PNG"


def test_a_network_with_a_fixed_batch_takes_any_number_of_images():
    import tensorflow as tf

    signature = [tf.TensorSpec((3, 4, 4, 1), tf.float32), tf.TensorSpec((3,), tf.float32)]
    function = tf.function(lambda x, t: 2 * x + t[:, None, None, None], signature)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    content = converter.convert()
    network = Network(content, "x", (4, 4, 1), batch=3)
    x = np.random.default_rng(0).standard_normal((8, 4, 4, 1)).astype(np.float32)
    t = np.arange(8, dtype=np.float32)
    for count in (1, 3, 4, 8):
        expected = 2 * x[:count] + t[:count, None, None, None]
        np.testing.assert_allclose(network(x[:count], t[:count]), expected, rtol=1e-6)
    for batch, words in ((None, "any number of images"), (4, "4 images at once")):
        with pytest.raises(InputError, match=f"must take {words}"):
            Network(content, "x", (4, 4, 1), batch=batch)


def test_a_network_of_other_images_or_numbers_is_refused(tiny_bundle, monkeypatch):
    content = Bundle.load(tiny_bundle).tflite(0.5)
    with pytest.raises(InputError, match=r"takes images of \(8, 8, 1\), not \(8, 4, 1\)"):
        Network(content, "x", (8, 4, 1))
    network, x = Network(content, "x", (8, 8, 1)), np.zeros((2, 8, 8, 1), np.float32)
    interpreter = network._graph._interpreter
    monkeypatch.setattr(interpreter, "get_tensor", lambda index: np.zeros((2, 1, 1, 1)))
    with pytest.raises(InputError, match=r"gives \(2, 1, 1, 1\) for images of \(2, 8, 8, 1\)"):
        network(x, 0)

    def fail():
        raise RuntimeError("no operator\nat all")

    monkeypatch.setattr(interpreter, "invoke", fail)
    with pytest.raises(InputError, match=r"`file` \(='x'\) is no network of .*: no operator$"):
        network(x, 0)


def test_bad_arguments_of_the_sampler_are_refused(bundle):
    sampler = EdgeSampler(Bundle.load(bundle))
    with pytest.raises(InputError, match="width"):
        sampler.denoise(np.zeros((1, 8, 8, 1), np.float32), 0, 0.75)
    with pytest.raises(InputError, match="train_timesteps"):
        sampler.sample(1, schedule=StepSchedule.uniform(0.5, (1, 0), train_timesteps=10))
    with pytest.raises(InputError, match="threads"):
        EdgeSampler(Bundle.load(bundle), threads=0)
    with pytest.raises(InputError, match="max_resident"):
        EdgeSampler(Bundle.load(bundle), max_resident=0)


def test_the_command_starts_within_a_second(bundle):
    assert cpu_seconds("ddsm_tf.edge.cli", "--help") < 1
    assert cpu_seconds("ddsm_tf.edge.cli", "info", bundle) < 1
