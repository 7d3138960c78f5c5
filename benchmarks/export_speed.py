"""What a step schedule saves in the files that `ddsm export` writes: time, memory, disk.

    python benchmarks/export_speed.py -o DIR

Exports the paper's CIFAR-10 network (base 128, 32×32) with random weights and samples from it, with
the paper's CIFAR-10 schedule and at full width, which take turns. Measures

- LiteRT, float32 and dynamic int8 in files of a fixed batch: a step of every width, and whole
  trajectories, shortened, each width with its share of the steps;
- the sampler SavedModel: trajectories, and whether its images are Keras's;
- the bundle: size, time to assemble a network, peak memory with one network resident.

Writes `DIR/export_speed.json` and prints tables. An interrupted run goes on where it stopped. The
machine should do nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from networks import random_weights
from tqdm import tqdm

from ddsm_tf.console import without_stderr
from ddsm_tf.cost import cost_fraction, macs_per_width
from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge.benchmark import benchmark_memory, shortened
from ddsm_tf.export import export
from ddsm_tf.export.savedmodel import write_sampler
from ddsm_tf.files import read_json, write_json
from ddsm_tf.latency import time_widths
from ddsm_tf.models import DiffusionModel
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.serving.inputs import schedule_inputs
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import Run

# Steps of 1,000 that the DDSM paper's CIFAR-10 schedule runs at each width.
PAPER_STEPS = {0.5: 534, 0.75: 181, 1.0: 274, 0.25: 11}
PRECISIONS = ("none", "dynamic")
TIMESTEP = 500


def main() -> None:
    """Run the measurements that DIR lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10", help="its architecture (cifar10)")
    parser.add_argument("--batches", type=int, nargs="+", default=(8, 1))
    parser.add_argument("--threads", type=int, default=2, help="of LiteRT")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps a width")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of trajectories")
    parser.add_argument("--steps", type=int, default=36, help="of a shortened trajectory")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "export_speed.json"
    result = read_json(path, argument="DIR") if path.exists() else {}
    speed = ExportSpeed(options)
    for name, measure in speed.stages():
        if name not in result:
            result[name] = measure()
            write_json(path, result)
    print(tables(result))


