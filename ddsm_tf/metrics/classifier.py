"""A small classifier of a data set, whose features judge images of that data set.

Networks trained on photographs know little of 8×8 digits, and need a download. A classifier of
the data set itself is trained in seconds. Its features are taken before the activation: after a
ReLU many are always zero, and their covariance is singular.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_file
from ddsm_tf.images import to_float

FEATURES = 64
BATCH_SIZE = 128
STEPS = 600
LEARNING_RATE = 2e-3
HELD_OUT = 0.1
ROTATED_IMAGES = 10_000
# Images that are floats at the same time.
AT_A_TIME = 4096
_FEATURE_LAYER = "features"


class FeatureNetwork:
    """A classifier whose last hidden layer, before its activation, gives features.

    Attributes:
        classifier: the Keras model, images → logits.
        accuracy: share of held-out images classified rightly when it was trained, or None.
    """

    def __init__(self, classifier: keras.Model, accuracy: float | None = None) -> None:
        self.classifier = classifier
        self.accuracy = accuracy
        self._features = keras.Model(
            classifier.inputs, classifier.get_layer(_FEATURE_LAYER).output, name="feature_network"
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(self.classifier.input_shape[1:])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features of uint8 (N, H, W, C) images, float32 (N, 64).

        Raises:
            InputError: the images have another shape or dtype.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            given = f"{images.dtype} {images.shape}"
            raise invalid("images", given, f"must be uint8 (N, *{self.image_shape})")
        return _predict(self._features, images)

    def features_and_logits(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features, float32 (N, 64), and the classifier's logits, float32 (N, K)."""
        return self(images), _predict(self.classifier, images)

    def digest(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for weight in self.classifier.get_weights():
            digest.update(np.ascontiguousarray(weight))
        return digest.hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write a `.keras` file, atomically."""
        # A copy has no optimizer, whose state would be three quarters of the file.
        bare = type(self.classifier).from_config(self.classifier.get_config())
        bare.set_weights(self.classifier.get_weights())
        with atomic_file(path) as temporary:
            bare.save(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureNetwork:
        """Read a `.keras` file.

        Raises:
            InputError: the file cannot be read or holds another model.
        """
        try:
            classifier = keras.saving.load_model(path, compile=False, safe_mode=True)
            return cls(classifier)
        except Exception as error:  # Keras raises as many types as there are ways to break a file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            rule = f"is no classifier: {reason}; delete it to train another"
            raise invalid("classifier", str(path), rule) from error


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    seed: int = 0,
    steps: int = STEPS,
    on_step: Callable[[int], None] | None = None,
) -> FeatureNetwork:
    """Train a small convolutional classifier on the images.

    Without labels it tells by how many quarter turns an image was rotated (RotNet: Gidaris et
    al., 2018, arXiv 1803.07728), so that any square images will do.

    Args:
        images: uint8 (N, H, W, C), square where there are no labels.
        labels: integers (N,), or None.
        seed: fixes weights, order and held-out images.
        steps: training steps of 128 images.
        on_step: called after each step with its index.

    Returns:
        The trained network with its accuracy on a held-out tenth.

    Raises:
        InputError: labels and images differ in number.
    """
    if labels is None:
        images, labels = _rotated(images, seed)
    if len(labels) != len(images):
        raise invalid("labels", len(labels), f"must be as many as the images ({len(images)})")
    _, classes = np.unique(labels, return_inverse=True)
    order = np.random.default_rng([seed, 0]).permutation(len(images))
    held_out = order[: max(1, int(HELD_OUT * len(images)))]
    training = order[len(held_out) :]
    classifier = _classifier(images.shape[1:], int(classes.max()) + 1, seed)
    classifier.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps), use_ema=True
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    classifier.fit(
        _batches(images, classes, training, steps, seed),
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=_stepper(on_step))],
    )
    logits = _predict(classifier, images[held_out])
    accuracy = float(np.mean(logits.argmax(axis=1) == classes[held_out]))
    return FeatureNetwork(classifier, accuracy)


def _predict(network: keras.Model, images: np.ndarray) -> np.ndarray:
    """A network's output for uint8 images, of which only some are floats at a time.

    A set of images may be mapped from a file that is larger than memory.
    """
    parts = [
        network.predict(to_float(images[first : first + AT_A_TIME]), batch_size=512, verbose=0)
        for first in range(0, len(images), AT_A_TIME)
    ]
    return np.concatenate(parts)


def _classifier(image_shape: tuple[int, int, int], classes: int, seed: int) -> keras.Model:
    """Strided convolutions down to at most 4 pixels a side, then two dense layers."""
    seeds = itertools.count(seed % 2**31)

    def conv(channels: int, strides: int) -> layers.Layer:
        initializer = keras.initializers.GlorotUniform(next(seeds))
        return layers.Conv2D(
            channels, 3, strides, "same", activation="silu", kernel_initializer=initializer
        )

    def dense(units: int, **options: Any) -> layers.Layer:
        initializer = keras.initializers.GlorotUniform(next(seeds))
        return layers.Dense(units, kernel_initializer=initializer, **options)

    image = keras.Input(image_shape)
    channels = 32
    x = conv(channels, 1)(image)
    while max(x.shape[1:3]) > 4:
        channels = min(2 * channels, 128)
        x = conv(channels, 2)(x)
    x = dense(FEATURES, name=_FEATURE_LAYER)(layers.Flatten()(x))
    logits = dense(classes)(layers.Activation("silu")(x))
    return keras.Model(image, logits, name="classifier")


def _batches(
    images: np.ndarray, classes: np.ndarray, rows: np.ndarray, steps: int, seed: int
) -> Any:
    random = np.random.default_rng([seed, 1])
    for _ in range(steps):
        batch = random.choice(rows, size=BATCH_SIZE)
        yield to_float(images[batch]), classes[batch]


def _rotated(images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some of the images in all four turns, and the turns."""
    if images.shape[1] != images.shape[2]:
        raise invalid("images", images.shape, "must be square where there are no labels")
    some = np.random.default_rng([seed, 2]).permutation(len(images))[:ROTATED_IMAGES]
    some = np.asarray(images[some])
    turned = np.empty((4, *some.shape), some.dtype)
    for turns in range(4):
        turned[turns] = np.rot90(some, turns, axes=(1, 2))
    return turned.reshape(-1, *some.shape[1:]), np.repeat(np.arange(4), len(some))


def _stepper(on_step: Callable[[int], None] | None) -> Callable:
    return lambda batch, logs: on_step(batch) if on_step else None
