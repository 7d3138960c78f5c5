"""`report.html`: one self-contained page of what a run gave."""

from __future__ import annotations

import base64
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.console import BAD_INPUT
from ddsm_tf.cost import forward_cost, schedule_cost
from ddsm_tf.errors import ForeseenFailure, InputError
from ddsm_tf.files import atomic_file, read_json
from ddsm_tf.images import image_grid, png_bytes
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.importance import ImportanceTable
from ddsm_tf.search.pareto import read_pareto
from ddsm_tf.training.callbacks import read_history
from ddsm_tf.training.config import RunConfig
from ddsm_tf.training.flat_config import FILLED_IN
from ddsm_tf.training.plots import importance_plot, loss_plot, search_figures, to_png
from ddsm_tf.training.run import Run
from ddsm_tf.training.sample import sample_with_bar
from ddsm_tf.training.search_result import cheaper_note

GRID_IMAGES = 64
SEED = 0
RESULT_KEYS = {
    "calls",
    "chosen_distance",
    "confirm_images",
    "confirm_seeds",
    "cost",
    "difference",
    "difference_error",
    "distance_name",
    "equal_calls",
    "equal_cost",
    "equal_trials",
    "floor",
    "full_distance",
    "full_spread",
    "hypervolume",
    "images",
    "proxy_rank_correlation",
    "trials",
}


def write_report(run: Run) -> Path:
    """Write `report.html` into the run folder; sections without results are left out.

    Returns:
        Its path.

    Raises:
        InputError: the run has no weights, or its search results or its bundle are broken.
        ForeseenFailure: the process that samples from the bundle failed or was killed.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ddsm_tf.training"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(_content(run))
    path = run.path / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _content(run: Run) -> dict[str, Any]:
    unet = run.load_unet()
    costs = _costs(unet)
    macs = {cost["width"]: cost["macs"] for cost in costs}
    schedule = run.schedule(None)
    result = read_search_result(run)
    entries = read_pareto(run.search_path / "pareto.json") if result else []
    return {
        "title": f"ddsm_tf: {run.config.preset}, {run.config.steps:,} training steps",
        "headline": _headline(schedule, run.full_schedule(schedule), macs, result),
        "pictures": _pictures(run, schedule),
        "plots": (_search_plots(entries, schedule, result) if entries else [])
        + _importance_plots(run),
        "rows": _rows(entries, schedule),
        "distance_name": result.get("distance_name", ""),
        "search_note": _search_note(result),
        "methods": _methods(result),
        "equal_trials": result.get("equal_trials", {}).get("trials", 0),
        "equal_calls": result.get("equal_calls", {}).get("full_calls", 0.0),
        "equal_cost": result.get("equal_cost", {}),
        "spent": _spent(result),
        "costs": costs,
        "training_plots": _training_plots(run),
        "commands": _commands(run),
    }


def read_search_result(run: Run) -> dict[str, Any]:
    """What the search measured beside the front (`search/result.json`); empty before one.

    Raises:
        InputError: the file is broken.
    """
    path = run.search_path / "result.json"
    if not path.exists():
        return {}
    result = read_json(path, argument="search result")
    if not isinstance(result, dict) or not set(result) >= RESULT_KEYS:
        raise InputError(f"search result {path}: must be an object with {sorted(RESULT_KEYS)}")
    return result


def _headline(
    schedule: StepSchedule,
    full: StepSchedule,
    macs: dict[float, int],
    result: dict[str, Any],
) -> str:
    saved = 100 * (1 - schedule_cost(schedule, macs) / schedule_cost(full, macs))
    text = f"{len(schedule)} {schedule.sampler.upper()} steps with {saved:.0f} % of the MACs saved"
    if result:
        text += (
            f"; distance {result['chosen_distance']:.3f} against {result['full_distance']:.3f} "
            f"± {result['full_spread']:.3f} at full width"
        )
    return text + "."


def _search_note(result: dict[str, Any]) -> str:
    if not result:
        return ""
    correlation = result["proxy_rank_correlation"]
    ranked = (
        ""
        if correlation is None
        else (
            f" The importance table ranks the schedules with a correlation of {correlation:.2f} "
            "(Spearman) with their distances."
        )
    )
    return (
        f"Trials compare {result['images']} images from the same noise; as many real images have "
        f"a distance of {result['floor']:.3f}. The chosen schedule was confirmed on "
        f"{len(result['confirm_seeds'])} other seeds of {result['confirm_images']} images, where "
        f"full width has {result['full_distance']:.3f} ± {result['full_spread']:.3f} (mean and "
        f"standard deviation) and the chosen schedule {result['chosen_distance']:.3f}. Seed by "
        f"seed they differ by {result['difference']:+.3f} ± {result['difference_error']:.3f} "
        f"(standard error).{ranked}{_cheaper(result)}"
    )


def _cheaper(result: dict[str, Any]) -> str:
    note = cheaper_note(result)
    return f" {note[0].upper()}{note[1:]}." if note else ""


def _methods(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method: what it found in the end, after equal trials and equal calls."""
    return [
        {
            "name": method,
            **curve[-1],
            "at_equal_trials": result["equal_trials"]["hypervolume"][method],
            "at_equal_calls": result["equal_calls"]["hypervolume"][method],
        }
        for method, curve in result.get("hypervolume", {}).items()
    ]