class ExportSpeed:
    """The network, its exports and what is measured of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        run = Run(options.out, get_preset(options.preset))
        self.unet, self.noise_table = random_weights(run.new_unet()), run.noise_table
        self.macs = macs_per_width(self.unet)
        self.schedule = paper_schedule()
        self.short = shortened(self.schedule, options.steps)
        self.short_full = at_full_width(self.short)

    def stages(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Name → what measures it."""
        yield "settings", self.settings
        for batch in self.options.batches:
            yield f"litert, batch {batch}", lambda batch=batch: self.litert(batch)
            yield f"savedmodel, batch {batch}", lambda batch=batch: self.savedmodel(batch)
        yield "bundle", self.bundle

    def settings(self) -> dict[str, Any]:
        names = ("preset", "threads", "rounds", "pairs")
        return {
            **{name: getattr(self.options, name) for name in names},
            "macs": {str(width): macs for width, macs in self.macs.items()},
            "macs_saved": 1 - cost_fraction(self.schedule, self.macs),
            "short_steps": {str(width): n for width, n in self.short.width_counts().items()},
            "short_macs_saved": 1 - cost_fraction(self.short, self.macs),
        }

    def litert(self, batch: int) -> dict[str, Any]:
        """Steps and trajectories of both precisions."""
        samplers = {}
        for name in PRECISIONS:
            folder = self.export_bundle(quantize=name, batch=batch)
            samplers[name] = EdgeSampler(Bundle.load(folder), self.options.threads)
        found = {"steps": self.steps(samplers, batch), "trajectories": {}}
        for name, sampler in samplers.items():
            found["trajectories"][name] = self.pairs(
                lambda schedule, sampler=sampler: sampler.sample(
                    batch, schedule=schedule, batch_size=batch
                ),
                f"litert, {name}, batch {batch}",
            )
        return found

    def export_bundle(self, **options: Any) -> Path:
        """A bundle in DIR; one that is there is made again."""
        folder = self.options.out / f"bundle-{options.get('quantize', 'none')}"
        made = {"overwrite": folder.exists(), **options}
        return without_stderr(
            lambda: export("bundle", self.unet, self.noise_table, self.schedule, folder, **made)
        )

    def steps(self, samplers: Mapping[str, EdgeSampler], batch: int) -> dict[str, Any]:
        """Times of single steps, all widths of both precisions taking turns."""
        keys = [(name, width) for name in PRECISIONS for width in self.unet.widths]
        bar = tqdm(desc=f"steps, batch {batch}", disable=None)

        def denoise(x: np.ndarray, t: int, key: tuple[str, float]) -> np.ndarray:
            return samplers[key[0]].denoise(x, t, key[1])

        times = time_widths(
            denoise,
            keys,
            self.unet.image_shape,
            batch=batch,
            rounds=self.options.rounds,
            t=TIMESTEP,
            on_round=bar.update,
        )
        rows = {key: np.array(found) for key, found in times.items()}
        return {
            "ms": {f"{name}, {width:g}": spread(rows[name, width]) for name, width in keys},
            "time_saved": {name: spread(self.time_saved(rows, name)) for name in PRECISIONS},
            "dynamic_speed_up": {
                str(width): spread(rows["none", width] / rows["dynamic", width])
                for width in self.unet.widths
            },
        }

    def time_saved(self, rows: Mapping[tuple[str, float], np.ndarray], name: str) -> np.ndarray:
        """The share of full width's time that the schedule saves, round by round."""
        counts = self.schedule.width_counts()
        spent = sum(count * rows[name, width] for width, count in counts.items())
        return 1 - spent / (len(self.schedule) * rows[name, self.unet.widths[0]])

    def savedmodel(self, batch: int) -> dict[str, Any]:
        """Trajectories of the sampler SavedModel; at the first batch size its pixels, too."""
        path = self.options.out / "sampler"
        if not path.exists():
            write_sampler(self.unet, self.noise_table, self.schedule, path)
        sample = tf.saved_model.load(str(path)).signatures["sample_schedule"]

        def images(schedule: StepSchedule) -> np.ndarray:
            inputs = schedule_inputs(schedule, batch, seed=0)
            inputs = {name: tf.constant(value) for name, value in inputs.items()}
            return sample(**inputs)["images"].numpy()

        found = {"trajectories": self.pairs(images, f"savedmodel, batch {batch}")}
        if batch == self.options.batches[0]:
            model = DiffusionModel(self.unet, self.noise_table)
            keras_images = model.sample(self.short, batch, seed=0, batch_size=batch)
            apart = np.abs(images(self.short).astype(int) - keras_images)
            found["pixels_within_1"] = float(np.mean(apart <= 1))
            found["pixel_spread"] = float(keras_images.std())
        return found

    def pairs(self, sample: Callable[[StepSchedule], Any], name: str) -> dict[str, Any]:
        """Time saved by the short schedule, from pairs that take turns at going first."""
        shares = []
        for pair in tqdm(range(self.options.pairs + 1), name, disable=None):
            order = (self.short, self.short_full)[:: 1 if pair % 2 else -1]
            seconds = {id(schedule): _seconds(sample, schedule) for schedule in order}
            shares.append(seconds[id(self.short)] / seconds[id(self.short_full)])
        # The first pair loads and compiles.
        return {"time_saved": spread(1 - np.array(shares[1:]))}

    def bundle(self) -> dict[str, Any]:
        """Disk, assembly and memory of a float32 bundle of a fixed batch of one."""
        folder = self.export_bundle(batch=1)
        bundle = Bundle.load(folder)
        widest = bundle.networks[bundle.widths[0]].file.bytes
        total = sum(path.stat().st_size for path in folder.iterdir())
        memory = {
            str(resident): benchmark_memory(
                EdgeSampler(bundle, self.options.threads, resident), self.schedule
            )
            for resident in (1, None)
        }
        return {
            "bytes": total,
            "widest_bytes": widest,
            "assembly_seconds": {str(w): _seconds(bundle.tflite, w) for w in bundle.widths},
            "memory": memory,
        }


