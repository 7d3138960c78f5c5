"""The `ddsm` command as a user types it."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import EAGER, TINY_SETTINGS, cpu_seconds, run_command, run_ddsm, set_options

from ddsm_tf.errors import InputError
from ddsm_tf.metrics import train_classifier
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.search import read_pareto
from ddsm_tf.training import evaluate
from ddsm_tf.training.run import Run

CLI = "ddsm_tf.cli"


@pytest.fixture(scope="module")
def searched_run(tiny_run, tmp_path_factory):
    """A run after `ddsm search`; do not change it."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("searched") / "run")
    done = run_ddsm("search", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^4 trials; chosen: .*\nMACs saved: \d+ %\ndistance: [\d.]+ ", done.stdout)
    return run


def test_search_writes_the_pareto_set_and_the_schedule(searched_run):
    entries = read_pareto(searched_run / "search" / "pareto.json")
    assert {"full", "uniform:0.5"} <= {entry.get("baseline") for entry in entries}
    assert [e["macs"] for e in entries] == sorted(e["macs"] for e in entries)
    full = next(entry for entry in entries if entry.get("baseline") == "full")
    narrow = next(entry for entry in entries if entry.get("baseline") == "uniform:0.5")
    assert full["macs_fraction"] == 1.0
    assert narrow["macs_fraction"] == pytest.approx(narrow["macs"] / full["macs"])
    assert 0.2 < narrow["macs_fraction"] < 0.35
    assert set(full) == {"schedule", "distance", "macs", "macs_fraction", "seconds", "baseline"}
    schedule = StepSchedule.load(searched_run / "schedule.json")
    assert schedule.timesteps == even_timesteps(1000, 4)
    result = json.loads((searched_run / "search" / "result.json").read_text())
    assert result["confirm_seeds"] == [1, 2, 3, 4]
    assert len(result["trials"]) == 4  # two segments of two widths


def test_search_resumes_and_refuses_to_start_over(searched_run, tmp_path, run_here):
    run = shutil.copytree(searched_run, tmp_path / "run")
    done = run_here("search", run)
    assert done.returncode == 2 and "--resume" in done.stderr
    before = (run / "search" / "pareto.json").read_text()
    (run / "schedule.json").unlink()
    done = run_here("search", run, "--resume")
    assert done.returncode == 0, done.stderr
    # Seconds are measured, so equal files mean that nothing was measured again.
    assert (run / "search" / "pareto.json").read_text() == before
    assert StepSchedule.load(run / "schedule.json").sampler == "ddim"
    done = run_here("search", run, "--resume", "--images", "64")
    assert done.returncode == 2 and "`images` (=64)" in done.stderr
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    train_classifier(images, steps=1).save(run / "classifier.keras")
    # Half of the distances would be by another judge.
    done = run_here("search", run, "--resume", "--trials", "5")
    assert done.returncode == 2 and "`classifier` (=" in done.stderr


def test_search_by_latency(tiny_run, searched_run, tmp_path, run_here):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    latency = tmp_path / "latency.json"
    # A device that is slower at the narrow width: only full width can be on the front.
    latency.write_text('{"widths": {"1.0": {"median_ms": 2.0}, "0.5": {"median_ms": 3.0}}}')
    done = run_here("search", run, "--cost", f"latency:{latency}", "--trials", 2)
    assert done.returncode == 0, done.stderr
    entries = read_pareto(run / "search" / "pareto.json")
    assert [(e["baseline"], e["latency_ms"]) for e in entries] == [
        ("full", 8.0),
        ("uniform:0.5", 12.0),
    ]
    assert StepSchedule.load(run / "schedule.json").widths == (1.0,) * 4
    broken = ["--cost", f"latency:{tmp_path / 'nothing.json'}"]
    done = run_here("search", shutil.copytree(tiny_run, tmp_path / "two"), *broken)
    assert done.returncode == 2 and "nothing.json" in done.stderr
    assert not (tmp_path / "two" / "search").exists()


def test_sample_evaluate_export_report_and_the_edge(searched_run, tmp_path, run_here):
    run = shutil.copytree(searched_run, tmp_path / "run")
    server, edge = tmp_path / "server.npy", tmp_path / "edge.npy"
    options = ("-n", 20, "--seed", 3, "-o")
    for done in (
        run_command(CLI, "sample", run, *options, server),
        run_here("sample", run, *options, tmp_path / "grid.png"),
        run_here("export", run, "bundle", "-o", run / "bundle"),
        run_command("ddsm_tf.edge.cli", "sample", run / "bundle", *options, edge),
        run_here("report", run),
    ):
        assert (done.returncode, done.stderr) == (0, ""), done.args
    first, second = np.load(server), np.load(edge)
    assert first.shape == (20, 8, 8, 1) and first.dtype == np.uint8
    assert np.mean(np.abs(first.astype(int) - second.astype(int)) <= 1) >= 0.999
    check_report((run / "report.html").read_text())


def check_report(page):
    """One file that needs nothing else, with the pictures and the commands."""
    assert "http" not in page.replace("http-equiv", "")
    assert "src=" in page and set(re.findall(r'src="(.{22})', page)) == {"data:image/png;base64,"}
    captions = ["Real images", "Full width", "Step-aware schedule", "LiteRT", "Loss of each width"]
    captions += ["Distance and cost of every trial", "Width at each step", "Held-out error"]
    for caption in captions:
        assert caption in page
    assert page.count("data:image/png") == len(captions)
    assert "ddsm train digits --out run --set base_channels=8" in page
    assert "uniform:0.5" in page and "full" in page


def test_evaluate_prints_one_object(searched_run, run_here):
    arguments = ["evaluate", searched_run, "--schedule", "uniform:0.5", "--steps", 3, "-n", 40]
    done = run_here(*arguments, "--json")
    result = json.loads(done.stdout)
    assert result["steps"] == 3 and result["images"] == 40
    # None of the seeds that the search chose by.
    settings = json.loads((searched_run / "search" / "result.json").read_text())
    assert result["seed"] not in (0, *settings["confirm_seeds"])
    assert result["width_counts"] == {"0.5": 3}
    assert 0.2 < result["macs_fraction"] < 0.35
    assert result["distance"] > 0 and result["seconds"] > 0


def test_evaluate_times_networks_that_are_compiled(searched_run, monkeypatch):
    run = Run.open(searched_run)
    schedule = StepSchedule((900, 500, 100), (1.0, 0.5, 1.0))

    def timed(model, asked, count, seed):
        assert set(model.denoise._compiled) == {1.0, 0.5}
        return model.sample(asked, count, seed)

    monkeypatch.setattr(evaluate, "sample_with_bar", timed)
    assert evaluate.evaluate_run(run, schedule, 8, 0)["images"] == 8


def test_evaluate_compiles_for_every_size_of_a_batch(searched_run, monkeypatch):
    # JAX compiles for each; 100 images are 64 and 36.
    model, sizes = mock.Mock(), set()
    model.sample = lambda schedule, count: sizes.add((schedule.widths, count))
    evaluate._warm_up(model, StepSchedule((900, 100), (1.0, 0.5)), 100)
    assert sizes == {((1.0,), 64), ((1.0,), 36), ((0.5,), 64), ((0.5,), 36)}
    sizes.clear()
    evaluate._warm_up(model, StepSchedule((900,), (1.0,)), 8)
    assert sizes == {((1.0,), 8)}


@pytest.mark.parametrize("metric", ["fidd", "per_class"])
def test_metrics_that_cannot_be_are_refused_before_anything_is_sampled(
    tiny_run, monkeypatch, metric
):
    run = Run.open(tiny_run)
    monkeypatch.setattr(evaluate, "suite_of", lambda *_: pytest.fail("real images were looked at"))
    with pytest.raises(InputError, match=rf"`metrics` \(='{metric}'\)"):
        evaluate.evaluate_run(run, run.schedule("full"), 8, 0, metrics=["fid", metric])


def test_presets_are_listed(run_here):
    done = run_here("presets")
    names = re.findall(r"^(\w+) ", done.stdout, flags=re.MULTILINE)
    assert names[:3] == ["digits", "fashion_mnist", "cifar10"]
    assert {"celeba_hq", "lsun_bedroom", "afhq", "imagenet64", "latent_celeba_hq"} <= set(names)


SCHEDULED = ["-o", "{tmp}/x", "--schedule"]
BAD = [
    (["train", "nope", "--out", "{tmp}/x"], "`PRESET` (='nope') must be one of digits"),
    (["train", "digits"], "--out"),
    (["train", "digits", "--out", "{run}"], "exists and is not empty; pass --resume"),
    (["train", "digits", "--out", "{file}"], "is a file"),
    (["train", "digits", "--out", "{tmp}/x", "--set", "widht=1"], "did you mean widths?"),
    (["train", "digits", "--out", "{tmp}/x", "--set", "seed"], "key=value"),
    (["train", "digits", "--out", "{tmp}/x", "--steps", "0"], "--steps"),
    (["train", "digits", "--out", "{tmp}/x", "--data", "npz:{tmp}/none.npz"], "none.npz"),
    (["train", "digits", "--out", "{tmp}/x", "--data", "npz:{nan}"], "NaN"),
    (["train", "digits", "--out", "{tmp}/x", "--data", "npz:{wrong}"], "int64"),
    (["train", "digits", "--out", "{tmp}/x", "--set", "image_size=7"], "`image_size` (=7)"),
    (["search", "{tmp}/none"], "no run folder"),
    (["search", "{run}", "--trials", "1"], "`trials` (=1) must be at least 2"),
    (["search", "{run}", "--cost", "watts"], "must be macs, parameters or latency:FILE"),
    (["sample", "{run}", "-o", "{tmp}/x.jpg"], ".png"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--schedule", "uniform:0.3"], "0.3"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--schedule", "{tmp}/none.json"], "none.json"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--schedule", "{rising}"], "fall strictly"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--schedule", "{cut}"], "not valid JSON"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "-n", "0"], "-n"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--seed", "-1"], "--seed"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--steps", "1001"], "`steps` (=1001)"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--schedule", "{good}", "--steps", "5"], "`--steps`"),
    (["sample", "{run}", "-o", "{tmp}/x.png", "--sampler", "heun", "--eta", "1"], "is for ddim"),
    (["sample", "{empty}", "-o", "{tmp}/x.png"], "weights"),
    (["sample", "{foreign}", "-o", "{tmp}/x.png"], "base_channels"),
    (["sample", "{cut_weights}", "-o", "{tmp}/x.png"], "weights"),
    (["sample", "{cut_config}", "-o", "{tmp}/x.png"], "config"),
    (["export", "{run}", "bundle", "-o", "{folder}"], "exists already"),
    (["export", "{run}", "bundle", "-o", "{folder}", "--overwrite"], "holds 'precious', unlike"),
    (["export", "{run}", "onnx", "-o", "{tmp}/x"], "onnx"),
    (["export", "{run}", "savedmodel", "-o", "{tmp}/x", "--quantize", "float16"], "quantize"),
    (["export", "{run}", "tflite", *SCHEDULED, "full"], "`--schedule` (='full') changes nothing"),
    (["export", "{run}", "bundle", *SCHEDULED, "uniform:0.3"], "`widths` (=0.3)"),
    (["export", "{run}", "tflite", "--quantize", "int8", *SCHEDULED, "uniform:0.3"], "(=0.3)"),
    (["data", "digits", "--size", "8"], "`--size` (=8) is of the picture; add -o"),
    (["data", "digits", "--channels", "1"], "`--channels` (=1) is of the picture; add -o"),
    (["report", "{empty}"], "weights"),
]


