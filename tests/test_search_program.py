"""`ddsm search` and `ddsm importance` on a trained run: resume, methods, choice, workers."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import run_ddsm

from ddsm_tf import cli
from ddsm_tf.errors import InputError
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search import ImportanceTable, read_pareto
from ddsm_tf.training.evaluate import evaluate_run
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.report import write_report
from ddsm_tf.training.run import Run
from ddsm_tf.training.search import search_run
from ddsm_tf.training.search_problem import SearchOptions

# Fourteen of the sixteen schedules of four segments at two widths.
SEARCH = ["--segments", "4", "--trials", "14"]


def search_command(run, *more):
    return [sys.executable, "-m", "ddsm_tf.cli", "search", str(run), *SEARCH, *more]


def completed(run):
    """How many trials have finished."""
    files = (run / "search" / "trials").glob("trial_*/trial.json")
    return sum('"status": "COMPLETED"' in file.read_text() for file in files)


def copy_of(prepared, out):
    """A run whose measured seconds are those of `prepared`: they differ from one to the next."""
    run = shutil.copytree(prepared, out)
    seconds = (run / "search" / "step_seconds.json").read_bytes()
    shutil.rmtree(run / "search")
    (run / "search").mkdir()
    (run / "search" / "step_seconds.json").write_bytes(seconds)
    (run / "schedule.json").unlink()
    return run


@pytest.fixture(scope="module")
def searched(tiny_run, tmp_path_factory):
    """A run after a search of 14 trials; do not change it."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("searched") / "run")
    done = run_ddsm("search", run, *SEARCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert "14 trials; chosen: " in done.stdout and "UNet calls at full width" in done.stdout
    return run


def kill_after(run, trials):
    """Search, and kill -9 when so many trials have finished."""
    process = subprocess.Popen(search_command(run, "--resume"), stderr=subprocess.DEVNULL)
    while completed(run) < trials:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "kills", [(5,), pytest.param((1, 3, 7, 8, 12), marks=pytest.mark.slow)], ids=len
)
def test_a_search_that_is_killed_ends_with_the_same_front(searched, tmp_path, kills):
    run = copy_of(searched, tmp_path / "run")
    for trials in kills:
        kill_after(run, trials)
    done = run_ddsm("search", run, *SEARCH, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("search/pareto.json", "schedule.json"):
        assert (run / name).read_bytes() == (searched / name).read_bytes()


@pytest.mark.slow
def test_chief_and_three_workers_find_the_front_of_one_process(searched, tmp_path):
    run = copy_of(searched, tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": str(port)}

    def start(name):
        environment = {**os.environ, **common, "KERASTUNER_TUNER_ID": name}
        return subprocess.Popen(search_command(run), env=environment)

    chief, *workers = [start(name) for name in ("chief", "worker1", "worker2", "worker3")]
    while completed(run) < 3:
        assert chief.poll() is None
        time.sleep(0.005)
    workers[0].send_signal(signal.SIGKILL)
    assert [worker.wait(timeout=200) for worker in workers[1:]] == [0, 0]
    assert chief.wait(timeout=200) == 0
    assert (run / "search/pareto.json").read_bytes() == (
        searched / "search/pareto.json"
    ).read_bytes()


def test_what_a_search_spent_and_found_is_reported(searched):
    result = json.loads((searched / "search" / "result.json").read_text())
    steps, images, config = 4, 32, json.loads((searched / "config.json").read_text())
    nsga2, importance = result["calls"]["nsga2"], result["calls"]["importance"]
    assert nsga2["calls"] + nsga2["reused_calls"] == 14 * steps * images
    assert nsga2["reused_calls"] > 0
    assert nsga2["full_calls"] < nsga2["calls"]
    table = ImportanceTable.load(searched / "importance.json")
    assert table.images == min(config["held_out_images"], 1797 // 10) == 179
    assert importance["calls"] == 179 * 50 * 2
    spent = nsga2["full_calls"] + nsga2["reused_full_calls"] + importance["full_calls"]
    assert result["hypervolume"]["nsga2"][-1]["full_calls"] == pytest.approx(spent)
    assert result["confirm_floor"] < result["floor"]
    # Full width is confirmed, from four seeds of twice the images.
    confirmed = result["calls"]["confirmation"]
    assert (confirmed["calls"] + confirmed["reused_calls"]) % (steps * 2 * images) == 0
    assert result["confirm_images"] == 2 * images
    curve = [point["hypervolume"] for point in result["hypervolume"]["nsga2"]]
    assert curve == sorted(curve) and 0 < curve[-1] < 1
    assert -1 <= result["proxy_rank_correlation"] <= 1
    assert 0 < result["floor"] < result["full_distance"]


def search_here(run, resume=False, **options):
    """The program in this process: starting TensorFlow again takes seconds."""
    options = SearchOptions(**{"segments": 4, "trials": 14, **options})
    return search_run(Run.open(run), options, resume=resume)


def test_other_methods_join_the_front_and_the_comparison(searched, tmp_path):
    run = shutil.copytree(searched, tmp_path / "run")
    for method in ("random", "paper"):
        search_here(run, method=method, trials=8)
    with pytest.raises(InputError, match=r"search/paper.*--resume"):
        search_here(run, method="paper", trials=8)
    result = json.loads((run / "search" / "result.json").read_text())
    assert [len(curve) > 0 for curve in result["hypervolume"].values()] == [True] * 3
    assert set(result["hypervolume"]) == set(result["equal_calls"]["hypervolume"])
    assert len(result["trials"]) == 14 + 8 + 8
    assert result["equal_trials"]["trials"] == 8
    at_8 = {c["trials"]: c["hypervolume"] for c in result["hypervolume"]["random"]}[8]
    assert result["equal_trials"]["hypervolume"]["random"] == at_8
    # A schedule that another method has tried costs nothing: both uniform ones at least.
    for method in ("random", "paper"):
        spent = result["calls"][method]
        assert spent["calls"] + spent["reused_calls"] == 8 * 4 * 32
        assert spent["reused_calls"] >= 2 * 4 * 32
    entries = read_pareto(run / "search" / "pareto.json")
    schedules = [json.dumps(entry["schedule"]) for entry in entries]
    assert len(set(schedules)) == len(schedules)
    before = {json.dumps(e["schedule"]) for e in read_pareto(searched / "search" / "pareto.json")}
    assert before & set(schedules)
    page = write_report(Run.open(run)).read_text()
    assert "Search methods" in page and "<td>paper</td>" in page and "Hypervolume against" in page


def test_a_budget_and_a_greatest_distance_choose_other_schedules(searched, tmp_path):
    run = shutil.copytree(searched, tmp_path / "run")
    search_here(run, resume=True, budget=0.4)
    widths = StepSchedule.load(run / "schedule.json").widths
    full = next(e for e in read_pareto(run / "search/pareto.json") if e.get("baseline") == "full")
    narrow = next(e for e in read_pareto(run / "search/pareto.json") if e["macs_fraction"] < 0.4)
    fraction = (widths.count(1.0) + widths.count(0.5) * _share(searched)) / 4
    assert fraction <= 0.4 and narrow["macs"] < full["macs"]
    with pytest.raises(InputError, match=r"`max_distance` \(=0.001\)"):
        search_here(run, resume=True, max_distance=0.001)


def test_schedules_of_the_table_can_be_given_more_trials(searched, tmp_path):
    run = shutil.copytree(searched, tmp_path / "run")
    counts = []
    for trials in (4, 9):
        search_here(run, method="importance", trials=trials, resume=True)
        result = json.loads((run / "search" / "result.json").read_text())
        counts.append(sum(trial["method"] == "importance" for trial in result["trials"]))
    assert counts[0] == 4 < counts[1] <= 9


def test_a_latency_file_may_move(tiny_run, tmp_path):
    run, content = shutil.copytree(tiny_run, tmp_path / "run"), {"1.0": 4.0, "0.5": 1.0}
    for name in ("a", "b"):
        widths = {width: {"median_ms": ms} for width, ms in content.items()}
        (tmp_path / name).write_text(json.dumps({"widths": widths}))
    options = {"segments": 2, "trials": 4, "images": 16}
    search_here(run, cost=f"latency:{tmp_path / 'a'}", **options)
    search_here(run, cost=f"latency:{tmp_path / 'b'}", resume=True, **options)
    widths["1.0"]["median_ms"] = 5.0
    (tmp_path / "b").write_text(json.dumps({"widths": widths}))
    with pytest.raises(InputError, match="cost_per_width"):
        search_here(run, cost=f"latency:{tmp_path / 'b'}", resume=True, **options)


def test_dropout_does_not_change_what_a_network_is_known_by(tmp_path):
    from ddsm_tf.training.importance import weights_fingerprint

    settings = {"base_channels": 8, "channel_multipliers": (1, 2), "widths": (1.0, 0.5)}
    config = dataclasses.replace(get_preset("digits"), dropout=0.1, **settings)
    run = Run.create(tmp_path / "run", config)
    model = run.new_model()
    run.save_weights(model)
    known = {weights_fingerprint(run.load_unet()) for _ in range(3)}
    assert known == {weights_fingerprint(model.unet)}
    variable = model.unet.trainable_variables[-1]
    variable.assign(variable + 1.0)
    assert weights_fingerprint(model.unet) not in known


def test_what_a_tolerance_would_save_is_said(searched, tmp_path):
    run = shutil.copytree(searched, tmp_path / "run")
    said = search_here(run, resume=True, budget=1.0)
    result = json.loads((run / "search" / "result.json").read_text())
    trials = result["trials"]
    (full,) = (trial["distance"] for trial in trials if trial["cost_fraction"] == 1.0)
    assert result["cheaper_within"]
    for offer in result["cheaper_within"]:
        limit = (1 + offer["tolerance"]) * full
        within = [t["cost_fraction"] for t in trials if t["distance"] <= limit]
        assert offer["cost_fraction"] == pytest.approx(min(within))
        saved, tolerance = 1 - offer["cost_fraction"], offer["tolerance"]
        words = f"{100 * saved:.0f} % within {100 * tolerance:.0f} %"
        assert words in said and words in write_report(Run.open(run)).read_text()


def _share(run):
    """MACs of a step at width 0.5 over those at full width."""
    entries = read_pareto(run / "search" / "pareto.json")
    return next(e for e in entries if e.get("baseline") == "uniform:0.5")["macs_fraction"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "magic"}, r"`--method` \(='magic'\) must be one of nsga2"),
        ({"budget": 1.5}, r"`--budget` \(=1.5\) must lie in \(0, 1\]"),
        ({"budget": 0.5, "max_distance": 3.0}, "exclude each other"),
        ({"max_distance": -1.0}, r"`--max-distance` \(=-1.0\)"),
        ({"budget": 0.5, "tolerance": 0.1}, "exclude each other"),
        ({"tolerance": -0.1}, r"`--tolerance` \(=-0.1\) must lie in \[0, 1\]"),
        ({"refinements": 9}, r"`--refinements` \(=9\)"),
        ({"cost": "joules"}, r"`--cost` \(='joules'\)"),
        ({"trials": 1}, r"`trials` \(=1\) must be at least 2"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(tiny_run, options, named):
    with pytest.raises(InputError, match=named):
        search_here(tiny_run, **options)
    assert not (tiny_run / "search").exists()


def test_every_option_of_the_command_reaches_the_search(searched, tmp_path, monkeypatch):
    import ddsm_tf.training.search as program

    given = {}
    monkeypatch.setattr(
        program, "search_run", lambda run, options, resume: given.update(vars(options)) or "done"
    )
    words = "--method random --sampler ddpm --steps 7 --cost parameters --trials 9 --images 5"
    words += " --segments 3 --refinements 1 --skips --budget 0.4 --confirm-images 6 --memory 2"
    words += " --guidance 2.5 --guidance-widths free --xla"
    assert cli.run(["search", str(searched), *words.split(), "--seed", "8", "--resume"]) == 0
    assert given == {
        "method": "random",
        "sampler": "ddpm",
        "guidance_scale": 2.5,
        "guidance_widths": "free",
        "steps": 7,
        "cost": "parameters",
        "trials": 9,
        "images": 5,
        "seed": 8,
        "segments": 3,
        "refinements": 1,
        "skips": True,
        "budget": 0.4,
        "max_distance": None,
        "tolerance": 0.0,
        "confirm_images": 6,
        "memory": 2,
        "xla": True,
    }
    for option, name in (("--max-distance", "max_distance"), ("--tolerance", "tolerance")):
        assert cli.run(["search", str(searched), option, "0.25", "--resume"]) == 0
        assert given[name] == 0.25


def test_steps_may_be_left_out_and_refined(tiny_run, searched, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    search_here(run, segments=2, refinements=1, skips=True, cost="parameters", trials=16)
    entries = read_pareto(run / "search" / "pareto.json")
    assert any(len(entry["schedule"]["timesteps"]) < 4 for entry in entries)
    full = next(entry for entry in entries if entry.get("baseline") == "full")
    assert all(entry["parameters"] <= full["parameters"] for entry in entries)
    shares = {entry["macs_fraction"] for entry in entries}
    assert min(shares) <= 0.5 * _share(searched) + 1e-9 and max(shares) == 1.0
    # What is left out counts as saved, whoever says it.
    shorter = next(e for e in entries if len(e["schedule"]["timesteps"]) < 4)
    (run / "schedule.json").write_text(json.dumps(shorter["schedule"]))
    opened = Run.open(run)
    result = evaluate_run(opened, opened.schedule(None), 4, 0)
    assert result["macs_fraction"] == pytest.approx(shorter["macs_fraction"])
    page = write_report(opened).read_text()
    assert f"{100 * (1 - shorter['macs_fraction']):.0f} % of the MACs saved" in page
    assert evaluate_run(opened, opened.schedule("full"), 4, 0)["macs_fraction"] == 1.0


def test_importance_writes_its_table_and_schedules(searched, tmp_path):
    run = shutil.copytree(searched, tmp_path / "run")
    options = ["--budget", 0.5, "--budget", 0.9, "--steps", 20, "--min-run", 4]
    done = run_ddsm("importance", run, *options, *["-o", tmp_path / "s"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3 and str(run / "importance.json") in done.stdout
    # It was there already, of the same weights.
    assert (run / "importance.json").read_bytes() == (searched / "importance.json").read_bytes()
    half, most = (StepSchedule.load(tmp_path / "s" / f"budget_{b}.json") for b in (0.5, 0.9))
    assert len(half) == len(most) == 20
    assert half.widths.count(0.5) > most.widths.count(0.5) > 0
    assert all(steps >= 4 for _, steps in half.segments() + most.segments())


def test_a_table_of_other_weights_is_measured_again(searched, tmp_path):
    from ddsm_tf.training.importance import importance_of

    run = Run.open(shutil.copytree(searched, tmp_path / "run"))
    model = run.load_model()
    before = importance_of(run, model)
    variable = model.unet.trainable_variables[-1]
    variable.assign(variable + 0.1)
    after = importance_of(run, model)
    assert after.weights != before.weights
    assert not np.allclose(after.error, before.error, rtol=1e-4)
    run.importance_path.write_text("{}")
    with pytest.raises(InputError, match="delete it to measure again"):
        importance_of(run, model)