def paper_schedule() -> StepSchedule:
    """The paper's numbers of steps; which step has which width does not change what they cost."""
    widths = [width for width, count in PAPER_STEPS.items() for _ in range(count)]
    timesteps = range(len(widths))[::-1]
    return StepSchedule(timesteps, widths, sampler="ddim", train_timesteps=len(widths))


def at_full_width(schedule: StepSchedule) -> StepSchedule:
    """The same steps, all at width 1."""
    return schedule.with_widths([1.0] * len(schedule))


def spread(values: Any) -> dict[str, float]:
    """Median, quartiles and least value."""
    low, median, high = map(float, np.percentile(values, (25, 50, 75)))
    return {"median": median, "low": low, "high": high, "min": float(np.min(values))}


def _seconds(function: Callable[[Any], Any], argument: Any) -> float:
    started = time.perf_counter()
    function(argument)
    return time.perf_counter() - started


def tables(result: Mapping[str, Any]) -> str:
    """Markdown of everything that was measured."""
    settings = result["settings"]
    saved, short_saved = settings["macs_saved"], settings["short_macs_saved"]
    lines = [
        f"{settings['preset']}; MACs saved {saved:.3f} by the schedule, {short_saved:.3f} by its "
        f"{sum(settings['short_steps'].values())} steps",
        "",
        "| time saved / MACs saved | from single steps | trajectories |",
        "|---|---|---|",
    ]
    for name, found in result.items():
        for row in _saved_rows(name, found, saved, short_saved):
            lines.append(f"| {' | '.join(row)} |")
    for name, found in result.items():
        if "steps" in found:
            lines += ["", *_step_table(name, found["steps"])]
    return "\n".join([*lines, "", *_notes(result)])


def _saved_rows(name: str, found: Any, saved: float, short_saved: float) -> Iterator[list[str]]:
    if name.startswith("litert"):
        for precision, trajectory in found["trajectories"].items():
            steps = _share(found["steps"]["time_saved"][precision], saved)
            yield [f"{name}, {precision}", steps, _share(trajectory["time_saved"], short_saved)]
    elif name.startswith("savedmodel"):
        yield [name, "", _share(found["trajectories"]["time_saved"], short_saved)]


def _share(found: Mapping[str, float], saved: float) -> str:
    median, low, high = (found[key] / saved for key in ("median", "low", "high"))
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def _step_table(name: str, steps: Mapping[str, Any]) -> Iterator[str]:
    yield f"| {name}: ms a step | {' | '.join(PRECISIONS)} | float32 / dynamic |"
    yield "|---|---|---|---|"
    for width, speed_up in steps["dynamic_speed_up"].items():
        times = [steps["ms"][f"{precision}, {float(width):g}"] for precision in PRECISIONS]
        cells = [f"{t['median']:.1f} ({t['low']:.1f} to {t['high']:.1f})" for t in times]
        ratio = f"{speed_up['median']:.2f} ({speed_up['low']:.2f} to {speed_up['high']:.2f})"
        yield f"| {width} | {' | '.join(cells)} | {ratio} |"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    for name, found in result.items():
        if "pixels_within_1" in found:
            yield (
                f"{name}: {found['pixels_within_1']:.4%} of pixels within 1 of Keras's, whose "
                f"standard deviation is {found['pixel_spread']:.0f}"
            )
    if "bundle" in result:
        bundle = result["bundle"]
        yield f"bundle / widest file: {bundle['bytes'] / bundle['widest_bytes']:.4f}"
        yield f"seconds to read and assemble: {bundle['assembly_seconds']}"
        for resident, memory in bundle["memory"].items():
            yield (
                f"peak memory, max_resident {resident}: {memory['schedule']:.0f} MB; "
                f"widest alone {memory['widest']:.0f} MB"
            )


if __name__ == "__main__":
    main()