def _spent(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each stage of the search: UNet calls, what sharing states saved, and the sum."""
    rows = [{"name": name, **calls} for name, calls in result.get("calls", {}).items()]
    if rows:
        keys = [key for key in rows[0] if key != "name"]
        rows.append({"name": "total", **{key: sum(row[key] for row in rows) for key in keys}})
    return rows


def _pictures(run: Run, schedule: StepSchedule) -> list[dict[str, str]]:
    full = run.full_schedule(schedule)
    real = run.load_data().images
    rows = np.random.default_rng(SEED).permutation(len(real))[:GRID_IMAGES]
    model = run.load_model()
    pictures = [
        _picture("Real images", real[rows]),
        _picture("Full width", sample_with_bar(model, full, GRID_IMAGES, SEED)),
        _picture("Step-aware schedule", sample_with_bar(model, schedule, GRID_IMAGES, SEED)),
    ]
    edge = _edge_images(run, schedule)
    if edge is not None:
        pictures.append(_picture("The same schedule on LiteRT, without TensorFlow", edge))
    return pictures


def _edge_images(run: Run, schedule: StepSchedule) -> np.ndarray | None:
    """Images of the run's bundle by `ddsm-edge` in a process of its own, if there is a bundle."""
    if not run.bundle_path.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        schedule_file, out = Path(folder) / "schedule.json", Path(folder) / "edge.npy"
        schedule.save(schedule_file)
        # -P: a module that lies in the working directory must not be imported.
        command = [sys.executable, "-P", "-m", "ddsm_tf.edge.cli", "sample", str(run.bundle_path)]
        command += ["-n", str(GRID_IMAGES), "--seed", str(SEED), "-o", str(out)]
        command += ["--schedule", str(schedule_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _edge_failure(run.bundle_path, done.returncode, done.stderr.strip())
        return np.load(out)


def _edge_failure(bundle: Path, code: int, said: str) -> Exception:
    """The error for a `ddsm-edge` that ended with this code, below 0 for a signal, and words."""
    if code == BAD_INPUT:
        return InputError(said)
    lines = said.splitlines() or [f"exit code {code}"]
    reason = f"failed: {lines[-1]}"
    if code < 0:
        reason = f"was killed by signal {-code}, for lack of memory perhaps"
    return ForeseenFailure(
        f"sampling from {bundle} {reason}; move it away for a report without its images"
    )


def _picture(caption: str, images: np.ndarray) -> dict[str, str]:
    scale = max(1, 32 // images.shape[1])
    return {"caption": caption, "png": _base64(png_bytes(image_grid(images), scale))}


def _search_plots(
    entries: list[dict[str, Any]], schedule: StepSchedule, result: dict[str, Any]
) -> list[dict[str, str]]:
    figures = search_figures(entries, schedule, result)
    plots = [
        _plot("Distance and cost of every trial; the band is the noise", figures["pareto"]),
        _plot("Width at each step", figures["schedules"]),
    ]
    if len(result["hypervolume"]) > 1:
        plots.append(_plot("Hypervolume against UNet calls", figures["hypervolume"]))
    return plots


def _importance_plots(run: Run) -> list[dict[str, str]]:
    if not run.importance_path.exists():
        return []
    table = ImportanceTable.load(run.importance_path)
    caption = "Held-out error of each width, with two standard errors, and its effect on the image"
    return [_plot(caption, importance_plot(table, run.schedule("full"), run.noise_table))]


def _training_plots(run: Run) -> list[dict[str, str]]:
    history = read_history(run.path / "logs" / "history.jsonl")
    if not history:
        return []
    return [_plot("Loss of each width", loss_plot(history, run.config.widths))]


def _plot(caption: str, figure: Any) -> dict[str, str]:
    return {"caption": caption, "png": _base64(to_png(figure))}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _rows(entries: list[dict[str, Any]], schedule: StepSchedule) -> list[dict[str, Any]]:
    rows = []
    for entry in entries:
        described = StepSchedule.from_dict(entry["schedule"]).describe()
        name = f"{entry['baseline']}: {described}" if "baseline" in entry else described
        rows.append({**entry, "name": name, "chosen": entry["schedule"] == schedule.to_dict()})
    return rows


def _costs(unet: Any) -> list[dict[str, Any]]:
    costs = []
    for width in unet.widths:
        cost = forward_cost(unet, width)
        costs.append({"width": width, "parameters": cost.parameters, "macs": cost.total_macs})
    return [{**cost, "fraction": cost["macs"] / costs[0]["macs"]} for cost in costs]


def _commands(run: Run) -> str:
    folder = shlex.quote(run.path.name)
    return "\n".join(
        [
            *_training_commands(run, folder),
            f"ddsm sample {folder} -n 64 --seed {SEED} -o samples.png",
            f"ddsm evaluate {folder} --json",
            f"ddsm export {folder} bundle -o bundle",
            f"ddsm-edge sample bundle -n 64 --seed {SEED} -o edge.png",
            f"ddsm report {folder}",
        ]
    )


def _training_commands(run: Run, folder: str) -> list[str]:
    """What made the network and its schedule."""
    from ddsm_tf.training.presets import get_preset
    from ddsm_tf.training.tune import tuned_config

    config = run.config
    if config.tuned_from:
        source, schedule = shlex.quote(config.tuned_from), f"{folder}/tuning/schedule.json"
        settings = _settings(tuned_config(Run.open(run.tuning_path)), config)
        return [f"ddsm tune {source} --schedule {schedule} --out {folder}{settings}"]
    settings = _settings(get_preset(config.preset), config)
    return [f"ddsm train {config.preset} --out {folder}{settings}", f"ddsm search {folder}"]


def _settings(start: RunConfig, config: RunConfig) -> str:
    """The `--set` options that turn a configuration into another."""
    before, after = start.to_dict(), config.to_dict()
    changed = {
        key: value for key, value in after.items() if key not in FILLED_IN and value != before[key]
    }
    texts = {
        key: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for key, value in changed.items()
    }
    return "".join(f" --set {shlex.quote(f'{key}={text}')}" for key, text in texts.items())
