"""The search program: from a run's weights to its Pareto set and chosen schedule."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import keras

from ddsm_tf.cost import cost_fraction, macs_per_width
from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import atomic_file, read_json, write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search import Evolution, ScheduleEvaluator, ScheduleSpace
from ddsm_tf.search.pareto import Entry, pareto_entries, write_pareto
from ddsm_tf.search.search import Confirmation, Confirmer, check_trials, choose, run_trials
from ddsm_tf.training.evaluate import frechet_distance_of
from ddsm_tf.training.plots import search_figures, to_png
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run

CONFIRM_SEEDS = 4


def search_run(
    run: Run,
    *,
    resume: bool = False,
    sampler: str = "ddim",
    steps: int | None = None,
    cost: str = "macs",
    trials: int | None = None,
    images: int | None = None,
    seed: int = 0,
) -> str:
    """Search schedules; write `schedule.json` and, in `search/`, `pareto.json`, its plots and more.

    Args:
        run: a trained run.
        resume: go on with the search that the run holds.
        sampler, steps: of every schedule.
        cost: "macs", or "latency:FILE" with the JSON that `ddsm-edge benchmark` prints.
        trials, images: None takes the configuration's.
        seed: of the search and its common noise.

    Returns:
        What was found, in words.

    Raises:
        InputError: there are no weights, a search is there already, or it had other settings.
    """
    check_new_or_resumed(run, resume)
    model = run.load_model()
    macs = macs_per_width(model.unet)
    base = run.schedule("full", sampler=sampler, steps=steps)
    space = ScheduleSpace(base, model.unet.widths, run.config.search_segments)
    trials = check_trials(trials or run.config.search_trials, space)
    cost_per_width = macs if cost == "macs" else read_latency(cost, model.unet.widths)
    evaluate = ScheduleEvaluator(
        model.denoise,
        run.noise_table,
        model.unet.image_shape,
        frechet_distance_of(run),
        macs,
        cost=cost_per_width,
        images=images or run.config.search_images,
    )
    settings = {
        "steps": base.to_dict(),
        "segments": space.segments,
        "cost": cost,
        "images": evaluate.images,
        "seed": seed,
        "weights": _fingerprint(model.unet),
        "population": min(max(trials // 4, 8), 50),
    }
    settings = _keep_settings(run, settings)
    evolution = Evolution(space, settings["population"], seed)
    entries = _run_trials(run, evaluate, evolution, trials)
    front = pareto_entries(entries, "cost")
    seeds = range(seed + 1, seed + 1 + CONFIRM_SEEDS)
    with progress_bar(0, "confirm") as bar:
        confirm = Confirmer(
            evaluate, seeds, search_folder(run) / "confirmations.json", on_measured=bar.update
        )
        full, chosen = choose(front, confirm)
    write_pareto(search_folder(run) / "pareto.json", [_public(entry, cost) for entry in front])
    result = _result(evaluate, entries, full, chosen, list(seeds))
    write_json(search_folder(run) / "result.json", result)
    chosen.schedule.save(run.schedule_path)
    for name, figure in search_figures(front, chosen.schedule, result).items():
        with atomic_file(search_folder(run) / f"{name}.png") as temporary:
            temporary.write_bytes(to_png(figure))
    return _describe(run, full, chosen, cost_fraction(chosen.schedule, macs), len(entries))


def search_folder(run: Run) -> Path:
    """Where a run keeps its search."""
    return run.path / "search"


def check_new_or_resumed(run: Run, resume: bool) -> None:
    """Raise `InputError` if there is a search that nobody asked to go on with."""
    folder = search_folder(run)
    if (folder / "settings.json").exists() and not resume:
        rule = "holds a search; pass --resume to go on with it, or delete it to start anew"
        raise invalid("RUN", str(folder), rule)


def _keep_settings(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings of a new search; for an old one, its own if they are the same."""
    path = search_folder(run) / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return settings
    old = read_json(path, argument="search settings")
    if not isinstance(old, dict) or set(old) != set(settings):
        raise InputError(f"search settings {path}: are broken; delete {search_folder(run)}")
    for key, value in settings.items():
        # The population follows the number of trials, which may be raised.
        if old[key] != value and key != "population":
            rule = f"differs from the search's; delete {search_folder(run)} to start anew"
            raise invalid(key, value, rule)
    return old


def _fingerprint(unet: Any) -> str:
    """SHA-256 of the weights: trials of one network say nothing of another."""
    digest = hashlib.sha256()
    for variable in unet.variables:
        digest.update(keras.ops.convert_to_numpy(variable).tobytes())
    return digest.hexdigest()


def _run_trials(
    run: Run, evaluate: ScheduleEvaluator, evolution: Evolution, trials: int
) -> list[Entry]:
    done = len(list((search_folder(run) / "trials").glob("trial_*")))
    with progress_bar(min(trials, evolution.space.size), "search", initial=done) as bar:
        return run_trials(
            evolution,
            evaluate,
            trials=trials,
            seed=evolution.seed,
            directory=search_folder(run),
            on_trial=bar.update,
        )


def _result(
    evaluate: ScheduleEvaluator,
    entries: list[Entry],
    full: Confirmation,
    chosen: Confirmation,
    seeds: list[int],
) -> dict[str, Any]:
    return {
        "distance_name": evaluate.distance.name,
        "chosen_distance": chosen.mean,
        "full_distance": full.mean,
        "full_spread": full.spread,
        "images": evaluate.images,
        "confirm_seeds": seeds,
        "trials": [{key: entry[key] for key in ("distance", "macs_fraction")} for entry in entries],
    }


def read_latency(cost: str, widths: tuple[float, ...]) -> dict[float, float]:
    """Width → median milliseconds a step, of `latency:FILE`.

    Raises:
        InputError: `cost` is neither macs nor latency:FILE, the file cannot be read, or it lacks
            one of the model's widths.
    """
    kind, _, path = cost.partition(":")
    if kind != "latency" or not path:
        raise invalid("--cost", cost, "must be macs or latency:FILE")
    value = read_json(path, argument="latency")
    table = {}
    for width in widths:
        try:
            latency = value["widths"][str(width)]["median_ms"]
        except (KeyError, TypeError, IndexError) as error:
            rule = f"has no widths.{width}.median_ms; see `ddsm-edge benchmark --json`"
            raise invalid("latency", path, rule) from error
        if not isinstance(latency, (int, float)) or not 0 < latency < math.inf:
            raise invalid("median_ms", latency, f"of width {width} must be a positive number")
        table[width] = float(latency)
    return table


def _public(entry: Entry, cost: str) -> Entry:
    """An entry as `pareto.json` has it."""
    named = {key: value for key, value in entry.items() if key != "cost"}
    return named if cost == "macs" else {**named, "latency_ms": entry["cost"]}


def _describe(
    run: Run, full: Confirmation, chosen: Confirmation, fraction: float, trials: int
) -> str:
    found = StepSchedule.segments(chosen.schedule)
    return "\n".join(
        [
            f"{trials} trials; chosen: "
            + ", ".join(f"{steps} steps at {width:g}" for width, steps in found),
            f"MACs saved: {100 * (1 - fraction):.0f} %",
            f"distance: {chosen.mean:.3f} (full width {full.mean:.3f}; its spread over "
            f"{len(full.distances)} seeds is {full.spread:.3f})",
            f"schedule: {run.schedule_path}",
        ]
    )
