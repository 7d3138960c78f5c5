"""The search program: from a run's weights to its Pareto set and chosen schedule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ddsm_tf.cost import schedule_cost
from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import atomic_file, read_json, write_json
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.distribution import Role
from ddsm_tf.search.pareto import Entry, pareto_entries, write_pareto
from ddsm_tf.search.search import Confirmation, Confirmer, choose, finished_trials, run_trials
from ddsm_tf.training.plots import search_figures, to_png
from ddsm_tf.training.progress import announce, progress_bar
from ddsm_tf.training.run import Run
from ddsm_tf.training.search_problem import METHODS, SearchOptions, SearchProblem
from ddsm_tf.training.search_result import cheaper_note, search_result

CONFIRM_SEEDS = 4


def search_run(run: Run, options: SearchOptions | None = None, *, resume: bool = False) -> str:
    """Search schedules; write `schedule.json` and, in `search/`, `pareto.json`, its plots and more.

    Args:
        run: a trained run.
        options: see `SearchOptions`.
        resume: go on with the search that the run holds.

    Returns:
        What was found, in words.

    Raises:
        InputError: there are no weights, a search is there already, or it had other settings.
    """
    options = options or SearchOptions()
    if Role.from_environment() is Role.WORKER:
        return _work(run, options)
    check_new_or_resumed(run, options.method, resume)
    return search(SearchProblem(run, options))


def search(problem: SearchProblem) -> str:
    """`search_run` of a problem at hand, resumed where its run holds a search."""
    settings = _keep_settings(problem)
    others = _other_methods(problem, settings)
    entries = _run_trials(problem, settings, others)
    return _finish(problem, {problem.options.method: entries, **others})


def _work(run: Run, options: SearchOptions) -> str:
    """Run trials of the chief's search, on its run folder or a copy."""
    problem = SearchProblem(run, options)
    # The chief writes them last: everything that trials need is there by then.
    announce("waiting for the chief")
    Role.WORKER.wait_for(problem.settings_path)
    settings = _check_settings(problem, _read_settings(problem))
    _run_trials(problem, settings, _other_methods(problem, settings))
    return "the chief has no more trials"


def check_new_or_resumed(run: Run, method: str, resume: bool) -> None:
    """Raise `InputError` if there is a search that nobody asked to go on with."""
    folder = run.method_path(method)
    if (folder / "trials").exists() and not resume:
        rule = "holds a search; pass --resume to go on with it, or delete it to start anew"
        raise invalid("RUN", str(folder), rule)


def _keep_settings(problem: SearchProblem) -> dict[str, Any]:
    """The settings of the search in its folder, with this method's added to `methods`."""
    # Whatever workers need must be there before they see the settings.
    problem.prepare()
    path, method = problem.settings_path, problem.options.method
    new = {**problem.settings(), "methods": {}}
    settings = _check_settings(problem, _read_settings(problem) if path.exists() else new)
    if method not in settings["methods"]:
        settings["methods"][method] = problem.method_settings()
        write_json(path, settings)
    return settings


def _read_settings(problem: SearchProblem) -> dict[str, Any]:
    path = problem.settings_path
    settings = read_json(path, argument="search settings")
    if not isinstance(settings, dict) or set(settings) != {*problem.settings(), "methods"}:
        raise InputError(
            f"search settings {path}: are broken or of another version; delete {path.parent}"
        )
    # Earlier revisions kept the latencies' file as well.
    return {**settings, "cost": str(settings["cost"]).partition(":")[0]}