@pytest.fixture(scope="module")
def places(tiny_run, tmp_path_factory):
    """Good and bad files that the commands of `BAD` name."""
    root = tmp_path_factory.mktemp("bad")
    good = StepSchedule.uniform(1.0, (2, 1, 0)).to_dict()

    def write(name, text):
        (root / name).write_text(text)
        return root / name

    def copy(name):
        return shutil.copytree(tiny_run, root / name)

    (root / "folder").mkdir()
    write("folder/precious", "kept")
    np.savez(root / "nan.npz", images=np.full((4, 8, 8), np.nan, np.float32))
    np.savez(root / "wrong.npz", images=np.zeros((4, 8, 8), np.int64))
    places = {
        "run": tiny_run,
        "file": write("file", ""),
        "folder": root / "folder",
        "nan": root / "nan.npz",
        "wrong": root / "wrong.npz",
        "rising": write("rising.json", json.dumps({**good, "timesteps": [0, 1, 2]})),
        "good": write("good.json", json.dumps(good)),
        "cut": write("cut.json", json.dumps(good)[:50]),
        "empty": copy("empty"),
        "foreign": copy("foreign"),
        "cut_weights": copy("cut_weights"),
        "cut_config": copy("cut_config"),
    }
    (root / "empty" / "weights.keras").unlink()
    config = root / "foreign" / "config.json"
    config.write_text(config.read_text().replace('"base_channels": 8', '"base_channels": 16'))
    weights = root / "cut_weights" / "weights.keras"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = root / "cut_config" / "config.json"
    config.write_text(config.read_text()[:200])
    return places


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_and_leaves_nothing(places, tmp_path, capfd, arguments, words):
    # In this process: thirty starts of TensorFlow would take minutes.
    from ddsm_tf.cli import run

    code = run([text.format(tmp=tmp_path, **places) for text in arguments])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert words in err and err.startswith("ddsm: ") and err.count("\n") == 1
    assert (places["folder"] / "precious").read_text() == "kept"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = run_command(CLI, "sample", tmp_path, "-o", "x.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"ddsm: `RUN` (='{tmp_path}') is no run folder (no config.json); see `ddsm train`\n"
    )


