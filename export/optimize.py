"""Smaller files by model optimization: magnitude pruning, weight clustering, QAT.

A width's network is fine-tuned under the optimization with the diffusion loss, through its
tf_keras twin, because `tensorflow-model-optimization` works on tf_keras models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from ddsm_tf.errors import invalid, missing_extra
from ddsm_tf.export import width_name
from ddsm_tf.export.tflite import convert
from ddsm_tf.models.layers import SlimmableConv2D, SlimmableDense
from ddsm_tf.models.unet import SlimmableUNet
from ddsm_tf.noise import NoiseTable

try:
    import tensorflow_model_optimization as tfmot
    import tf_keras

    from ddsm_tf.export.qat import RoundedLayer, observed_ranges
    from ddsm_tf.export.twin import Twin, twin_of, weights_back
except ImportError as error:
    raise missing_extra("tensorflow_model_optimization", "optimize") from error

METHODS = ("prune", "cluster", "qat")
# Pruning ends early enough for the weights that are left to recover.
PRUNING_SHARE = 0.7
PRUNING_UPDATES = 40


@dataclass(frozen=True)
class Optimization:
    """How a network is made smaller.

    Attributes:
        method: "prune" (the smallest weights of each kernel become zero), "cluster" (each kernel
            takes few values) or "qat" (int8 weights and activations, rounded while training).
        steps: fine-tuning steps of each width, at least 1.
        batch_size: images a step.
        learning_rate: Adam's at the first step, falling to zero along a cosine. 0 optimizes
            without fine-tuning.
        sparsity: share of zeros in each pruned kernel, in (0, 1); of "prune".
        clusters: values of each clustered kernel, 2 to 256; of "cluster".
        seed: fixes the images, timesteps and noise of every step.

    Raises:
        InputError: a value leaves its range.
    """

    method: str
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 5e-4
    sparsity: float = 0.5
    clusters: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise invalid("optimize", self.method, f"must be one of {', '.join(METHODS)}")
        for name, low, high in (("steps", 1, None), ("batch_size", 1, None), ("clusters", 2, 256)):
            _check_integer(name, getattr(self, name), low, high)
        if not 0.0 <= self.learning_rate < 1.0:
            raise invalid("learning_rate", self.learning_rate, "must lie in [0, 1)")
        if not 0.0 < self.sparsity < 1.0:
            raise invalid("sparsity", self.sparsity, "must lie in (0, 1)")


class NoisedImages(tf_keras.utils.Sequence):
    """Batches of the diffusion loss, each a pure function of the seed and the step.

    An item is `((x_t, t), noise)`, float32 (N, H, W, C), (N,) and (N, H, W, C), where
    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε with t uniform (DDPM, algorithm 1).

    Args:
        images: float32 (count, H, W, C) in [-1, 1].
        noise_table: the forward process.
        batch_size: images N of a batch, drawn with replacement.
        steps: number of batches.
        seed: of the images, timesteps and noise.
    """

    def __init__(
        self, images: np.ndarray, noise_table: NoiseTable, batch_size: int, steps: int, seed: int
    ) -> None:
        self.images = images
        self.scales = noise_table.signal_and_noise_scale()
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        random = np.random.default_rng([self.seed, step])
        images = self.images[random.integers(len(self.images), size=self.batch_size)]
        t = random.integers(len(self.scales[0]), size=self.batch_size)
        noise = random.standard_normal(images.shape, dtype=np.float32)
        signal, spread = (scale[t, None, None, None].astype(np.float32) for scale in self.scales)
        return (signal * images + spread * noise, t.astype(np.float32)), noise


def write_optimized(
    unet: SlimmableUNet,
    folder: Path,
    optimization: Optimization,
    images: np.ndarray,
    noise_table: NoiseTable,
    *,
    quantize: str = "none",
    on_step: Callable[[], None] | None = None,
) -> dict[float, str]:
    """Optimize every width in turn and write `unet_1_0.tflite`, …; returns width → file name.

    Args:
        quantize: of pruned and clustered networks, see `ddsm_tf.export.tflite.convert`.
        on_step: called after every step of every width.

    Raises:
        InputError: see `optimize`.
    """
    files = {}
    for width in unet.widths:
        network = optimize(unet.subnet(width), optimization, images, noise_table, on_step=on_step)
        files[width] = f"{width_name(width)}.tflite"
        (folder / files[width]).write_bytes(to_tflite(network, quantize=quantize))
    return files


def to_tflite(network: Any, *, quantize: str = "none") -> bytes:
    """What `optimize` returned as a TFLite file; after QAT always int8.

    Args:
        quantize: of pruned and clustered networks, see `ddsm_tf.export.tflite.convert`.
    """
    # The converter turns rounding that a graph emulates into int8 kernels, and the weights that
    # are left, of the timestep embedding, into int8 too.
    return convert(network, quantize="dynamic" if isinstance(network, Denoiser) else quantize)


def optimize(
    subnet: SlimmableUNet,
    optimization: Optimization,
    images: np.ndarray,
    noise_table: NoiseTable,
    *,
    on_step: Callable[[], None] | None = None,
) -> Any:
    """Fine-tune a plain network under an optimization.

    The first and the last convolution stay as they are: they are small, and every error of theirs
    is one of the image. QAT also leaves the timestep embedding in float32.

    Args:
        subnet: what `SlimmableUNet.subnet` returned. Pruning and clustering change its weights.
        optimization: the method and its numbers.
        images: to fine-tune on, float32 (N, H, W, C) in [-1, 1].
        noise_table: the forward process.
        on_step: called after every step.

    Returns:
        `subnet` after pruning and clustering, a `Denoiser` after QAT; `to_tflite` takes both.

    Raises:
        InputError: the images are not of the network's shape.
    """
    if images.ndim != 4 or images.shape[1:] != subnet.image_shape or not len(images):
        raise invalid("images", images.shape, f"must have the shape (N, *{subnet.image_shape})")
    twin = twin_of(subnet)
    batches = NoisedImages(
        images, noise_table, optimization.batch_size, optimization.steps, optimization.seed
    )
    train = _FineTuning(batches, optimization.learning_rate, on_step)
    names = _layers_to_optimize(subnet, twin, optimization.method)
    apply = {"prune": _prune, "cluster": _cluster, "qat": _quantize}[optimization.method]
    model = apply(twin, names, optimization, train)
    if optimization.method == "qat":
        return Denoiser(model, subnet.image_shape)
    weights_back(twin, model)
    return subnet


class Denoiser:
    """A tf_keras model called as a UNet is: `(x, t) → noise`.

    Args:
        model: takes `[x, t]`.
        image_shape: (H, W, C).
    """

    def __init__(self, model: tf_keras.Model, image_shape: tuple[int, int, int]) -> None:
        self.model = model
        self.image_shape = image_shape

    def __call__(self, x: Any, t: Any) -> Any:
        """The noise in x, float32 (N, H, W, C), at timesteps t, float32 (N,)."""
        return self.model([x, t], training=False)


@dataclass(frozen=True)
class _FineTuning:
    """Trains a tf_keras model on the diffusion loss."""

    batches: NoisedImages
    learning_rate: float
    on_step: Callable[[], None] | None

    # Autograph reads every layer's code, which takes longer than a hundred steps.
    @tf.autograph.experimental.do_not_convert
    def __call__(self, model: tf_keras.Model, *callbacks: Any) -> None:
        rate = tf_keras.optimizers.schedules.CosineDecay(self.learning_rate, len(self.batches))
        # The legacy one updates a weight in a single operation, and so traces faster.
        optimizer = tf_keras.optimizers.legacy.Adam(rate, global_clipnorm=1.0)

        @tf.function(autograph=False)
        def train_step(x: tf.Tensor, t: tf.Tensor, noise: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                error = tf.reduce_mean(tf.square(model([x, t], training=True) - noise))
            weights = model.trainable_variables
            gradients = tape.gradient(error, weights)
            optimizer.apply_gradients(zip(gradients, weights, strict=True))

        optimizer._create_all_weights(model.trainable_variables)
        model.optimizer = optimizer
        callbacks = tf_keras.callbacks.CallbackList(callbacks, model=model)
        callbacks.on_train_begin()
        for step in range(len(self.batches)):
            callbacks.on_train_batch_begin(step)
            (x, t), noise = self.batches[step]
            train_step(x, t, noise)
            if self.on_step is not None:
                self.on_step()
        callbacks.on_epoch_end(0)


def _prune(
    twin: Twin, names: Collection[str], optimization: Optimization, train: _FineTuning
) -> tf_keras.Model:
    sparsity = tfmot.sparsity.keras
    every = max(1, optimization.steps // PRUNING_UPDATES)
    # The last update, which sets the final sparsity, must fall on a multiple of `every`.
    end = every * max(1, round(PRUNING_SHARE * optimization.steps / every))
    schedule = sparsity.PolynomialDecay(0.0, optimization.sparsity, 0, end, frequency=every)

    def wrap(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        return sparsity.prune_low_magnitude(layer, pruning_schedule=schedule)

    model = _wrap(twin, wrap, names)
    train(model, sparsity.UpdatePruningStep())
    return sparsity.strip_pruning(model)


def _cluster(
    twin: Twin, names: Collection[str], optimization: Optimization, train: _FineTuning
) -> tf_keras.Model:
    clustering = tfmot.clustering.keras

    def wrap(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        start = clustering.CentroidInitialization.LINEAR
        return clustering.cluster_weights(layer, optimization.clusters, start)

    model = _wrap(twin, wrap, names)
    train(model)
    return clustering.strip_clustering(model)


def _quantize(
    twin: Twin, names: Collection[str], optimization: Optimization, train: _FineTuning
) -> tf_keras.Model:
    inputs, _ = train.batches[0]
    ranges = observed_ranges(twin.model, names, list(inputs))
    model = _wrap(twin, lambda layer: RoundedLayer(layer, ranges[layer.name]), names)
    train(model)
    return model


def _wrap(
    twin: Twin,
    wrap: Callable[[tf_keras.layers.Layer], tf_keras.layers.Layer],
    names: Collection[str],
) -> tf_keras.Model:
    """A copy of the twin whose layers of those names are wrapped; it shares their weights."""
    return tf_keras.models.clone_model(
        twin.model, clone_function=lambda layer: wrap(layer) if layer.name in names else layer
    )


def _layers_to_optimize(subnet: SlimmableUNet, twin: Twin, method: str) -> set[str]:
    """Names of the convolutions and dense layers of the twin that a method may change."""
    kept = [subnet.input_conv, subnet.output_conv]
    if method == "qat":
        kept += [subnet.timestep_embedding.expand, subnet.timestep_embedding.project]
    return {
        name
        for name, layer in twin.sources.items()
        if isinstance(layer, SlimmableConv2D | SlimmableDense) and layer not in kept
    }


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        rule = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise invalid(name, value, f"must be an integer, {rule}")