def _check_settings(problem: SearchProblem, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`, if they are those of this search."""
    for key, value in problem.settings().items():
        if settings[key] != value:
            rule = f"differs from the search's; delete {problem.settings_path.parent} to start anew"
            raise invalid(key, value, rule)
    return settings


def _run_trials(
    problem: SearchProblem, settings: Mapping[str, Any], others: Mapping[str, list[Entry]]
) -> list[Entry]:
    """Run this method's trials; what the others have measured already is not measured again."""
    method = problem.options.method
    kept = settings["methods"].get(method) or problem.method_settings()
    proposer = problem.proposer(method, kept)
    folder = problem.run.method_path(method)
    every = [entry for entries in others.values() for entry in entries]
    known = {StepSchedule.from_dict(entry["schedule"]): entry for entry in every}
    done = len(list((folder / "trials").glob("trial_*")))
    total = min(problem.trials, proposer.space.size)
    with progress_bar(total, f"search ({method})", initial=done) as bar:
        return run_trials(
            proposer,
            lambda schedule: (
                _recalled(known[schedule])
                if schedule in known
                else problem.evaluate(schedule, problem.options.seed)
            ),
            trials=problem.trials,
            directory=folder,
            name_baseline=problem.name_baseline(method, proposer),
            fingerprint=_fingerprint(problem, method),
            on_trial=bar.update,
        )


def _other_methods(problem: SearchProblem, settings: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """The finished trials of every method but this one."""
    found = {}
    for method, kept in settings["methods"].items():
        if method != problem.options.method:
            proposer = problem.proposer(method, kept)
            names = problem.name_baseline(method, proposer)
            found[method] = finished_trials(proposer, problem.run.method_path(method), names)
    return found


def _recalled(entry: Entry) -> dict[str, float]:
    """The numbers of a known result, whose calls were all saved."""
    numbers = {key: value for key, value in entry.items() if key not in ("schedule", "baseline")}
    return {
        **numbers,
        "calls": 0.0,
        "reused_calls": entry["calls"] + entry["reused_calls"],
        "full_calls": 0.0,
        "reused_full_calls": entry["full_calls"] + entry["reused_full_calls"],
    }


def _fingerprint(problem: SearchProblem, method: str) -> str:
    """Of everything that a trial's result depends on."""
    text = json.dumps([method, problem.settings()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finish(problem: SearchProblem, methods: Mapping[str, list[Entry]]) -> str:
    """Choose among the trials of every method, confirm, and write what was found."""
    run, options, folder = problem.run, problem.options, problem.run.search_path
    methods = {method: methods[method] for method in METHODS if method in methods}
    measured = [entry for some in methods.values() for entry in some]
    front = pareto_entries(measured, "cost")
    seeds = range(options.seed + 1, options.seed + 1 + CONFIRM_SEEDS)
    with progress_bar(0, "confirm") as bar:
        confirm = Confirmer(
            problem.evaluate,
            seeds,
            options.confirm_images or 2 * problem.images,
            folder / "confirmations.json",
            on_measured=bar.update,
        )
        full, chosen = choose(
            measured,
            confirm,
            budget=options.budget,
            max_distance=options.max_distance,
            tolerance=options.tolerance,
        )
    front = _with_schedule(front, measured, chosen.schedule)
    public = [_public(entry, options.cost) for entry in front]
    write_pareto(folder / "pareto.json", public)
    result = search_result(problem, methods, confirm, full, chosen)
    write_json(folder / "result.json", result)
    chosen.schedule.save(run.schedule_path)
    for name, figure in search_figures(public, chosen.schedule, result).items():
        with atomic_file(folder / f"{name}.png") as temporary:
            temporary.write_bytes(to_png(figure))
    return _describe(problem, full, chosen, result)


def _with_schedule(
    front: list[Entry], measured: Sequence[Entry], schedule: StepSchedule
) -> list[Entry]:
    """`front` with the entry of a schedule, which need not be part of it."""
    wanted = schedule.to_dict()
    if any(entry["schedule"] == wanted for entry in front):
        return front
    found = next(entry for entry in measured if entry["schedule"] == wanted)
    return sorted([*front, found], key=lambda entry: entry["cost"])


def _public(entry: Entry, cost: str) -> Entry:
    """An entry as `pareto.json` has it; nothing in it depends on how the search was run."""
    names = ("schedule", "distance", "macs", "macs_fraction", "seconds", "baseline")
    public = {name: entry[name] for name in names if name in entry}
    measure = cost.partition(":")[0]
    if measure == "macs":
        return public
    return {**public, "latency_ms" if measure == "latency" else measure: entry["cost"]}


def _describe(
    problem: SearchProblem, full: Confirmation, chosen: Confirmation, result: Mapping[str, Any]
) -> str:
    full_macs = schedule_cost(full.schedule, problem.macs)
    saved = 1 - schedule_cost(chosen.schedule, problem.macs) / full_macs
    trials = sum(curve[-1]["trials"] for curve in result["hypervolume"].values())
    calls = sum(spent["full_calls"] for spent in result["calls"].values())
    note = cheaper_note(result)
    return "\n".join(
        [
            f"{trials} trials; chosen: {chosen.schedule.describe()}",
            f"MACs saved: {100 * saved:.0f} %",
            f"distance: {chosen.mean:.3f} (full width {full.mean:.3f}; its spread over "
            f"{len(full.distances)} seeds is {full.spread:.3f}; real images "
            f"{result['confirm_floor']:.3f})",
            f"seed by seed it differs from full width by {result['difference']:+.3f} ± "
            f"{result['difference_error']:.3f}",
            *([note] if note else []),
            f"cost of the search: {calls:,.0f} UNet calls at full width",
            f"schedule: {problem.run.schedule_path}",
        ]
    )
