"""What each choice of the training gives: every variant against a baseline, at equal cost.

    python benchmarks/ablations.py -o results

Trains each variant on several seeds for as many multiply-accumulates as the baseline, and judges
every width: the held-out error of the predicted noise, and the Fréchet distance of samples that all
steps of a sampler make at that width. Variants of one seed share images, noise and judges. Writes
`DIR/ablations_PRESET[_NAME].json`; an interrupted run goes on with the training it was at.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
from keras import ops
from measuring import Stages, results_file

from ddsm_tf.cost import macs_per_width
from ddsm_tf.images import to_float
from ddsm_tf.latency import limit_tensorflow
from ddsm_tf.metrics import FrechetDistance, train_classifier
from ddsm_tf.models import DiffusionModel, layers
from ddsm_tf.search.importance import measure_importance
from ddsm_tf.training.config import RunConfig
from ddsm_tf.training.pipeline import training_pipeline
from ddsm_tf.training.presets import get_preset
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run
from ddsm_tf.training.train import make_optimizer

LIBRARIES = ("tensorflow", "keras", "numpy")
BASELINE = "baseline"


class SharedNoiseModel(DiffusionModel):
    """Trains all widths of a step on the same timesteps and noise."""

    _redraws = False


class RandomWidthModel(DiffusionModel):
    """Trains one width a step, drawn uniformly."""

    def _width_choices(self) -> list[tuple[float, ...]]:
        return [(width,) for width in self.unet.widths]


def first_channels(weight: Any, axes: layers.Axes, width: float) -> Any:
    """`slice_axes` as the reference has it: the first channels, of concatenated inputs too."""
    shape = list(weight.shape)
    for axis, parts in axes.items():
        shape[axis] = sum(part.active(width) for part in parts)
    return ops.slice(weight, [0] * len(shape), shape)


def constant_groups(norm: layers.SlimmableGroupNorm, width: float) -> np.ndarray:
    """`membership` as the reference has it: as many groups at every width."""
    channels = sum(part.active(width) for part in norm.inputs)
    groups = sum(part.groups for part in norm.inputs)
    of_channel = np.arange(channels) * groups // channels
    return np.equal.outer(of_channel, np.arange(groups)).astype(np.float32)


def reference_skips() -> contextlib.AbstractContextManager:
    """Networks slice the kernels of concatenated inputs as the reference does."""
    return mock.patch.object(layers, "slice_axes", first_channels)


def reference_groups() -> contextlib.AbstractContextManager:
    """Networks normalise over as many groups at every width, as the reference does."""
    return mock.patch.object(layers.SlimmableGroupNorm, "membership", constant_groups)


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a training differs from the baseline.

    Attributes:
        about: in words.
        changes: fields of the configuration.
        model: class of the model.
        patched: holds while it is trained and judged.
        alone: a network of its own for each width, which never shares weights.
        batch_share: images of a step, over the baseline's.
    """

    about: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: type[DiffusionModel] = SharedNoiseModel
    patched: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    alone: bool = False
    batch_share: float = 1.0


VARIANTS = {
    BASELINE: Variant("sandwich of all widths, noise shared, skips aligned, no distillation"),
    "reference_skips": Variant(
        "kernels after a concatenation keep their first channels", patched=reference_skips
    ),
    "reference_groups": Variant("as many groups at every width", patched=reference_groups),
    "alone": Variant("each width a network of its own", alone=True),
    "random_widths": Variant("one width a step, drawn uniformly", model=RandomWidthModel),
    "one_middle": Variant("sandwich of one random middle width", {"middle_widths": 1}),
    "redrawn_noise": Variant("noise and timesteps of its own for each width", model=DiffusionModel),
    "quarter_batch": Variant(
        "noise and timesteps of its own for each width, a quarter of the images a step",
        model=DiffusionModel,
        batch_share=0.25,
    ),
    "v_prediction": Variant("the network puts out v and not the noise", {"prediction": "v"}),
    "distillation_0.5": Variant("half of the target is the widest's output", {"distillation": 0.5}),
    "distillation_1": Variant("the target is the widest's output", {"distillation": 1.0}),
}


