"""What model optimization does to file size, denoising error and images.

    python benchmarks/model_optimization.py RUN -o DIR

For each width and method: size of the file, size after zlib at level 9 (what a download costs), the
denoising error on held-out images relative to the float network's, before and after fine-tuning,
and the Fréchet distance of final images when every step has that width. All of it is measured on
the TFLite file in LiteRT. The row "float, tuned" is the control: the float network trained for as
many steps. Writes `DIR/model_optimization.json` and prints a table.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from tqdm import tqdm

from ddsm_tf.export.fine_tuning import NoisedImages, fine_tune
from ddsm_tf.export.optimize import METHODS, Optimization, optimize, to_tflite
from ddsm_tf.export.twin import twin_of, weights_back
from ddsm_tf.files import write_json
from ddsm_tf.images import to_float
from ddsm_tf.models import SlimmableUNet
from ddsm_tf.sampling import clip_to_range, sample_images
from ddsm_tf.schedule import StepSchedule, even_timesteps
from ddsm_tf.training.evaluate import frechet_distance_of
from ddsm_tf.training.run import Run

CONTROL = "float, tuned"
# Shares of the training timesteps.
TIMESTEPS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
IMAGES = 256


class LiteRTDenoiser:
    """`denoise(x, t, width)` over one TFLite file."""

    def __init__(self, data: bytes) -> None:
        self.interpreter = Interpreter(model_content=data, num_threads=2)
        inputs = {len(entry["shape"]): entry["index"] for entry in self._inputs()}
        self.x, self.t = inputs[4], inputs[1]
        self.shape: tuple[int, ...] = ()

    def _inputs(self) -> list[dict[str, Any]]:
        return self.interpreter.get_input_details()

    def __call__(self, x: np.ndarray, t: Any, width: float | None = None) -> np.ndarray:
        if x.shape != self.shape:
            self.interpreter.resize_tensor_input(self.x, x.shape)
            self.interpreter.resize_tensor_input(self.t, x.shape[:1])
            self.interpreter.allocate_tensors()
            self.shape = x.shape
        self.interpreter.set_tensor(self.x, x.astype(np.float32))
        self.interpreter.set_tensor(self.t, np.broadcast_to(np.float32(t), x.shape[:1]))
        self.interpreter.invoke()
        return self.interpreter.get_tensor(self.interpreter.get_output_details()[0]["index"])


class Measurement:
    """Measures TFLite files of a run.

    Args:
        run: a trained run.
        samples: images for the distance.
        seed: of noise, one that fine-tuning does not use.
    """

    def __init__(self, run: Run, samples: int, seed: int) -> None:
        training, held_out = run.load_split()
        images = held_out if len(held_out.images) >= 2 else training
        self.images = to_float(images.images[:IMAGES])
        self.noise_table = run.noise_table
        self.distance_of = frechet_distance_of(run)
        self.samples, self.seed = samples, seed
        self.steps = even_timesteps(run.config.train_timesteps, run.config.sampling_steps)
        self.train_timesteps = run.config.train_timesteps

    def errors(self, data: bytes) -> list[float]:
        """The mean squared error of the noise at each of `TIMESTEPS`."""
        denoise = LiteRTDenoiser(data)
        signal, spread = self.noise_table.signal_and_noise_scale()
        random = np.random.default_rng([self.seed, 1])
        errors = []
        for share in TIMESTEPS:
            t = int(share * self.train_timesteps)
            noise = random.standard_normal(self.images.shape, dtype=np.float32)
            x_t = np.float32(signal[t]) * self.images + np.float32(spread[t]) * noise
            errors.append(float(np.mean((denoise(x_t, t) - noise) ** 2)))
        return errors

    def distance(self, data: bytes, width: float) -> float:
        """The Fréchet distance of images whose every step has this width."""
        schedule = StepSchedule.uniform(width, self.steps, train_timesteps=self.train_timesteps)
        return self.distance_of(
            sample_images(
                LiteRTDenoiser(data),
                schedule,
                self.noise_table,
                self.images.shape[1:],
                self.samples,
                seed=self.seed,
                batch_size=64,
                clip=clip_to_range,
            )
        )


def networks(
    unet: SlimmableUNet, width: float, run: Run, images: np.ndarray, steps: int
) -> Iterator[tuple[str, Any, Any]]:
    """Each method's network, not fine-tuned and fine-tuned: name, before, after."""
    table, seed = run.noise_table, run.config.seed
    yield "float", unet.subnet(width), unet.subnet(width)
    tuned = unet.subnet(width)
    twin = twin_of(tuned)
    control = Optimization("prune", steps=steps)
    batches = NoisedImages(images, table, control.batch_size, steps, seed)
    fine_tune(twin.model, batches, control.learning_rate)
    weights_back(twin)
    yield CONTROL, unet.subnet(width), tuned
    for method in METHODS:
        before = Optimization(method, steps=1, learning_rate=0.0, seed=seed)
        after = Optimization(method, steps=steps, seed=seed)
        yield method, *(optimize(unet.subnet(width), o, images, table) for o in (before, after))


