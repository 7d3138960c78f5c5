"""The report's plots, each returned as a matplotlib figure."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.search.importance import ImportanceTable
from ddsm_tf.search.pareto import full_width_entry

SIZE = (6.4, 3.6)
OTHER_SCHEDULES = 3
BASELINES = {
    "full": ("*", "black", "full width"),
    "uniform": ("s", "tab:orange", "uniform width"),
    "ramp": ("^", "tab:green", "two-stage ramps"),
    "importance": ("D", "tab:purple", "importance only"),
    "random": ("x", "tab:gray", "random"),
    "paper": ("P", "tab:brown", "the paper's search"),
}
COSTS = {
    "macs": ("macs", "share of full-width MACs"),
    "parameters": ("parameters", "share of full width's parameters read"),
    "latency": ("latency_ms", "share of full width's time"),
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
        if schedule.guidance_widths:
            widths = [*schedule.guidance_widths, schedule.guidance_widths[-1]]
            label = f"{name}, without the class"
            axes.step(timesteps, widths, where="post", linestyle=":", label=label)
    axes.invert_xaxis()
    axes.set_ylim(0.0, 1.05)
    axes.legend()
    return figure


def importance_plot(table: ImportanceTable, schedule: StepSchedule, noise: NoiseTable) -> Figure:
    """Each width's denoising error over t, and what a step there does to the final image.

    Args:
        table: with its standard errors, of which two are shown as a band.
        schedule: sampler and timesteps of the effect on the final image.
        noise: the forward process.
    """
    figure = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    effect = table.sample_effect(schedule, noise)
    for row, width in enumerate(table.widths):
        ratio = table.error[row] / table.error[0]
        band = 2 * table.standard_error[row] / table.error[0]
        (line,) = left.plot(table.timesteps, ratio, label=f"width {width:g}")
        left.fill_between(
            table.timesteps, ratio - band, ratio + band, alpha=0.15, color=line.get_color()
        )
        right.plot(schedule.timesteps, effect[row], color=line.get_color())
    left.set_ylabel("error of the noise / full width's")
    right.set_ylabel("squared error added to the final image")
    left.set_yscale("log")
    right.set_yscale("symlog", linthresh=max(effect.max(), 1e-12) / 1000)
    left.legend()
    for axes in (left, right):
        axes.set_xlabel("timestep t (sampling runs from left to right)")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    return figure


def pareto_plot(
    entries: Sequence[dict[str, Any]], chosen: StepSchedule, result: dict[str, Any]
) -> Figure:
    """Distance against the share of full width's cost: trials, front, baselines, and the choice.

    The band is full width's own spread from seed to seed, and the dashed line what as many real
    images have: differences below the one and distances below the other mean nothing.

    Args:
        entries: of `pareto.json`.
        chosen: the schedule to mark.
        result: of `search/result.json`.
    """
    key, label = COSTS[result["cost"]]
    figure, axes = _new(label, result["distance_name"])
    full = full_width_entry(entries)

    def draw(some: Sequence[dict[str, Any]], *style: str, **options: Any) -> None:
        fractions = [entry[key] / full[key] for entry in some]
        axes.plot(fractions, [entry["distance"] for entry in some], *style, **options)

    trials = result["trials"]
    axes.plot(
        [trial["cost_fraction"] for trial in trials],
        [trial["distance"] for trial in trials],
        ".",
        label="every trial",
        color="tab:blue",
        alpha=0.3,
    )
    # Entries stand sorted by cost, so the front is where the distance falls to a new low.
    lows = itertools.accumulate((entry["distance"] for entry in entries), min)
    front = [entry for entry, low in zip(entries, lows, strict=True) if entry["distance"] <= low]
    draw(front, "-", label="best found", color="tab:blue")
    for kind, (marker, color, name) in BASELINES.items():
        some = [entry for entry in entries if entry.get("baseline", "").split(":")[0] == kind]
        if some:
            draw(some, marker, label=name, color=color, ms=5)
    marked = [entry for entry in entries if entry["schedule"] == chosen.to_dict()][:1]
    draw(marked, "o", ms=13, mfc="none", mec="tab:red", label="chosen")
    axes.axhspan(
        full["distance"] - result["full_spread"],
        full["distance"] + result["full_spread"],
        color="tab:gray",
        alpha=0.15,
    )
    axes.axhline(result["floor"], ls="--", lw=1, color="tab:gray", label="real images")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return figure


def hypervolume_plot(curves: dict[str, list[dict[str, float]]]) -> Figure:
    """How much each method had found after how many UNet calls.

    Args:
        curves: `hypervolume` of `search/result.json`.
    """
    figure, axes = _new("UNet calls at full width", "hypervolume")
    for method, curve in curves.items():
        calls = [point["full_calls"] for point in curve]
        axes.plot(calls, [point["hypervolume"] for point in curve], "o-", ms=4, label=method)
    axes.set_xscale("log")
    axes.legend()
    return figure


def search_figures(
    entries: Sequence[dict[str, Any]], chosen: StepSchedule, result: dict[str, Any]
) -> dict[str, Figure]:
    """The plots of a search: `pareto`, `schedules` and `hypervolume`.

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
        "pareto": pareto_plot(entries, chosen, result),
        "schedules": schedule_plot(schedules),
        "hypervolume": hypervolume_plot(result["hypervolume"]),
    }


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _new(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes
