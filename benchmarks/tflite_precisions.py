"""Compares the precisions of TFLite files: size, time, error over t, and what becomes of images.

    python benchmarks/tflite_precisions.py RUN -o DIR --schedule FILE
    python benchmarks/tflite_precisions.py --preset cifar10 -o DIR --widths 1,0.5 --batches 1,8

The first measures everything on a trained run. The second takes random weights and measures sizes
and times alone, in files with a fixed batch. Writes `DIR/tflite_precisions.json` and prints tables;
the first draws a plot, too. Beside what `ddsm export --quantize` offers it can measure what
TFLiteConverter makes of the same network: `--precisions all`. An interrupted comparison goes on
where it stopped; after a change of code or weights take another DIR.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from matplotlib.figure import Figure
from networks import random_weights
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from tqdm import tqdm

from ddsm_tf.console import without_stderr
from ddsm_tf.export import QUANTIZE
from ddsm_tf.export.calibration import TRAJECTORIES, Samples, calibration_samples
from ddsm_tf.export.quantization import end_convolutions
from ddsm_tf.export.savedmodel import denoiser_function
from ddsm_tf.export.tflite import convert, delegation, numbered_layers
from ddsm_tf.files import atomic_file, read_json, write_json
from ddsm_tf.latency import summary, time_widths
from ddsm_tf.models.compiled import CompiledDenoiser
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.evaluate import frechet_distance_of
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import Run

CONVERTER = ("converter-dynamic", "converter-int8", "converter-int8-mixed")
# What the library's own recipe keeps float32, so that the tools are compared on equal terms.
FLOAT_NODES = r"(?i)timestep_?embedding|group_?norm|attention_?block[^/]*/(MatMul|Softmax|mul)"
ERROR_SEED, CALIBRATION_SEED = 1_000_001, 0
TIMESTEP = 500
# Near the end the state is all image, and a relative error says little: ε counts for little there.
LATE = 100

Files = Mapping[tuple[str, float], bytes]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Run.open)
    parser.add_argument("--preset", type=get_preset, help="random weights of this architecture")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--schedule", help="chosen schedule; the run's by default")
    parser.add_argument("--precisions", type=_precisions, default=QUANTIZE, help="or all")
    parser.add_argument("--widths", type=_numbers(float), help="all by default")
    parser.add_argument("--batches", type=_numbers(int), default=(1, 8), help="for times")
    parser.add_argument("--rounds", type=int, default=20, help="for times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=1024, help="for distances; 0 for none")
    parser.add_argument("--seeds", type=int, default=2, help="for distances")
    options = parser.parse_args()
    if (options.run is None) == (options.preset is None):
        parser.error("give either RUN or --preset")
    return options


def _precisions(text: str) -> tuple[str, ...]:
    """Names, with float32 first: errors are told from it."""
    names = (*QUANTIZE, *CONVERTER) if text == "all" else text.split(",")
    return tuple(dict.fromkeys(("none", *names)))


def _numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def main() -> None:
    """Run the comparison."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    run = options.run or Run(options.out, options.preset)
    options.unet = run.load_unet() if options.run else random_weights(run.new_unet())
    options.widths = options.widths or options.unet.widths
    options.denoise = CompiledDenoiser(options.unet)
    path = options.out / "tflite_precisions.json"
    result = read_json(path, argument="DIR") if path.exists() else {}
    for _ in (
        measure_run(run, result, options) if options.run else measure_preset(run, result, options)
    ):
        write_json(path, result)
    # As a later run reads it: JSON's keys are texts.
    result = read_json(path, argument="DIR")
    print(table(result))
    if options.run:
        with atomic_file(options.out / "tflite_precisions.png") as temporary:
            plot(result).savefig(temporary, dpi=110, format="png")


def measure_run(run: Run, result: dict[str, Any], options: Any) -> Iterator[None]:
    """Everything, at full width and at the chosen schedule; yields after every stage."""
    full, chosen = run.schedule("full"), run.schedule(options.schedule)
    if "error" not in result:
        files = convert_all(run, full, options.widths, options)
        result |= describe(run, files, options)
        times = {batch: latencies(files, batch, options) for batch in options.batches}
        result |= {"latency": times, "error": errors(run, full, files, options)}
        yield
    if options.images:
        distance = frechet_distance_of(run)
        result |= {"distance_name": distance.name, "images": options.images}
        found = result.setdefault("distance", {})
        for name, schedule in {"full": full, "chosen": chosen}.items():
            about = {"schedule": schedule.describe(), "steps": len(schedule), "precisions": {}}
            row = found.setdefault(name, about)
            for _ in distances(run, schedule, distance, row["precisions"], options):
                yield


def measure_preset(run: Run, result: dict[str, Any], options: Any) -> Iterator[None]:
    """Sizes and times; yields after every batch size."""
    times = result.setdefault("latency", {})
    for batch in options.batches:
        if str(batch) not in times:
            files = convert_all(run, None, options.widths, options, batch)
            result |= describe(run, files, options)
            times[str(batch)] = latencies(files, batch, options)
            yield