def kernel_statistics(network: Any) -> dict[str, float]:
    """Of the kernels of a float network: share of zeros, and the values of a typical kernel."""
    kernels = [
        layer.kernel.numpy() for layer in network._flatten_layers() if hasattr(layer, "kernel")
    ]
    return {
        "zeros": float(sum((kernel == 0).sum() for kernel in kernels))
        / sum(kernel.size for kernel in kernels),
        "values": float(np.median([len(np.unique(kernel)) for kernel in kernels])),
    }


def row(
    measure: Measurement, method: str, quantize: str, width: float, before: Any, after: Any
) -> dict[str, Any]:
    """One row of the table."""
    data = to_tflite(after, quantize=quantize)
    plain = isinstance(after, SlimmableUNet) and quantize == "none"
    return {
        "width": width,
        "method": method,
        "quantize": "int8" if method == "qat" else quantize,
        "bytes": len(data),
        "compressed": len(zlib.compress(data, 9)),
        **(kernel_statistics(after) if plain else {}),
        "errors_before": measure.errors(to_tflite(before, quantize=quantize)),
        "errors": measure.errors(data),
        "distance": measure.distance(data, width),
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; errors are means over t of the ratio to the float network's."""
    lines = [
        "| width | method | weights | kB | compressed kB | share | zeros | values | error before "
        "| after | distance |",
        "|" + "---|" * 11,
    ]
    for entry in rows:
        base = next(r for r in rows if r["width"] == entry["width"])

        def ratio(key: str, entry: Any = entry, base: Any = base) -> str:
            return f"{np.mean(np.divide(entry[key], base['errors'])):.3f}"

        statistics = "- | -"
        if "zeros" in entry:
            statistics = f"{entry['zeros']:.0%} | {entry['values']:.0f}"
        lines.append(
            f"| {entry['width']:g} | {entry['method']} | {entry['quantize']} "
            f"| {entry['bytes'] / 1e3:.0f} | {entry['compressed'] / 1e3:.0f} "
            f"| {entry['compressed'] / base['compressed']:.0%} | {statistics} "
            f"| {ratio('errors_before')} | {ratio('errors')} | {entry['distance']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="fine-tuning steps")
    parser.add_argument("--samples", type=int, default=1024, help="images for the distance")
    parser.add_argument("--widths", type=float, nargs="+", help="widest and narrowest if left out")
    options = parser.parse_args()
    run = Run.open(options.run)
    config = run.config
    if config.num_classes or config.autoencoder or config.prediction != "epsilon":
        parser.error("RUN must predict ε of images without classes, which is what is measured")
    unet = run.load_unet()
    images, _ = run.load_split()
    measure = Measurement(run, options.samples, seed=run.config.seed + 1)
    rows = []
    for width in options.widths or (unet.widths[0], unet.widths[-1]):
        found = networks(unet, width, run, images.images, options.steps)
        for method, before, after in tqdm(found, total=5, desc=f"width {width:g}", disable=None):
            precisions = ["none"] if method in (CONTROL, "qat") else ["none", "dynamic"]
            for quantize in precisions:
                rows.append(row(measure, method, quantize, width, before, after))
            settings = {"steps": options.steps, "samples": options.samples}
            content = {"run": run.path.name, **settings, "timesteps": TIMESTEPS, "rows": rows}
            write_json(options.out / "model_optimization.json", content)
    print(table_of(rows))


if __name__ == "__main__":
    main()
