"""Held-out denoising error of every width, before any training and at a run's last checkpoint.

    ddsm train cifar10 --out run --data npz:cifar10.npz --steps 300 --set base_channels=32
    python benchmarks/held_out_loss.py run --out held_out_loss.json

The raw weights are judged and not the average, which three hundred steps hardly move.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import keras
import numpy as np

from ddsm_tf.files import write_json
from ddsm_tf.images import to_float
from ddsm_tf.search.importance import measure_importance
from ddsm_tf.training.run import Run
from ddsm_tf.training.train import make_optimizer, state_variables


def main() -> None:
    options = _options()
    run = Run.open(options.run)
    config = run.config
    held_out = run.load_split()[1]
    keras.utils.set_random_seed(config.seed % 2**32)
    model = run.new_model()
    images = np.asarray(run.denoised(held_out.images[: options.images]))
    labels = held_out.labels[: options.images] if config.num_classes else None

    def errors() -> dict[str, float]:
        return _errors(run, model, images, labels)

    before = errors()
    model.compile(make_optimizer(config))
    model.optimizer.build(model.trainable_variables)
    steps = run.checkpoints.restore_latest(state_variables(model))
    after = errors()
    result = {"steps": steps, "images": len(images), "before": before, "after": after}
    print(json.dumps(result, indent=2))
    write_json(options.out, result)


def _errors(run: Run, model: Any, images: np.ndarray, labels: Any) -> dict[str, float]:
    """Width → mean squared error of the predicted noise over ten timesteps."""
    table = measure_importance(
        model.denoise,
        run.noise_table,
        images if images.dtype == np.float32 else to_float(images),
        model.unet.widths,
        timesteps=10,
        seed=0,
        labels=labels,
    )
    means = table.error.mean(axis=1).tolist()
    return {f"{width:g}": mean for width, mean in zip(table.widths, means, strict=True)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", default="held_out_loss.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
