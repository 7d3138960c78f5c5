"""The section of RESULTS.md about start-up, memory and disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tables import table


def section(content: Mapping[str, Any]) -> Iterator[str]:
    """Start-up, first image, memory and disk."""
    yield "## Start-up and footprint"
    yield ""
    rows = [
        [f"`{name}`", _seconds(found["seconds"]), f"{found['peak_mb']['median']:.0f} MB"]
        for stage in ("start", "first_image")
        for name, found in content[stage].items()
    ]
    yield from table(["a whole process", "seconds", "peak memory"], rows)
    yield ""
    names = [f"`ddsm_tf[{name}]`" if name != "none" else "`ddsm_tf`" for name in content["disk_mb"]]
    sizes = [f"{megabytes:.0f} MB" for megabytes in content["disk_mb"].values()]
    yield from table(["installed", *names], [["on disk, with all it needs", *sizes]])
    yield ""
    yield from _bundle(content["bundle"])


def _bundle(bundle: Mapping[str, Any]) -> Iterator[str]:
    one, every = bundle["memory"].values()
    widths = bundle["assembly_seconds"]
    head = ["the network's bundle, float32, batch 1", *(f"width {float(w):g}" for w in widths)]
    rows = [
        ["seconds to read and assemble", *map(_seconds, widths.values())],
        ["peak memory, alone", *(f"{one['widths'][width]:.0f} MB" for width in widths)],
    ]
    yield from table(head, rows)
    yield ""
    size, widest = bundle["bytes"], bundle["widest_bytes"]
    yield (
        f"The bundle has {size / 1e6:.1f} MB, {size / widest:.4f} times its widest network's file. "
        f"A schedule of all widths takes {one['schedule']:.0f} MB "
        f"with one network resident, {every['schedule']:.0f} MB with all."
    )


def _seconds(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
