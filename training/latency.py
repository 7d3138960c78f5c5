"""The latency program: how long a step of a run's network takes at each width, here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ddsm_tf.console import without_stderr
from ddsm_tf.cost import macs_per_width
from ddsm_tf.edge import Bundle, EdgeSampler
from ddsm_tf.edge.benchmark import benchmark as benchmark_litert
from ddsm_tf.errors import invalid
from ddsm_tf.export import export
from ddsm_tf.export.requirements import check_requirements
from ddsm_tf.files import write_json
from ddsm_tf.labels import no_class
from ddsm_tf.latency import WARM_UP, Denoise, latency_content, limit_tensorflow, time_widths
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run

RUNTIMES = ("litert", "savedmodel", "keras")


def latency_of_run(
    run: Run,
    out: str | os.PathLike,
    *,
    runtime: str = "litert",
    batch: int = 1,
    threads: int = 0,
    rounds: int = 30,
    quantize: str = "none",
    xla: bool = False,
    overwrite: bool = False,
) -> str:
    """Measure a step at every width and write a latency file, which `--cost latency:FILE` reads.

    Args:
        run: a trained run.
        out: the file.
        runtime: "litert" and "savedmodel" run an export made for the occasion, "keras" runs the
            network itself; each is called as its sampler calls it.
        batch: images a step.
        threads: CPU threads of the runtime; 0 is its own choice: one for LiteRT, every CPU for
            TensorFlow, which takes another number only before it starts.
        rounds: timed steps a width.
        quantize: of litert; see `ddsm_tf.export.tflite.convert`.
        xla: of savedmodel and keras: compiled by XLA.
        overwrite: replace a file that is there.

    Returns:
        A table of times and MACs, and where the file is.

    Raises:
        InputError: an argument breaks its rule, `out` exists, Keras runs on another backend than
            TensorFlow, or the run has no weights.
        MissingExtraError: LiteRT is not installed.
    """
    _check(out, runtime, quantize, xla, overwrite)
    if threads and runtime != "litert":
        limit_tensorflow(threads)
    model = run.load_model(xla=xla)
    with tempfile.TemporaryDirectory(prefix="ddsm-latency-") as folder:
        prepare = {
            "litert": partial(_prepare_litert, threads=threads, quantize=quantize),
            "savedmodel": partial(_prepare_savedmodel, xla=xla),
            "keras": partial(_prepare_keras, xla=xla),
        }[runtime]
        measure = prepare(run, model, Path(folder) / "export")
        with progress_bar(WARM_UP + rounds, "latency") as bar:
            content = measure(batch=batch, rounds=rounds, on_round=bar.update)
    write_json(out, content, overwrite=overwrite)
    return f"{describe(content, macs_per_width(model.unet))}\n{out}"


def _check(out: str | os.PathLike, runtime: str, quantize: str, xla: bool, overwrite: bool) -> None:
    """Raise `InputError` for what would else be found out after minutes of measuring."""
    if runtime not in RUNTIMES:
        raise invalid("runtime", runtime, f"must be one of {', '.join(RUNTIMES)}")
    if quantize != "none" and runtime != "litert":
        raise invalid("quantize", quantize, f"is for litert; {runtime} is not quantised")
    if xla and runtime == "litert":
        raise invalid("xla", xla, "is for savedmodel and keras; LiteRT has no XLA")
    check_requirements("bundle" if runtime == "litert" else "savedmodel")
    if Path(out).is_dir():
        raise invalid("out", str(out), "is a folder; name a file")
    if Path(out).exists() and not overwrite:
        rule = "exists already; choose another name or pass --overwrite"
        raise invalid("out", str(out), rule)


def describe(content: Mapping[str, Any], macs: Mapping[float, int]) -> str:
    """A latency file as a table: each width's time beside its share of full width's time and MACs.

    Args:
        content: of the file.
        macs: width → MACs of a step.
    """
    settings = ", ".join(f"{key} {content[key]}" for key in ("batch", "threads", "rounds"))
    compiled = " compiled by XLA" if content.get("xla") else ""
    lines = [
        f"{content['runtime']}{compiled}, {settings}",
        f"{'width':>6}{'ms (median ± IQR)':>22}{'share of time':>16}{'share of MACs':>16}",
    ]
    times = {float(width): row for width, row in content["widths"].items()}
    widest = max(times)
    for width, row in times.items():
        spread = f"{row['median_ms']:.3f} ± {row['spread_ms']:.3f}"
        time_share = row["median_ms"] / times[widest]["median_ms"]
        macs_share = macs[width] / macs[widest]
        lines.append(f"{width:>6g}{spread:>22}{time_share:>16.1%}{macs_share:>16.1%}")
    return "\n".join(lines)


def _prepare_litert(
    run: Run, model: Any, folder: Path, *, threads: int, quantize: str
) -> Callable[..., dict[str, Any]]:
    schedule = run.schedule("full")
    export("bundle", model.unet, run.noise_table, schedule, folder, quantize=quantize)
    sampler = EdgeSampler(Bundle.load(folder), threads or None)
    # LiteRT announces its delegate on stderr at the first step.
    blank = np.zeros((1, *model.unet.image_shape), np.float32)
    classes = model.unet.num_classes
    labels = no_class(classes, 1) if classes else None
    without_stderr(lambda: sampler.denoise(blank, 0, model.unet.widths[0], labels))
    return partial(benchmark_litert, sampler)


def _prepare_savedmodel(
    run: Run, model: Any, folder: Path, *, xla: bool
) -> Callable[..., dict[str, Any]]:
    from ddsm_tf.export.savedmodel import SavedModelDenoiser, write_savedmodels

    write_savedmodels(model.unet, folder, xla=xla)
    versions = {"tensorflow": tf.__version__}
    return partial(_benchmark, model, SavedModelDenoiser(folder), "savedmodel", versions, xla)


def _prepare_keras(
    run: Run, model: Any, folder: Path, *, xla: bool
) -> Callable[..., dict[str, Any]]:
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    return partial(_benchmark, model, model.denoise, "keras", versions, xla)


def _benchmark(
    model: Any,
    denoise: Denoise,
    runtime: str,
    versions: Mapping[str, str],
    xla: bool,
    *,
    batch: int,
    rounds: int,
    on_round: Callable[[], Any],
) -> dict[str, Any]:
    """What `benchmark_litert` does, on TensorFlow."""
    times = time_widths(
        denoise,
        model.unet.widths,
        model.unet.image_shape,
        batch=batch,
        rounds=rounds,
        t=model.noise_table.train_timesteps // 2,
        num_classes=model.unet.num_classes,
        on_round=on_round,
    )
    return latency_content(
        times,
        runtime=runtime,
        versions=versions,
        batch=batch,
        threads=tensorflow_threads(),
        rounds=rounds,
        xla=xla,
        accelerators=_accelerators(),
    )


def tensorflow_threads() -> int:
    """CPU threads that TensorFlow splits an operation over."""
    chosen = tf.config.threading.get_intra_op_parallelism_threads()
    # Zero is its own choice: what the environment says, else every CPU that it may use.
    return chosen or _whole_number(os.environ.get("TF_NUM_INTRAOP_THREADS")) or _usable_cpus()


def _whole_number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0


def _usable_cpus() -> int:
    # Not every system can bind a process to some of its CPUs.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerators() -> list[str]:
    devices = tf.config.get_visible_devices("GPU")
    details = map(tf.config.experimental.get_device_details, devices)
    return [str(detail.get("device_name", "GPU")) for detail in details]
