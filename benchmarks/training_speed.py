"""What a sandwich step costs beside a step of the full width, and beside what MACs predict.

    python benchmarks/training_speed.py -o results

A step is what `fit` runs: forward, backward, clipping, Adam and the moving average. The steps of
every choice of middle widths and of full width alone take turns on the same batch. The parameters'
own work (clipping, Adam, average) is the same in all and is timed by itself. Writes
`DIR/training_speed_PRESET.json`, or `…_PRESET_NAME.json`; an interrupted run goes on. The machine
should do nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from measuring import Stages, results_file, take_turns
from names import UPDATE

from ddsm_tf.cost import macs_per_width
from ddsm_tf.latency import limit_tensorflow
from ddsm_tf.models import DiffusionModel
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.run import Run
from ddsm_tf.training.train import make_optimizer

LIBRARIES = ("tensorflow", "keras", "numpy")


class OneChoice(DiffusionModel):
    """Trains the same widths in every step."""

    choice: tuple[float, ...]

    def _width_choices(self) -> list[tuple[float, ...]]:
        return [self.choice]


def main() -> None:
    """Run the measurements that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", default="fashion_mnist")
    parser.add_argument("--base-channels", type=int, help="the preset's if left out")
    parser.add_argument("--batch", type=int, help="the preset's if left out")
    parser.add_argument("--middle-widths", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", help="of the machine, if it gets a file of its own")
    options = parser.parse_args()
    limit_tensorflow(options.threads)
    given = {"base_channels": options.base_channels, "batch_size": options.batch}
    config = dataclasses.replace(
        get_preset(options.preset), **{name: value for name, value in given.items() if value}
    )
    name = f"training_speed_{options.preset}"
    stages = Stages(results_file(options.out, name, options.name), LIBRARIES)
    stages.measure("steps", lambda: steps(config, options))


def steps(config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every kind of step in every round, and the MACs of its forward passes."""
    run = Run(Path(), config)
    macs = macs_per_width(run.new_unet())
    shape = (config.batch_size, config.image_size, config.image_size, config.channels)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    choices = {(config.widths[0],)}
    for middle_widths in options.middle_widths:
        model = run.new_model()
        model.middle_widths = middle_widths
        choices |= set(model._width_choices())
    turns: dict[Any, Callable[[], Any]] = {
        choice: _step(run, choice, images) for choice in sorted(choices, key=len)
    }
    turns[UPDATE] = _update(run)
    times = take_turns(turns, options.rounds, name="training steps")
    return {
        "preset": config.preset,
        "base_channels": config.base_channels,
        "batch": config.batch_size,
        "threads": options.threads,
        "macs": {str(width): value for width, value in macs.items()},
        "rounds": {_name(choice): list(found) for choice, found in times.items()},
    }


def _step(run: Run, choice: tuple[float, ...], images: np.ndarray) -> Callable[[], Any]:
    model = OneChoice(run.new_unet(), run.noise_table)
    model.choice = choice
    model.compile(make_optimizer(run.config))
    batches = _endless(images)
    model.make_train_function()
    return lambda: float(model.train_function(batches)["loss"])


def _endless(images: np.ndarray) -> Any:
    import tensorflow as tf

    return iter(tf.data.Dataset.from_tensors((images,)).repeat())


def _update(run: Run) -> Callable[[], Any]:
    """Clipping, Adam and the moving average."""
    import tensorflow as tf

    unet, optimizer = run.new_unet(), make_optimizer(run.config)
    optimizer.build(unet.trainable_variables)
    gradients = [tf.zeros(variable.shape) for variable in unet.trainable_variables]
    apply = tf.function(
        lambda: optimizer.apply(gradients, unet.trainable_variables), autograph=False
    )

    def update() -> int:
        apply()
        return int(keras.ops.convert_to_numpy(optimizer.iterations))

    return update


def _name(choice: Any) -> str:
    return choice if isinstance(choice, str) else ", ".join(f"{width:g}" for width in choice)


if __name__ == "__main__":
    main()