def limit_file_size():
    """Stands in for a full disk: writing more than 300 bytes to a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))


@pytest.mark.parametrize("name", ["x.npy", "x.png"])
def test_a_full_disk_leaves_nothing_half_written(tiny_run, tmp_path, name):
    (tmp_path / name).write_text("old")
    done = subprocess.run(
        [sys.executable, "-m", CLI, "sample", tiny_run, "-n", "64", "-o", tmp_path / name],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ddsm: ") and done.stderr.count("\n") == 1
    assert f"{name}`: File too large" in done.stderr
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "old")]


def test_a_full_disk_keeps_the_checkpoints(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*.npz")}
    arguments = ["train", "digits", "--out", run, "--resume", "--steps", "14"]
    arguments += set_options(TINY_SETTINGS)
    done = subprocess.run(
        [sys.executable, "-c", EAGER, *arguments],
        cwd=Path(__file__).parent,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*.npz")} == before
    assert not list(run.rglob(".*"))


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that nobody may write to")
def test_a_read_only_disk_is_one_line():
    done = run_command(CLI, "train", "digits", "--out", "/sys/run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ddsm: `/sys/run`: ") and done.stderr.count("\n") == 1


def test_help_and_import_are_quick():
    # The command imports the package, too.
    assert cpu_seconds(CLI, "--help") < 0.5