def convert_all(
    run: Run,
    schedule: StepSchedule | None,
    widths: tuple[float, ...],
    options: Any,
    batch: int | None = None,
    precisions: tuple[str, ...] = (),
) -> Files:
    """Every precision and width; calibrated on a schedule, or on noise if there is none."""
    shape = options.unet.image_shape
    if schedule:
        samples = calibration_samples(
            options.denoise, schedule, run.noise_table, shape, widths, seed=CALIBRATION_SEED
        )
    else:
        noise = np.random.RandomState(0).standard_normal((4, *shape)).astype(np.float32)
        samples = dict.fromkeys(widths, Samples(noise, np.float32([0, 300, 600, 900])))
    files = {}
    for width in tqdm(widths, "convert", disable=None):
        subnet = options.unet.subnet(width)
        for name in precisions or options.precisions:
            make = by_converter if name in CONVERTER else by_library
            files[name, width] = without_stderr(
                lambda make=make, args=(subnet, name, samples[width], batch): make(*args)
            )
    return files


def by_library(subnet: Any, name: str, samples: Samples, batch: int | None) -> bytes:
    """What `ddsm export` writes."""
    return convert(subnet, quantize=name, batch=batch, calibration=samples)


def by_converter(subnet: Any, name: str, samples: Samples, batch: int | None) -> bytes:
    """What TFLiteConverter's own quantiser makes of the network."""
    # Named as in `convert`'s file, which tells what stays float32.
    with numbered_layers(subnet):
        graph = convert_variables_to_constants_v2(
            denoiser_function(subnet, batch).get_concrete_function()
        )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if name == "converter-dynamic":
        return converter.convert()
    # Its calibration resizes a free batch to one image and cannot resize a fixed one.
    size = batch or 1

    def batches() -> Iterator[list[np.ndarray]]:
        for rows in np.resize(np.arange(len(samples.t)), (max(len(samples.t) // size, 1), size)):
            yield [samples.x[rows], samples.t[rows]]

    converter.representative_dataset = batches
    float_nodes = _float_nodes(convert(subnet, batch=batch), mixed=name.endswith("mixed"))
    debug = tf.lite.experimental.QuantizationDebugOptions(denylisted_nodes=float_nodes)
    return tf.lite.experimental.QuantizationDebugger(
        converter=converter, debug_dataset=batches, debug_options=debug
    ).get_nondebug_quantized_model()


def _float_nodes(data: bytes, *, mixed: bool) -> list[str]:
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    graph = model.subgraphs[0]
    names = [graph.tensors[op.outputs[0]].name.decode() for op in graph.operators]
    ends = end_convolutions(model) if mixed else []
    return [name for name in names if re.search(FLOAT_NODES, name) or name in ends]


class Denoiser:
    """`denoise(x, t, key)` over TFLite files."""

    def __init__(self, files: Mapping[Any, bytes], threads: int) -> None:
        self.interpreters = {
            key: Interpreter(model_content=data, num_threads=threads) for key, data in files.items()
        }
        self.batches = dict.fromkeys(files, 0)

    def __call__(self, x: np.ndarray, t: Any, key: Any) -> np.ndarray:
        interpreter = self.interpreters[key]
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        values = {4: np.ascontiguousarray(x, np.float32), 1: np.ascontiguousarray(timesteps)}
        inputs = {len(entry["shape"]): entry["index"] for entry in interpreter.get_input_details()}
        if self.batches[key] != len(x):
            for rank, index in inputs.items():
                interpreter.resize_tensor_input(index, values[rank].shape)
            without_stderr(interpreter.allocate_tensors)
            self.batches[key] = len(x)
        for rank, index in inputs.items():
            interpreter.set_tensor(index, values[rank])
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def describe(run: Run, files: Files, options: Any) -> dict[str, Any]:
    """Sizes, and who runs the operators."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in options.precisions}
    for (name, width), data in files.items():
        found = without_stderr(lambda data=data: delegation(data))
        rows[name][str(width)] = {
            "bytes": len(data),
            "compressed_bytes": len(zlib.compress(data, 9)),
            "partitions": found.partitions,
            "left_over": dict(found.left_over),
        }
    about = {"preset": run.config.preset, "threads": options.threads, "rounds": options.rounds}
    return {**about, "widths": list(options.widths), "files": rows}


def latencies(files: Files, batch: int, options: Any) -> dict[str, dict[str, Any]]:
    """Width → precision → times; the precisions of a width take turns."""
    times = {}
    for width in tqdm(options.widths, f"latency, batch {batch}", disable=None):
        own = {name: files[name, width] for name in options.precisions}
        found = time_widths(
            Denoiser(own, options.threads),
            list(own),
            options.unet.image_shape,
            batch=batch,
            rounds=options.rounds,
            t=TIMESTEP,
        )
        times[str(width)] = {name: summary(each) for name, each in found.items()}
    return times


def errors(
    run: Run, schedule: StepSchedule, files: Files, options: Any
) -> dict[str, dict[str, Any]]:
    """Width → precision → root mean square error at each t, as a share of float32's output.

    On states of trajectories that the calibration has not seen.
    """
    found = {}
    for width in options.widths:
        own = {name: files[name, width] for name in options.precisions}
        denoise = Denoiser(own, options.threads)
        x, t = calibration_samples(
            options.denoise,
            schedule,
            run.noise_table,
            options.unet.image_shape,
            [width],
            count=len(schedule) * TRAJECTORIES,
            seed=ERROR_SEED,
        )[width]
        at = {int(step): x[t == step] for step in np.unique(t)}
        exact = {step: denoise(states, step, "none") for step, states in at.items()}
        found[str(width)] = {
            name: {
                step: _rms(denoise(states, step, name) - exact[step]) / _rms(exact[step])
                for step, states in at.items()
            }
            for name in options.precisions
        }
    return found


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def distances(
    run: Run, schedule: StepSchedule, distance: Any, found: dict[str, Any], options: Any
) -> Iterator[None]:
    """Precision → distance to the real images for each seed, and to float32's images in pixels.

    The files are calibrated on the schedule that they are to run in.
    """
    missing = [name for name in options.precisions if name not in found]
    if not missing:
        return
    files = convert_all(
        run, schedule, tuple(schedule.width_counts()), options, precisions=("none", *missing)
    )
    exact = images_of("none", run, schedule, files, options)
    for name in tqdm(missing, "sample", disable=None):
        images = exact if name == "none" else images_of(name, run, schedule, files, options)
        apart = [_rms(images[seed].astype(float) - exact[seed]) for seed in images]
        values = [distance(images[seed]) for seed in images]
        found[name] = {"distance": values, "pixels": float(np.mean(apart))}
        yield


def images_of(
    name: str, run: Run, schedule: StepSchedule, files: Files, options: Any
) -> dict[int, np.ndarray]:
    """Seed → images that a precision samples."""
    denoise = Denoiser(
        {width: files[name, width] for width in schedule.width_counts()}, options.threads
    )
    shape = options.unet.image_shape
    return {
        seed: sample_images(denoise, schedule, run.noise_table, shape, options.images, seed=seed)
        for seed in range(1, options.seeds + 1)
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a table a width, and one of the final images."""
    lines = []
    for width in map(str, result["widths"]):
        heads = [f"ms, batch {batch}" for batch in result["latency"]]
        heads = [
            "precision",
            "kB",
            "compressed",
            *heads,
            f"error, t ≥ {LATE}",
            f"t < {LATE}",
            "partitions",
        ]
        lines += ["", f"Width {width}", "", *_head(heads)]
        for name, files in result["files"].items():
            cells = [name, *_cells(result, width, name, files[width])]
            lines.append(f"| {' | '.join(cells)} |")
    if "distance" in result:
        lines += ["", *_head(["precision", *result["distance"], "pixels apart"])]
        for name in result["distance"]["full"]["precisions"]:
            rows = [found["precisions"][name] for found in result["distance"].values()]
            cells = [name, *(_mean(row["distance"]) for row in rows)]
            lines.append(f"| {' | '.join(cells)} | {rows[0]['pixels']:.2f} |")
    return "\n".join(lines)


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _cells(result: Mapping[str, Any], width: str, name: str, file: Mapping) -> Iterator[str]:
    yield f"{file['bytes'] / 1000:,.0f}"
    yield f"{file['compressed_bytes'] / 1000:,.0f}"
    for times in result["latency"].values():
        yield f"{times[width][name]['median_ms']:.2f} ± {times[width][name]['spread_ms']:.2f}"
    error = result["error"][width][name] if "error" in result else {}
    for late in (False, True):
        chosen = [value for t, value in error.items() if (int(t) < LATE) == late]
        yield f"{_rms(np.array(chosen)):.4f}" if chosen else ""
    left_over = sum(file["left_over"].values())
    yield f"{file['partitions']}" + (f" + {left_over} operators" if left_over else "")


def _mean(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def plot(result: Mapping[str, Any]) -> Figure:
    """Error over t, a panel a width."""
    widths = list(result["error"])
    figure = Figure(figsize=(3.4 * len(widths) + 1.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axes, width in zip(panels, widths, strict=True):
        for name, error in result["error"][width].items():
            if name != "none":
                style = "--" if name in CONVERTER else "-"
                axes.plot([int(t) for t in error], list(error.values()), style, label=name)
        axes.set(yscale="log", xlabel="t", title=f"width {width}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("error / float32's output")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


if __name__ == "__main__":
    main()
