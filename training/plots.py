"""The report's plots, each returned as a matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ddsm_tf.schedule import StepSchedule

SIZE = (6.4, 3.6)


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
    entries: Sequence[dict[str, Any]], chosen: StepSchedule | None, distance_name: str
) -> Figure:
    """Distance against the share of the full MACs: trials, baselines, and the chosen schedule.

    Args:
        entries: of `pareto.json`.
        chosen: the schedule to mark.
        distance_name: label of the vertical axis.
    """
    figure, axes = _new("share of full-width MACs", distance_name)
    found = [entry for entry in entries if "baseline" not in entry]
    axes.plot(*_points(found), "o-", label="found by search", color="tab:blue")
    names = {"full": ("*", "full width"), "random": ("x", "random")}
    labelled = set()
    for entry in entries:
        if "baseline" not in entry:
            continue
        kind = entry["baseline"].split(":")[0]
        marker, label = names.get(kind, ("s", "uniform width"))
        style = {
            "marker": marker,
            "color": {"*": "black", "x": "tab:gray"}.get(marker, "tab:orange"),
        }
        axes.plot(
            *_points([entry]), linestyle="", label=None if label in labelled else label, **style
        )
        labelled.add(label)
    for entry in entries:
        if chosen is not None and entry["schedule"] == chosen.to_dict():
            axes.plot(*_points([entry]), "o", ms=13, mfc="none", mec="tab:red", label="chosen")
            break
    axes.legend()
    return figure


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
