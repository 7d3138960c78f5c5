"""The `ddsm-edge` command: NumPy, ai_edge_litert and, for PNG files, Pillow."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from ddsm_tf.console import DONE, run_safely, without_stderr
from ddsm_tf.edge.benchmark import benchmark
from ddsm_tf.edge.bundle import Bundle
from ddsm_tf.edge.sampler import EdgeSampler
from ddsm_tf.errors import InputError
from ddsm_tf.images import check_image_path, save_images
from ddsm_tf.latency import WARM_UP
from ddsm_tf.schedule import StepSchedule

PROGRAM = "ddsm-edge"


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

    sample = commands.add_parser("sample", help="sample images")
    sample.add_argument("bundle", metavar="BUNDLE", help="folder made by `ddsm export RUN bundle`")
    sample.add_argument("-n", dest="count", type=_count, default=16, help="images (16)")
    sample.add_argument("--seed", type=_seed, default=0, help="fixes the images (0)")
    sample.add_argument("-o", dest="out", required=True, metavar="FILE.png|FILE.npy")
    sample.add_argument("--schedule", metavar="FILE", help="schedule; the bundle's by default")
    sample.add_argument("--batch", type=_count, default=16, help="images at a time (16)")
    sample.add_argument("--threads", type=_count, help="CPU threads; LiteRT's choice by default")
    sample.set_defaults(command=_sample)

    info = commands.add_parser("info", help="check a bundle and print what it holds")
    info.add_argument("bundle", metavar="BUNDLE")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(command=_info)

    timing = commands.add_parser("benchmark", help="time a step of every width on this device")
    timing.add_argument("bundle", metavar="BUNDLE")
    timing.add_argument("--batch", type=_count, default=1, help="images a step (1)")
    timing.add_argument("--threads", type=_count, help="CPU threads; LiteRT's choice by default")
    timing.add_argument("--rounds", type=_count, default=30, help="timed steps a width (30)")
    timing.add_argument("--json", action="store_true", help="print one JSON object")
    timing.set_defaults(command=_benchmark)
    return parser


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
    bundle = Bundle.load(options.bundle)
    schedule = StepSchedule.load(options.schedule) if options.schedule else bundle.schedule
    sampler = _sampler(bundle, options.threads, schedule.width_counts())
    bar = _Bar(len(schedule) * math.ceil(options.count / options.batch))
    images = sampler.sample(
        options.count,
        options.seed,
        schedule=schedule,
        batch_size=options.batch,
        on_step=lambda step: bar.update(),
    )
    save_images(images, options.out)
    print(options.out)


def _sampler(bundle: Bundle, threads: int | None, widths: Sequence[float]) -> EdgeSampler:
    """A sampler with its networks loaded, since LiteRT announces its delegates on stderr."""
    sampler = EdgeSampler(bundle, threads)
    blank = np.zeros((1, *bundle.image_shape), np.float32)
    for width in widths:
        sampler.network(width)
    without_stderr(lambda: sampler.denoise(blank, 0, next(iter(widths))))
    return sampler


def _info(options: argparse.Namespace) -> None:
    bundle = Bundle.load(options.bundle)
    schedule = bundle.schedule
    content = {
        "image_shape": list(bundle.image_shape),
        "train_timesteps": bundle.noise_table.train_timesteps,
        "quantize": bundle.quantize,
        "sampler": schedule.sampler,
        "steps": len(schedule),
        "width_counts": {f"{width:g}": n for width, n in schedule.width_counts().items()},
        "file_bytes": {f"{width:g}": path.stat().st_size for width, path in bundle.files.items()},
    }
    _print(content, options.json)


def _benchmark(options: argparse.Namespace) -> None:
    bundle = Bundle.load(options.bundle)
    sampler = _sampler(bundle, options.threads, list(bundle.files))
    bar = _Bar(options.rounds + WARM_UP)
    result = benchmark(sampler, batch=options.batch, rounds=options.rounds, on_round=bar.update)
    if options.json:
        _print(result, as_json=True)
        return
    for width, times in result["widths"].items():
        print(
            f"width {width:5} {times['median_ms']:9.3f} ms  "
            f"({times['min_ms']:.3f} to {times['max_ms']:.3f})"
        )


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
