"""The edge sampler: no TensorFlow, no trust in the bundle."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import cpu_seconds, run_command

from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge import benchmark as edge_benchmark
from ddsm_tf.edge.cli import run as run_cli
from ddsm_tf.edge.manifest import StoredDecoder, sealed
from ddsm_tf.edge.memory import peak_memory
from ddsm_tf.edge.network import Network
from ddsm_tf.errors import ForeseenFailure, InputError
from ddsm_tf.latency import WARM_UP
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


def run_edge(*arguments):
    return run_cli(list(map(str, arguments)))


def change(bundle, **fields):
    """Change entries of the manifest and have it vouch for itself again."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_bytes(sealed({**manifest, **fields}))


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


def test_benchmark_prints_what_a_latency_search_reads(bundle, tmp_path):
    from ddsm_tf.cost import read_latency

    arguments = ["benchmark", bundle, "--batch", 2, "--threads", 1, "--rounds", 5, "--json"]
    arguments += ["--max-resident", 1]
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
    check_schedule(result, Bundle.load(bundle))
    memory = result["peak_memory_mb"]
    assert "decoder" not in result and "decoder" not in memory
    assert set(memory["widths"]) == {"1.0", "0.5"} and memory["max_resident"] == 1
    assert memory["widest"] == memory["widths"]["1.0"]
    assert 20 < memory["widths"]["0.5"] < 400 and 20 < memory["schedule"] < 400


def check_schedule(result, bundle):
    schedule, macs = result["schedule"], [n.macs for n in bundle.networks.values()]
    assert schedule["macs_ratio"] == pytest.approx((macs[0] + macs[1]) / (2 * macs[0]))
    assert schedule["macs_saved"] == pytest.approx(1 - schedule["macs_ratio"])
    wide, narrow = (result["widths"][width]["median_ms"] for width in ("1.0", "0.5"))
    predicted = pytest.approx((wide + narrow) / (2 * wide))
    assert schedule["predicted_time_ratio"] == predicted
    measured = schedule["measured"]
    assert (measured["steps"], measured["pairs"]) == (12, 3)
    assert measured["predicted_time_ratio"] == predicted
    # Each of these steps loads its network anew, and full width loads one.
    assert schedule["time_saved"] == 1 - measured["time_ratio"] and measured["time_ratio"] > 1


class FakeSampler(EdgeSampler):
    """A clock; steps that take as many milliseconds as their width is wide; a decoder of `times`.

    Attributes:
        steps: the widths of all steps so far.
        decoded: what was decoded so far.
        times: milliseconds of each decoding; a second once they have run out.
    """

    def __init__(self, bundle, times=()):
        super().__init__(bundle)
        self.now, self.times = 0.0, iter(times)
        self.steps, self.decoded = [], []

    def perf_counter(self):
        return self.now

    def denoise(self, x, t, width, labels=None):
        assert x.shape == (3, 8, 8, 1)
        self.now += width / 1000
        self.steps.append(width)
        return x

    def decode(self, latents):
        self.decoded.append(latents)
        self.now += next(self.times, 1000.0) / 1000
        return latents


def of_latents(bundle):
    """The loaded bundle, as if it had a decoder."""
    loaded = Bundle.load(bundle)
    decoder = StoredDecoder(loaded.files["unet_1_0.tflite"], (16, 16, 3))
    return dataclasses.replace(loaded, decoder=decoder)


@pytest.mark.parametrize("load", [Bundle.load, of_latents])
def test_a_schedule_is_compared_with_full_width_in_turns(bundle, monkeypatch, load):
    # Decoding, the same for every schedule, would hide what the widths save.
    sampler = FakeSampler(load(bundle))
    monkeypatch.setattr(edge_benchmark, "time", sampler)
    schedule = StepSchedule(tuple(range(99, -1, -1)), (0.5,) * 75 + (1.0,) * 25)
    found = edge_benchmark.benchmark_schedule(
        sampler, schedule, {1.0: 4.0, 0.5: 1.0}, batch=3, pairs=3
    )
    assert found["predicted_time_ratio"] == (75 * 1 + 25 * 4) / 400
    assert found["measured"]["time_ratio"] == pytest.approx((9 * 0.5 + 3) / 12)
    assert found["measured"]["steps"] == 12 and found["measured"]["spread"] == pytest.approx(0)
    full, both = [1.0] * 12, [0.5] * 9 + [1.0] * 3
    assert sampler.steps == (full + both + both + full) * 2


