"""The `ddsm-edge` command: NumPy, ai_edge_litert and, for PNG files, Pillow."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ddsm_tf.console import DONE, run_safely, without_stderr
from ddsm_tf.edge.benchmark import (
    benchmark,
    benchmark_decoder,
    benchmark_memory,
    benchmark_schedule,
    macs_fraction,
    memory_processes,
)
from ddsm_tf.edge.bundle import Bundle
from ddsm_tf.edge.manifest import DEFAULT
from ddsm_tf.edge.sampler import EdgeSampler
from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import atomic_folder
from ddsm_tf.images import check_image_path, save_images
from ddsm_tf.labels import check_conditional, parse_labels
from ddsm_tf.latency import WARM_UP
from ddsm_tf.schedule import StepSchedule, width_name

PROGRAM = "ddsm-edge"
# What --overwrite of `unpack` may take away.
UNPACKED = ("unet_*.tflite",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failure, 2 bad input, 130 interrupted."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Every error is one line on stderr."""
    return run_safely(PROGRAM, lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    options.command(options)
    return DONE


class _Parser(argparse.ArgumentParser):
    """Errors as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Sample images from a bundle without TensorFlow.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = _command(commands, "sample", _sample, "sample images")
    sample.add_argument("-n", dest="count", type=_count, default=16, help="images (16)")
    sample.add_argument("--seed", type=_seed, default=0, help="fixes the images (0)")
    sample.add_argument("-o", dest="out", required=True, metavar="FILE.png|FILE.npy")
    sample.add_argument(
        "--class",
        dest="classes",
        metavar="K|K,K,…|none",
        help="classes that the images take in turn (all of the model's)",
    )
    sample.add_argument("--batch", type=_count, help="images at a time (the bundle's, or 16)")
    _running(sample)

    info = _command(commands, "info", _info, "check a bundle and print what it holds")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    unpack = _command(commands, "unpack", _unpack, "write each width's plain TFLite file")
    unpack.add_argument("-o", dest="out", required=True, metavar="DIR")
    unpack.add_argument("--overwrite", action="store_true", help="replace an earlier unpacking")

    timing = _command(commands, "benchmark", _benchmark, "measure time and memory on this device")
    timing.add_argument("--batch", type=_count, help="images a step (the bundle's, or 1)")
    timing.add_argument("--rounds", type=_count, default=30, help="timed steps a width (30)")
    timing.add_argument("--json", action="store_true", help="print one JSON object")
    _running(timing)
    return parser


def _command(commands: Any, name: str, action: Callable, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.add_argument("bundle", metavar="BUNDLE", help="folder made by `ddsm export RUN bundle`")
    parser.set_defaults(command=action)
    return parser


def _running(parser: argparse.ArgumentParser) -> None:
    """Options of what runs a schedule."""
    parser.add_argument(
        "--schedule", default=DEFAULT, metavar="NAME|FILE", help="the bundle's default"
    )
    parser.add_argument("--threads", type=_count, help="CPU threads; LiteRT's choice by default")
    parser.add_argument(
        "--max-resident",
        type=_count,
        metavar="N",
        help="networks in memory, the decoder of latents among them; all that are needed by "
        "default, 1 takes the least memory",
    )


def _count(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"(={text!r}) must be an integer of at least {least}")
    return int(text)


def _sample(options: argparse.Namespace) -> None:
    check_image_path(options.out)
    _check_apart(options.out, options.bundle)
    sampler, schedule = _open(options)
    labels = parse_labels(options.classes, options.count, sampler.bundle.num_classes)
    batch = options.batch or sampler.default_batch
    bar = _Bar(len(schedule) * math.ceil(options.count / batch))
    _load_first(sampler, schedule, min(batch, options.count))
    images = sampler.sample(
        options.count,
        options.seed,
        labels=labels,
        schedule=schedule,
        batch_size=batch,
        on_step=lambda step: bar.update(),
    )
    save_images(images, options.out)
    print(options.out)


def _open(options: argparse.Namespace) -> tuple[EdgeSampler, StepSchedule]:
    bundle = Bundle.load(options.bundle)
    schedule = bundle.find_schedule(options.schedule)
    schedule.check_model(bundle.widths, bundle.noise_table.train_timesteps)
    check_conditional(schedule.guidance_scale, bundle.num_classes)
    return EdgeSampler(bundle, options.threads, options.max_resident), schedule


def _load_first(sampler: EdgeSampler, schedule: StepSchedule, batch: int) -> None:
    """Load the first step's network; LiteRT announces its delegate on stderr with the first."""
    without_stderr(lambda: sampler.network(schedule.widths[0]).prepare(batch))


def _info(options: argparse.Namespace) -> None:
    bundle = Bundle.load(options.bundle)
    schedule = bundle.schedule
    networks = {f"{width:g}": network for width, network in bundle.networks.items()}
    stored = {key: network.file.bytes for key, network in networks.items()}
    content = {
        "image_shape": list(bundle.image_shape),
        "num_classes": bundle.num_classes,
        "decoder": bundle.decoder and list(bundle.decoder.image_shape),
        "train_timesteps": bundle.noise_table.train_timesteps,
        "quantize": bundle.quantize,
        "batch": bundle.batch,
        "sampler": schedule.sampler,
        "steps": len(schedule),
        "width_counts": {f"{width:g}": n for width, n in schedule.width_counts().items()},
        "macs_saved": {name: _macs_saved(bundle, each) for name, each in bundle.schedules.items()},
        "schedules": {
            name: f"{len(each)} {each.sampler} steps" for name, each in bundle.schedules.items()
        },
        "file_bytes": stored,
        "network_bytes": {key: n.plain.bytes for key, n in networks.items()},
        "provenance": dict(bundle.provenance),
    }
    _print(content, options.json)


def _macs_saved(bundle: Bundle, schedule: StepSchedule) -> float:
    return round(1.0 - macs_fraction(bundle.networks, schedule), 4)


def _unpack(options: argparse.Namespace) -> None:
    _check_apart(options.out, options.bundle)
    bundle = Bundle.load(options.bundle)
    with atomic_folder(options.out, replaces=UNPACKED if options.overwrite else ()) as folder:
        for width in bundle.widths:
            (folder / f"{width_name(width)}.tflite").write_bytes(bundle.tflite(width))
    print(options.out)


def _check_apart(out: str, bundle: str) -> None:
    """Raise `InputError` if what is written would take the bundle away or land in its folder."""
    place, folder = Path(out).resolve(), Path(bundle).resolve()
    if folder.is_relative_to(place) or place.is_relative_to(folder):
        raise invalid("-o", out, "is the bundle, holds it or lies in it; name another place")


def _benchmark(options: argparse.Namespace) -> None:
    sampler, schedule = _open(options)
    batch = options.batch or sampler.bundle.batch or 1
    pairs = max(3, options.rounds // 6)
    timed = 2 if sampler.bundle.decoder else 1
    bar = _Bar(memory_processes(sampler.bundle) + timed * (WARM_UP + options.rounds) + pairs + 1)
    # While this process holds no network yet, for a small device has no room for both.
    memory = benchmark_memory(sampler, schedule, batch=batch, on_process=bar.update)
    _load_first(sampler, schedule, batch)
    result = benchmark(sampler, batch=batch, rounds=options.rounds, on_round=bar.update)
    medians = {float(width): row["median_ms"] for width, row in result["widths"].items()}
    result["schedule"] = benchmark_schedule(
        sampler, schedule, medians, batch=batch, pairs=pairs, on_pair=bar.update
    )
    if sampler.bundle.decoder:
        result["decoder"] = benchmark_decoder(
            sampler, batch=batch, rounds=options.rounds, on_round=bar.update
        )
    result["peak_memory_mb"] = memory
    if options.json:
        _print(result, as_json=True)
    else:
        print("\n".join(_describe(result)))


def _describe(result: Mapping[str, Any]) -> list[str]:
    memory, schedule = result["peak_memory_mb"], result["schedule"]
    lines = [
        _row(f"width {width:5}", times, memory["widths"][width])
        for width, times in result["widths"].items()
    ]
    if "decoder" in result:
        lines.append(_row("decoder    ", result["decoder"], memory["decoder"]))
    measured = schedule["measured"]
    aside = ", decoding aside" if "decoder" in result else ""
    lines += [
        f"schedule of {schedule['steps']} steps against full width{aside}: "
        f"{schedule['time_saved']:.1%} of the time saved, "
        f"{schedule['macs_saved']:.1%} of the MACs",
        f"time ratio {measured['time_ratio']:.3f} ± {measured['spread']:.3f} over "
        f"{measured['pairs']} pairs of {measured['steps']} steps; "
        f"{measured['predicted_time_ratio']:.3f} predicted from the widths' medians",
        f"peak memory {_megabytes(memory['schedule'])}, "
        f"{_megabytes(memory['widest'])} for the widest network alone",
    ]
    return lines


def _row(name: str, times: Mapping[str, float], memory: float | None) -> str:
    return (
        f"{name} {times['median_ms']:9.3f} ms  "
        f"({times['min_ms']:.3f} to {times['max_ms']:.3f})  {_megabytes(memory)}"
    )


def _megabytes(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} MB"


def _print(content: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
        return
    for key, value in content.items():
        print(f"{key:16} {value}")


class _Bar:
    """Steps done and the time left, on a terminal only."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.started = time.monotonic()
        self.visible = sys.stderr.isatty()

    def update(self) -> None:
        self.done += 1
        if not self.visible:
            return
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        end = "\n" if self.done == self.total else ""
        text = f"\r{self.done}/{self.total} steps, {left:.0f} s left  "
        print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
