"""How fast a denoising step is on every runtime, and what share of the machine's best that is.

    python benchmarks/inference_speed.py -o results

The paper's CIFAR-10 network (base 128, 32×32) with random weights, every width, several batch
sizes: our Keras graph, SavedModel, LiteRT in float32 and dynamic int8, and the same network in
PyTorch, eager and compiled, all from the same weights and NumPy in, NumPy out. Within a batch size
all of them take turns, together with the convolution that bounds them. Writes
`DIR/inference_speed.json`, or `DIR/inference_speed_NAME.json`; an interrupted run goes on where it
stopped. The machine should do nothing else. Needs `pip install torch`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

import ceilings
import numpy as np
from measuring import Stages, results_file, spread, take_turns
from names import KERAS
from networks import random_weights
from runtimes import OURS, PEERS, Denoise, Runtimes, add_options

from ddsm_tf.cost import macs_per_width
from ddsm_tf.latency import limit_tensorflow
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import network_of

LIBRARIES = ("tensorflow", "keras", "ai-edge-litert", "torch", "numpy")
TIMESTEP = 500


def main() -> None:
    """Run the measurements that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 16))
    parser.add_argument("--rounds", type=int, nargs="+", default=(20, 10, 8), help="of each batch")
    parser.add_argument("--runtimes", nargs="+", choices=OURS + PEERS, default=OURS + PEERS)
    add_options(parser)
    options = parser.parse_args()
    limit_tensorflow(options.threads)
    stages = Stages(results_file(options.out, "inference_speed", options.name), LIBRARIES)
    unet = random_weights(network_of(get_preset(options.preset)))
    measure_all(stages, Runtimes(unet, options.work / options.preset, options.threads), options)


def measure_all(stages: Stages, runtimes: Runtimes, options: argparse.Namespace) -> None:
    """Network, ceiling of matrix products, and the steps of every batch size."""
    unet = runtimes.unet
    stages.settle(
        "network",
        {
            "preset": options.preset,
            "image_shape": unet.image_shape,
            "threads": options.threads,
            "macs": {str(width): macs for width, macs in macs_per_width(unet).items()},
        },
    )
    stages.measure("matmul", lambda: matmul_ceiling(options.threads))
    for batch, rounds in zip(options.batches, options.rounds, strict=True):
        stages.measure(
            f"batch_{batch}", lambda b=batch, r=rounds: steps(runtimes, options.runtimes, b, r)
        )


def matmul_ceiling(threads: int) -> dict[str, Any]:
    """GMAC/s of a large matrix product, by library."""
    times = take_turns(ceilings.matmuls(threads), 15, name="matmul")
    return {name: spread(ceilings.MATMUL_MACS / found / 1e9) for name, found in times.items()}


def steps(runtimes: Runtimes, names: list[str], batch: int, rounds: int) -> dict[str, Any]:
    """Times of single steps, all runtimes and widths and the convolution taking turns.

    Returns:
        `rounds` (what was timed, in seconds), from which all else follows, and how far each
        runtime's output lies from the Keras graph's.
    """
    unet = runtimes.unet
    denoisers = runtimes.make(names, batch)
    x = np.random.default_rng(0).standard_normal((batch, *unet.image_shape)).astype(np.float32)
    turns = {
        (name, width): functools.partial(denoise, x, TIMESTEP, width)
        for name, denoise in denoisers.items()
        for width in unet.widths
    }
    convolutions = ceilings.convolutions(batch, runtimes.threads)
    turns |= {("convolution", name): run for name, run in convolutions.items()}
    times = take_turns(turns, rounds, name=f"batch {batch}")
    return {
        "error": errors(denoisers, x, unet.widths),
        "rounds": {f"{name}, {which}": list(found) for (name, which), found in times.items()},
    }


def errors(denoisers: Mapping[str, Denoise], x: np.ndarray, widths: tuple) -> dict[str, Any]:
    """Root mean square difference from the Keras graph over its root mean square, by runtime."""
    reference = denoisers.get(KERAS) or next(iter(denoisers.values()))
    found = {}
    for name, denoise in denoisers.items():
        apart = [
            np.sqrt(np.mean((denoise(x, TIMESTEP, w) - truth) ** 2) / np.mean(truth**2))
            for w in widths
            for truth in [reference(x, TIMESTEP, w)]
        ]
        found[name] = float(max(apart))
    return found


if __name__ == "__main__":
    main()