def test_the_decoder_is_timed_by_itself(bundle, monkeypatch):
    rounds = []
    sampler = FakeSampler(of_latents(bundle), [8000] * WARM_UP + [5, 3, 4])
    monkeypatch.setattr(edge_benchmark, "time", sampler)
    found = edge_benchmark.benchmark_decoder(
        sampler, batch=3, rounds=3, on_round=lambda: rounds.append(sampler.now)
    )
    expected = {"median_ms": 4.0, "spread_ms": 1.0, "min_ms": 3.0, "max_ms": 5.0}
    assert found == pytest.approx(expected)
    assert len(rounds) == len(sampler.decoded) == WARM_UP + 3 and not sampler.steps
    for latents in sampler.decoded:
        assert (latents.shape, latents.dtype) == ((3, 8, 8, 1), np.float32)
        assert abs(latents.std() - 1) < 0.2  # blank latents might be quicker


@pytest.mark.parametrize(
    ("load", "alone", "together"),
    [
        (Bundle.load, [[1.0], [0.5]], [0.5, 1.0, 0.5]),
        # After its last step a batch is decoded, and then the next one begins.
        (of_latents, [[1.0], [0.5], [None]], [0.5, 1.0, 1.0, None, 0.5]),
    ],
)
def test_memory_is_measured_at_every_change(bundle, monkeypatch, load, alone, together):
    asked = []

    def peak_memory(bundle, stages, *, batch, threads, max_resident):
        assert (batch, threads) == (4, 2)
        asked.append((stages, max_resident))
        return 10.0 * len(asked)

    monkeypatch.setattr(edge_benchmark, "peak_memory", peak_memory)
    sampler = EdgeSampler(load(bundle), threads=2, max_resident=1)
    schedule, done = StepSchedule((900, 600, 300), (0.5, 0.5, 1.0)), []
    found = edge_benchmark.benchmark_memory(
        sampler, schedule, batch=4, on_process=lambda: done.append(None)
    )
    assert asked == [*((stages, None) for stages in alone), (together, 1)]
    assert len(done) == len(asked) == edge_benchmark.memory_processes(sampler.bundle)
    expected = {"widths": {"1.0": 10.0, "0.5": 20.0}, "widest": 10.0, "max_resident": 1}
    expected |= {"decoder": 30.0, "schedule": 40.0} if len(alone) == 3 else {"schedule": 30.0}
    assert found == expected


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
def test_a_shortened_schedule_keeps_its_widths_and_their_order(steps):
    schedule = StepSchedule(tuple(range(99, -1, -1)), (0.5,) * 70 + (0.25, 1.0) * 15)
    short = edge_benchmark.shortened(schedule, steps)
    assert set(short.widths) == {1.0, 0.5, 0.25}
    counts = short.width_counts()
    assert counts[0.5] == max(1, round(0.7 * steps)) and counts[1.0] == max(1, round(0.15 * steps))
    by_timestep = dict(zip(schedule.timesteps, schedule.widths, strict=True))
    assert [by_timestep[t] for t in short.timesteps] == list(short.widths)
    assert edge_benchmark.shortened(schedule, 100) is schedule


def test_a_process_that_measures_memory_and_fails_is_one_line(bundle, monkeypatch):
    loaded = Bundle.load(bundle)
    (bundle / "unet_1_0.tflite").unlink()
    with pytest.raises(ForeseenFailure, match=r"failed: .*unet_1_0.tflite.*missing"):
        peak_memory(loaded, [1.0])
    killed = subprocess.CompletedProcess([], -9, "", "INFO: Created TensorFlow Lite delegate")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: killed)
    with pytest.raises(ForeseenFailure, match=r"killed by signal 9.*make `max_resident`"):
        peak_memory(loaded, [1.0])


