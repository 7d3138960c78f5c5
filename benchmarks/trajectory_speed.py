"""What a step schedule saves in the time of whole trajectories, on every runtime.

    python benchmarks/trajectory_speed.py -o results

The paper's CIFAR-10 network (base 128, 32×32) with random weights, sampled with the paper's
CIFAR-10 schedule and at full width. Both are shortened: each width keeps its share of the steps.
All trajectories of a batch size take turns, so every ratio is of neighbours in time. Writes
`DIR/trajectory_speed.json`, or `DIR/trajectory_speed_NAME.json`; an interrupted run goes on where
it stopped. The machine should do nothing else. Needs `pip install torch`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from measuring import Stages, results_file, take_turns
from names import (
    FULL,
    KERAS,
    LITERT,
    LITERT_INT8,
    SAMPLER,
    SAMPLER_XLA,
    STEP_AWARE,
    TORCH,
)
from networks import paper_schedule, random_weights
from runtimes import Runtimes, add_options

from ddsm_tf.cost import cost_fraction, macs_per_width
from ddsm_tf.edge.benchmark import shortened
from ddsm_tf.latency import limit_tensorflow
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import network_of

LIBRARIES = ("tensorflow", "keras", "ai-edge-litert", "torch", "numpy")
DENOISERS = (KERAS, LITERT, LITERT_INT8, TORCH)


def main() -> None:
    """Run the measurements that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--rounds", type=int, nargs="+", default=(9, 5), help="of each batch")
    parser.add_argument("--steps", type=int, default=18, help="of a shortened trajectory")
    add_options(parser)
    options = parser.parse_args()
    limit_tensorflow(options.threads)
    stages = Stages(results_file(options.out, "trajectory_speed", options.name), LIBRARIES)
    unet = random_weights(network_of(get_preset(options.preset)))
    runtimes = Runtimes(unet, options.work / options.preset, options.threads)
    trajectories = Trajectories(runtimes, options.steps)
    stages.settle("network", trajectories.about(options.preset))
    for batch, rounds in zip(options.batches, options.rounds, strict=True):
        stages.measure(f"batch_{batch}", lambda b=batch, r=rounds: trajectories.time(b, r))


class Trajectories:
    """Step-aware and full-width sampling on every runtime.

    Args:
        runtimes: of the network.
        steps: of a shortened trajectory, about.
    """

    def __init__(self, runtimes: Runtimes, steps: int) -> None:
        self.runtimes = runtimes
        self.paper = paper_schedule()
        short = shortened(self.paper, steps)
        self.schedules = {STEP_AWARE: short, FULL: short.at_width(1.0)}

    def about(self, preset: str) -> dict[str, Any]:
        """The network, the schedule and what it saves in MACs."""
        unet, short = self.runtimes.unet, self.schedules[STEP_AWARE]
        macs = macs_per_width(unet)
        return {
            "preset": preset,
            "image_shape": unet.image_shape,
            "threads": self.runtimes.threads,
            "steps": {str(width): count for width, count in short.width_counts().items()},
            "macs_saved": 1.0 - cost_fraction(short, macs),
            "paper_macs_saved": 1.0 - cost_fraction(self.paper, macs),
        }

    def time(self, batch: int, rounds: int) -> dict[str, Any]:
        """Seconds of every trajectory in every round."""
        turns = {
            (name, kind): functools.partial(sample, schedule)
            for name, sample in self.samplers(batch).items()
            for kind, schedule in self.schedules.items()
        }
        # A trajectory is long: what its first step finds in the caches does not matter.
        times = take_turns(turns, rounds, name=f"trajectories, batch {batch}", repeat=1)
        return {"rounds": {f"{name}, {kind}": list(times[name, kind]) for name, kind in times}}

    def samplers(self, batch: int) -> dict[str, Callable[[StepSchedule], np.ndarray]]:
        """Runtime → what samples a batch of images with a schedule."""
        found = {
            name: functools.partial(self._sample, denoise, batch)
            for name, denoise in self.runtimes.make(DENOISERS, batch).items()
        }
        return found | {
            SAMPLER: self.runtimes.savedmodel_sampler(batch),
            SAMPLER_XLA: self.runtimes.savedmodel_sampler(batch, xla=True),
        }

    def _sample(self, denoise: Any, batch: int, schedule: StepSchedule) -> np.ndarray:
        table, shape = self.runtimes.noise_table, self.runtimes.unet.image_shape
        return sample_images(denoise, schedule, table, shape, batch, batch_size=batch)


if __name__ == "__main__":
    main()