def main() -> None:
    """Train and judge the variants that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--name", help="of these variants, if they get a file of their own")
    parser.add_argument("--data", help="image source; the preset's if left out")
    parser.add_argument("--steps", type=int, help="of the baseline; the preset's if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=tuple(VARIANTS))
    parser.add_argument("--images", type=int, default=1024, help="sampled a width")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    limit_tensorflow(options.threads)
    preset = get_preset(options.preset)
    given = {"data": options.data, "steps": options.steps}
    config = dataclasses.replace(preset, **{name: v for name, v in given.items() if v})
    # All widths in every step, whatever the preset says.
    config = dataclasses.replace(config, middle_widths=len(config.widths))
    ablations = Ablations(config, options.images)
    name = f"ablations_{options.preset}"
    stages = Stages(results_file(options.out, name, options.name), LIBRARIES)
    stages.settle("settings", ablations.settings())
    for seed in options.seeds:
        for variant in options.variants:
            stages.measure(
                f"{variant}, seed {seed}",
                lambda v=variant, s=seed: {"about": VARIANTS[v].about, **ablations.run(v, s)},
            )


class Ablations:
    """Trains variants of one configuration and judges them.

    Args:
        config: of the baseline.
        images: sampled for each width's distance.
    """

    def __init__(self, config: RunConfig, images: int) -> None:
        self.config = config
        self.images = images
        run = Run(Path(), config)
        self.training, self.held_out = run.load_split()
        data = run.load_data()
        network = train_classifier(np.asarray(data.images), data.labels, seed=0)
        self.distance = FrechetDistance(network, data.images)
        self.macs = macs_per_width(run.new_unet())

    def settings(self) -> dict[str, Any]:
        """What is the same for all."""
        return {
            "preset": self.config.preset,
            "steps": self.config.steps,
            "batch_size": self.config.batch_size,
            "base_channels": self.config.base_channels,
            "widths": self.config.widths,
            "macs": {str(width): macs for width, macs in self.macs.items()},
            "held_out_images": len(self.held_out.images),
            "sampled_images": self.images,
            "sampling_steps": self.config.sampling_steps,
        }

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train a variant and judge every width."""
        variant = VARIANTS[name]
        batch = round(self.config.batch_size * variant.batch_share)
        config = dataclasses.replace(self.config, seed=seed, batch_size=batch, **variant.changes)
        with variant.patched():
            if not variant.alone:
                model = self.train(self.model_of(variant, config), config, name)
                return self.judge(model, self.config.widths)
            found: dict[str, Any] = {"steps": config.steps, "error": {}, "distance": {}}
            for width in self.config.widths:
                judged = self.alone(config, width)
                for key in ("error", "distance"):
                    found[key][str(width)] = judged[key]["1.0"]
            return found

    def alone(self, config: RunConfig, width: float) -> dict[str, Any]:
        """A network as wide as `width`, trained for as many steps as it has in the sandwich."""
        keras.utils.set_random_seed(config.seed)
        unet = Run(Path(), config).new_unet().subnet(width)
        # Fresh weights: those of the slices were drawn for more channels.
        fresh = type(unet).from_config(unet.get_config())
        model = self.train(Run(Path(), config).new_model(fresh), config, f"alone {width:g}")
        return self.judge(model, (1.0,))

    def model_of(self, variant: Variant, config: RunConfig) -> DiffusionModel:
        """The variant's model with fresh weights."""
        keras.utils.set_random_seed(config.seed)
        run = Run(Path(), config)
        return variant.model(
            run.new_unet(),
            run.noise_table,
            middle_widths=config.middle_widths,
            distillation=config.distillation,
            weighting=config.weighting,
            seed=config.seed,
        )

    def train(self, model: DiffusionModel, config: RunConfig, name: str) -> DiffusionModel:
        """Train for the baseline's cost; the weights are the moving average then."""
        config = dataclasses.replace(config, steps=self.equal_steps(model, config.batch_size))
        model.compile(make_optimizer(config))
        batches = training_pipeline(
            self.training.images,
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=0,
            steps=config.steps,
            flip=config.horizontal_flip,
        )
        with progress_bar(config.steps, f"{name}, seed {config.seed}") as bar:
            update = keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: bar.update()
            )
            model.fit(
                batches,
                steps_per_epoch=config.steps,
                shuffle=False,
                verbose=0,
                callbacks=[update],
            )
        return model

    def equal_steps(self, model: DiffusionModel, batch_size: int) -> int:
        """Steps that cost what the baseline's do; a network alone has as many as they are."""
        if len(model.unet.widths) == 1:
            return self.config.steps
        sandwiches = model._width_choices()
        cost = sum(self.macs[width] for widths in sandwiches for width in widths)
        cost *= batch_size / self.config.batch_size
        return round(self.config.steps * sum(self.macs.values()) * len(sandwiches) / cost)

    def judge(self, model: DiffusionModel, widths: tuple[float, ...]) -> dict[str, Any]:
        """Held-out error and distance of every width."""
        table = measure_importance(
            model.denoise,
            model.noise_table,
            to_float(self.held_out.images),
            widths,
            timesteps=20,
        )
        run = Run(Path(), self.config)
        distance = {}
        for width in widths:
            schedule = run.schedule("full").at_width(width)
            images = model.sample(schedule, self.images, seed=0, batch_size=256)
            distance[str(width)] = self.distance(images)
        errors = table.error.mean(axis=1)
        return {
            "steps": int(ops.convert_to_numpy(model.optimizer.iterations)),
            "error": {str(w): float(e) for w, e in zip(table.widths, errors, strict=True)},
            "distance": distance,
        }


if __name__ == "__main__":
    main()