def test_nothing_beside_a_bundle_is_imported(bundle, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('a stranger ran code')")
    monkeypatch.chdir(tmp_path)
    assert peak_memory(Bundle.load(bundle), [0.5]) > 20


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


def test_a_terminal_sees_the_steps_and_the_time_left(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run_edge("sample", bundle, "-n", 2, "--batch", 1, "-o", tmp_path / "x.npy") == 0
    bars = capsys.readouterr().err.split("\r")[1:]
    assert len(bars) == 40 and bars[0].startswith("1/40 steps, ")
    assert bars[-1] == "40/40 steps, 0 s left  \n"


def test_a_tampered_file_is_refused(bundle):
    for name in ("unet_1_0.tflite", "unet_0_5.slices"):
        data = (bundle / name).read_bytes()
        middle = len(data) // 2
        (bundle / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        with pytest.raises(InputError, match=f"{name}.*not the file the manifest"):
            Bundle.load(bundle)
        (bundle / name).write_bytes(data)


def test_a_file_that_changes_after_loading_is_refused(bundle):
    loaded = Bundle.load(bundle)
    data = bytearray((bundle / "unet_1_0.tflite").read_bytes())
    # The last byte of the first convolution's weights, which both networks share.
    start = next(p for p in loaded._recipe(loaded.networks[0.5]).pieces if not isinstance(p, int))
    data[start.start] ^= 1
    (bundle / "unet_1_0.tflite").write_bytes(data)
    for width, name in ((1.0, "unet_1_0.tflite"), (0.5, "unet_0_5.slices")):
        with pytest.raises(InputError, match=f"{name}.*the manifest was written for"):
            EdgeSampler(loaded).network(width)
    (bundle / "unet_1_0.tflite").write_bytes(data[:1000])
    with pytest.raises(InputError, match=r"unet_1_0.tflite.*not the file"):
        EdgeSampler(loaded).network(0.5)


def replace_by(make):
    def replaced(path):
        path.rename(path.parent.parent / "elsewhere")
        make(path)

    return replaced


STRANGE = {
    "not in the manifest": lambda path: (path.parent / "extra").touch(),
    "'.hidden'.*not in the manifest": lambda path: (path.parent / ".hidden").touch(),
    "'sub'.*not in the manifest": lambda path: (path.parent / "sub").mkdir(),
    "symbolic": replace_by(lambda path: path.symlink_to("../elsewhere")),
    "must be a regular file": replace_by(lambda path: path.mkdir()),
    "regular file$": replace_by(lambda path: os.mkfifo(path)),
    "not the file the manifest": lambda path: os.truncate(path, 2**40),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("words", STRANGE)
@pytest.mark.parametrize("name", ["unet_1_0.tflite", "unet_0_5.slices", "manifest.json"])
def test_what_is_no_ordinary_file_is_refused(bundle, words, name):
    STRANGE[words](bundle / name)
    if name == "manifest.json" and words.startswith("not the file"):
        words = "larger than"
    with pytest.raises(InputError, match=words.replace("symbolic", "symbolic|regular")):
        Bundle.load(bundle)


def test_a_missing_file_is_refused(bundle):
    (bundle / "unet_1_0.tflite").unlink()
    with pytest.raises(InputError, match=r"unet_1_0.tflite.*missing"):
        Bundle.load(bundle)


CHANGES = {
    "format": {"format": "zip"},
    "version": {"version": 4},
    r"version.*=1\)": {"version": 1},
    r"version.*True": {"version": True},
    "image_shape": {"image_shape": [8, 8]},
    "value_range": {"value_range": [0, 1]},
    "noise_table": {"noise_table": {}},
    "betas": {"noise_table": {"betas": [0.5, 2.0]}},
    "products of 1 - β": {"noise_table": {"betas": [1e-300] * 1000}},
    "within .0, 1.": {"noise_table": {"betas": [0.999] * 1000}},
    "timesteps": {"schedule": {**StepSchedule.uniform(1.0, (1, 0)).to_dict(), "timesteps": [0, 1]}},
    "is not a width of the model": {"schedule": StepSchedule.uniform(0.3, (1, 0)).to_dict()},
    "name of a file in the bundle": {"widths": {"1.0": "../unet_1_0.tflite"}},
    r"number in \(0, 1\]": {"widths": {"2.0": "unet_1_0.tflite"}},
    "sha256": {"sha256": {}},
    "unknown keys": {"surprise": 1},
    "must not repeat": {"widths": {"1.0": "unet_1_0.tflite", "1": "unet_0_5.slices"}},
    "at most 16777216": {"image_shape": [65536, 65536, 1]},
    "batch": {"batch": 0},
    "num_classes": {"num_classes": True},
    r"num_classes.*=-1\)": {"num_classes": -1},
    "null or have the keys": {"decoder": {"file": "decoder.tflite"}},
    "decoder.*is the file of a width": {
        "decoder": {"file": "unet_1_0.tflite", "image_shape": [8, 8, 1]}
    },
    "one entry for each of .*'decoder": {
        "decoder": {"file": "decoder.tflite", "image_shape": [8, 8, 1]}
    },
    "prediction": {"noise_table": {"betas": [0.1] * 1000, "prediction": "noise"}},
    "needs a model with classes": {
        "schedule": StepSchedule.uniform(1.0, (1, 0), guidance_scale=2.0).to_dict()
    },
    "`networks`": {"networks": {}},
    "`bytes`": {"bytes": {}},
    "of the names|other than 'default'": {"schedules": {"default": {}}},
    "printable": {"provenance": {"note": "\x1b[2J"}},
    r"provenance\.steps": {"provenance": {"steps": int("9" * 400)}},
    "named with": {"schedules": {"../x": StepSchedule.uniform(1.0, (1, 0)).to_dict()}},
}
NETWORK_CHANGES = {
    "above the": {"bytes": 2**30},
    "give the network's": {"bytes": 1000},
    "in \\[0, 2147483647\\]": {"bytes": 2**31},
    "64 hexadecimal": {"sha256": "0"},
    # The recipe is whole, and what it gives is not what was announced.
    "does not give the network": {"sha256": "1" * 64},
    "macs": {"macs": 0},
    "slices_of": {"slices_of": "unet_0_5.slices"},
}


@pytest.mark.parametrize("rule", NETWORK_CHANGES)
def test_a_changed_network_is_refused(bundle, rule):
    networks = json.loads((bundle / "manifest.json").read_text())["networks"]
    networks["0.5"].update(NETWORK_CHANGES[rule])
    change(bundle, networks=networks)
    with pytest.raises(InputError, match=rule):
        Bundle.load(bundle)


def test_a_manifest_that_does_not_vouch_for_itself_is_refused(bundle):
    path = bundle / "manifest.json"
    text = path.read_text()
    betas = json.loads(text)["noise_table"]["betas"]
    path.write_text(text.replace(repr(betas[500]), repr(betas[500] + 1e-6)))
    with pytest.raises(InputError, match=r"`manifest_sha256`.*is not that of the manifest"):
        Bundle.load(bundle)
    path.write_text(text.replace("{", '{\n "version": 2,', 1))
    with pytest.raises(InputError, match="key twice"):
        Bundle.load(bundle)


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
    digest = hashlib.sha256(b"not a network").hexdigest()
    plain = {"bytes": 13, "sha256": digest, "macs": 1}
    (bundle / "unet_0_5.slices").unlink()
    change(
        bundle,
        widths={"1.0": "unet_1_0.tflite"},
        networks={"1.0": plain},
        bytes={"unet_1_0.tflite": 13},
        sha256={"unet_1_0.tflite": digest},
        schedule=StepSchedule.uniform(1.0, (500, 0)).to_dict(),
        schedules={},
    )
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
