"""Judge a run's images by a ResNet-56 for CIFAR-10 instead of by a small classifier of its own.

    python benchmarks/resnet56.py resnet56.npz run --test cifar10.npz:x_test,y_test

The weights are those of a published PyTorch classifier (Y. Idelbayev's pytorch_resnet_cifar10,
`resnet56`), its state dict saved with `numpy.savez`. They are written to `RUN/classifier.keras`,
where search, evaluation and reports look for the run's classifier; its 64 pooled features give
their Fréchet distance. It is not FID, which is defined on Inception's features.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from ddsm_tf.errors import invalid
from ddsm_tf.metrics import FeatureNetwork
from ddsm_tf.training.run import Run

SIDE, CLASSES = 32, 10
STAGES, BLOCKS = (16, 32, 64), 9
# Of CIFAR-10's pixels in [0, 1], as the published weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-5


def main() -> None:
    """Convert, check the accuracy and write the classifier into the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="npz of the PyTorch state dict")
    parser.add_argument("run", help="run folder of 32×32 colour images")
    parser.add_argument("--test", metavar="FILE:IMAGES,LABELS", help="print the accuracy on these")
    options = parser.parse_args()
    run = Run.open(options.run)
    network = FeatureNetwork(resnet56(state_dict(options.weights)))
    if network.image_shape != (run.config.image_size, run.config.image_size, run.config.channels):
        raise SystemExit(f"{options.run}: must be of {network.image_shape} images")
    if options.test:
        print(f"accuracy {accuracy(network, options.test):.4f}")
    network.save(run.path / "classifier.keras")


def state_dict(path: Path) -> dict[str, np.ndarray]:
    """Name → tensor; names lose the prefix that training on several devices gives them."""
    with np.load(path, allow_pickle=False) as archive:
        return {name.removeprefix("module."): archive[name] for name in archive.files}


def accuracy(network: FeatureNetwork, source: str) -> float:
    """Share of test images that the classifier gets right."""
    file, _, keys = source.rpartition(":")
    images, labels = keys.split(",")
    with np.load(file, allow_pickle=False) as archive:
        logits = network.features_and_logits(archive[images])[1]
        return float(np.mean(logits.argmax(axis=1) == archive[labels].ravel()))


def resnet56(tensors: Mapping[str, np.ndarray]) -> keras.Model:
    """The classifier, images in [-1, 1] → logits; its layer `features` gives the pooled ones.

    Raises:
        InputError: the tensors are not those of a ResNet-56.
    """
    image = keras.Input((SIDE, SIDE, 3))
    scale = 0.5 / np.array(STD)
    x = layers.Rescaling(scale.tolist(), ((0.5 - np.array(MEAN)) / STD).tolist())(image)
    x = layers.ReLU()(_normalized(x, "conv1", "bn1", STAGES[0]))
    for stage, channels in enumerate(STAGES):
        for block in range(BLOCKS):
            x = _block(x, f"layer{stage + 1}.{block}", channels)
    features = layers.GlobalAveragePooling2D(name="features")(x)
    logits = layers.Dense(CLASSES, name="linear")(features)
    model = keras.Model(image, logits, name="resnet56")
    _assign(model, tensors)
    return model


def _normalized(x: Any, conv: str, norm: str, channels: int, strides: int = 1) -> Any:
    # PyTorch pads both sides; Keras's "same" would shift the pixels that stride 2 takes.
    x = layers.ZeroPadding2D(1)(x)
    x = layers.Conv2D(channels, 3, strides, use_bias=False, name=_name(conv))(x)
    return layers.BatchNormalization(epsilon=EPSILON, name=_name(norm))(x)


def _block(x: Any, name: str, channels: int) -> Any:
    """A basic block; where it strides, the shortcut takes every second pixel, zero-padded."""
    inside = x.shape[-1]
    strides = 1 if inside == channels else 2
    y = _normalized(x, f"{name}.conv1", f"{name}.bn1", channels, strides)
    y = _normalized(layers.ReLU()(y), f"{name}.conv2", f"{name}.bn2", channels)
    if strides == 2:
        x = layers.MaxPooling2D(1, 2)(x)
        # Channels as a spatial axis: Keras pads no others.
        side = x.shape[1]
        x = layers.Reshape((side * side, inside, 1))(x)
        x = layers.ZeroPadding2D(((0, 0), ((channels - inside) // 2,) * 2))(x)
        x = layers.Reshape((side, side, channels))(x)
    return layers.ReLU()(layers.Add()([x, y]))


def _name(tensor: str) -> str:
    # Dots would nest the file's folders.
    return tensor.replace(".", "_")


def _assign(model: keras.Model, tensors: Mapping[str, np.ndarray]) -> None:
    parts = {
        layers.Conv2D: ("weight",),
        layers.BatchNormalization: ("weight", "bias", "running_mean", "running_var"),
        layers.Dense: ("weight", "bias"),
    }
    given = {_name(name): value for name, value in tensors.items()}
    for layer in model.layers:
        names = [f"{layer.name}_{part}" for part in parts.get(type(layer), ())]
        for name, variable in zip(names, layer.weights, strict=True):
            if name not in given:
                raise invalid("weights", name, "is missing; they must be those of a ResNet-56")
            # OIHW → HWIO, (out, in) → (in, out).
            value = given[name]
            value = np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim > 1 else value
            if value.shape != tuple(variable.shape):
                raise invalid("weights", value.shape, f"{name} must have {tuple(variable.shape)}")
            variable.assign(value)


if __name__ == "__main__":
    main()
