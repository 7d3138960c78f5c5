"""The report's plots, each returned as a matplotlib figure."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ddsm_tf.schedule import StepSchedule

SIZE = (6.4, 3.6)
OTHER_SCHEDULES = 3
BASELINES = {
    "full": ("*", "black", "full width"),
    "uniform": ("s", "tab:orange", "uniform width"),
    "random": ("x", "tab:gray", "random"),
}


def loss_plot(history: Sequence[dict[str, float]], widths: Sequence[float]) -> Figure:
    """Training loss of each width over steps, logarithmic.

    Args:
        history: entries of `history.jsonl`.
        widths: the model's widths.
    """
    figure, axes = _new("training step", "squared error of the noise")
    for width in widths:
        name = f"loss_{width:g}"
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"width {width:g}")
    axes.set_yscale("log")
    axes.legend()
    return figure


def schedule_plot(schedules: dict[str, StepSchedule]) -> Figure:
    """The width at each timestep, one line a schedule, in sampling order: noise at the left."""
    figure, axes = _new("timestep t (sampling runs from left to right)", "width")
    for name, schedule in schedules.items():
        # A step holds from its own timestep until the next one's.
        timesteps = [*schedule.timesteps, 0]
        axes.step(timesteps, [*schedule.widths, schedule.widths[-1]], where="post", label=name)
    axes.invert_xaxis()
    axes.set_ylim(0.0, 1.05)
    axes.legend()
    return figure


def pareto_plot(
    entries: Sequence[dict[str, Any]],
    chosen: StepSchedule,
    trials: Sequence[dict[str, float]],
    distance_name: str,
) -> Figure:
    """Distance against the share of the full MACs: trials, baselines, and the chosen schedule.

    Args:
        entries: of `pareto.json`.
        chosen: the schedule to mark.
        trials: `distance` and `macs_fraction` of every trial.
        distance_name: label of the vertical axis.
    """
    figure, axes = _new("share of full-width MACs", distance_name)
    axes.plot(*_points(trials), ".", label="every trial", color="tab:blue", alpha=0.3)
    # Entries stand sorted by cost, so the front is where the distance falls to a new low.
    lows = itertools.accumulate((entry["distance"] for entry in entries), min)
    front = [entry for entry, low in zip(entries, lows, strict=True) if entry["distance"] <= low]
    axes.plot(*_points(front), "o-", label="best found", color="tab:blue")
    for kind, (marker, color, label) in BASELINES.items():
        some = [entry for entry in entries if entry.get("baseline", "").split(":")[0] == kind]
        if some:
            axes.plot(*_points(some), marker, label=label, color=color)
    for entry in entries:
        if entry["schedule"] == chosen.to_dict():
            axes.plot(*_points([entry]), "o", ms=13, mfc="none", mec="tab:red", label="chosen")
            break
    axes.legend()
    return figure


def search_figures(
    entries: Sequence[dict[str, Any]], chosen: StepSchedule, result: dict[str, Any]
) -> dict[str, Figure]:
    """The two plots of a search: `pareto` and `schedules`.

    Args:
        entries: of `pareto.json`.
        chosen: the schedule that was chosen.
        result: of `search/result.json`.
    """
    others = [e for e in entries if "baseline" not in e and e["schedule"] != chosen.to_dict()]
    stride = max(1, math.ceil(len(others) / OTHER_SCHEDULES))
    schedules = {"chosen": chosen} | {
        f"{100 * entry['macs_fraction']:.0f} % of MACs": StepSchedule.from_dict(entry["schedule"])
        for entry in others[::stride]
    }
    return {
        "pareto": pareto_plot(entries, chosen, result["trials"], result["distance_name"]),
        "schedules": schedule_plot(schedules),
    }


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _points(entries: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [e["macs_fraction"] for e in entries], [e["distance"] for e in entries]


def _new(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes
