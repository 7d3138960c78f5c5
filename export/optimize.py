"""Smaller files by model optimization: magnitude pruning, weight clustering, QAT.

Each width's network is fine-tuned under the optimization with the diffusion loss, through its
tf_keras twin, because `tensorflow-model-optimization` works on tf_keras models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.errors import invalid, missing_extra
from ddsm_tf.export import check_optimization
from ddsm_tf.export.tflite import convert, convert_rounded
from ddsm_tf.models.layers import SlimmableConv2D, SlimmableDense
from ddsm_tf.models.objective import check_weighting
from ddsm_tf.models.unet import SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import width_name

try:
    import tensorflow_model_optimization as tfmot
    import tf_keras

    from ddsm_tf.export.fine_tuning import NoisedImages, fine_tune
    from ddsm_tf.export.qat import RoundedLayer, RoundedNetwork, observed_ranges
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
        weighting: of the timesteps, as in training; see `ddsm_tf.models.objective`.
        label_dropout: share of the labels that are hidden, in [0, 1], as in training.

    Raises:
        InputError: a value leaves its range.
    """

    method: str
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-3
    sparsity: float = 0.5
    clusters: int = 16
    seed: int = 0
    weighting: str = "uniform"
    label_dropout: float = 0.0

    @property
    def notes(self) -> dict[str, str | int | float]:
        """What a bundle's provenance says of it."""
        own = {"prune": ("sparsity",), "cluster": ("clusters",)}.get(self.method, ())
        fields = ("steps", "batch_size", "learning_rate", *own, "seed")
        settings = {f"optimize_{name}": getattr(self, name) for name in fields}
        return {"optimize": self.method, **settings}

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise invalid("optimize", self.method, f"must be one of {', '.join(METHODS)}")
        _check_integer("steps", self.steps, 1)
        _check_integer("batch_size", self.batch_size, 1)
        _check_integer("clusters", self.clusters, 2, 256)
        _check_integer("seed", self.seed, 0)
        if not 0.0 <= self.learning_rate < 1.0:
            raise invalid("learning_rate", self.learning_rate, "must lie in [0, 1)")
        if not 0.0 < self.sparsity < 1.0:
            raise invalid("sparsity", self.sparsity, "must lie in (0, 1)")
        check_weighting(self.weighting)
        if not 0.0 <= self.label_dropout <= 1.0:
            raise invalid("label_dropout", self.label_dropout, "must lie in [0, 1]")


def write_optimized(
    unet: SlimmableUNet,
    folder: Path,
    optimization: Optimization,
    images: np.ndarray,
    noise_table: NoiseTable,
    *,
    labels: np.ndarray | None = None,
    quantize: str = "none",
    on_step: Callable[[], None] | None = None,
) -> dict[float, str]:
    """Optimize every width in turn and write `unet_1_0.tflite`, …; returns width → file name.

    Args:
        unet: the slimmable network.
        folder: where to.
        optimization, images, noise_table, labels: see `optimize`.
        quantize: see `to_tflite`.
        on_step: called after every step of every width.

    Raises:
        InputError: see `optimize`.
    """
    files = {}
    for width in unet.widths:
        subnet = unet.subnet(width)
        network = optimize(
            subnet, optimization, images, noise_table, labels=labels, on_step=on_step
        )
        files[width] = f"{width_name(width)}.tflite"
        (folder / files[width]).write_bytes(to_tflite(network, quantize=quantize))
    return files


def optimize(
    subnet: SlimmableUNet,
    optimization: Optimization,
    images: np.ndarray,
    noise_table: NoiseTable,
    *,
    labels: np.ndarray | None = None,
    on_step: Callable[[], None] | None = None,
) -> SlimmableUNet | RoundedNetwork:
    """Fine-tune a plain network under an optimization.

    The first and the last convolution stay as they are: they are small, and every error of theirs
    is one of the image. QAT leaves the timestep embedding alone, too.

    Args:
        subnet: what `SlimmableUNet.subnet` returned. Pruning and clustering change its weights.
        optimization: the method and its numbers.
        images: to fine-tune on, uint8 (N, H, W, C), or latents, float32.
        noise_table: the forward process, and what the network predicts.
        labels: of the images, integers (N,) below `num_classes`; for a model with classes.
        on_step: called after every step.

    Returns:
        `subnet` after pruning and clustering, a `RoundedNetwork` after QAT; `to_tflite` takes
        both.

    Raises:
        InputError: the images are not of the network's shape, or there are none; or labels are
            missing, superfluous or no classes of the model.
    """
    _check_images(images, subnet.image_shape)
    _check_labels(labels, len(images), subnet.num_classes)
    twin = twin_of(subnet)
    names = _layers_to_change(subnet, twin, optimization.method)
    batches = NoisedImages(
        images,
        noise_table,
        optimization.batch_size,
        optimization.steps,
        optimization.seed,
        labels=labels,
        num_classes=subnet.num_classes,
        label_dropout=optimization.label_dropout,
        weighting=optimization.weighting,
    )

    def train(model: tf_keras.Model, *callbacks: Any) -> None:
        fine_tune(model, batches, optimization.learning_rate, *callbacks, on_step=on_step)

    if optimization.method == "qat":
        model = _round(twin, names, batches[0].inputs, train)
        return RoundedNetwork(model, subnet.image_shape, subnet.num_classes)
    change = {"prune": _prune, "cluster": _cluster}[optimization.method]
    weights_back(twin, change(twin, names, optimization, train))
    return subnet


def to_tflite(network: SlimmableUNet | RoundedNetwork, *, quantize: str = "none") -> bytes:
    """What `optimize` returned as a TFLite file.

    Args:
        quantize: of pruned and clustered networks, see `ddsm_tf.export.tflite.convert`; a file
            after QAT is int8.

    Raises:
        InputError: `quantize` is not "none" after QAT, or see `convert`.
    """
    if isinstance(network, RoundedNetwork):
        check_optimization("tflite", "qat", quantize)
        return convert_rounded(network)
    return convert(network, quantize=quantize)


def _prune(
    twin: Twin, names: Collection[str], optimization: Optimization, train: Callable[..., None]
) -> tf_keras.Model:
    sparsity = tfmot.sparsity.keras
    every = max(1, optimization.steps // PRUNING_UPDATES)
    # The last update, which sets the final sparsity, must fall on a multiple of `every`.
    end = every * max(1, round(PRUNING_SHARE * optimization.steps / every))
    schedule = sparsity.PolynomialDecay(0.0, optimization.sparsity, 0, end, frequency=every)

    def wrap(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        return sparsity.prune_low_magnitude(layer, pruning_schedule=schedule)

    model = _wrapped(twin, names, wrap)
    train(model, sparsity.UpdatePruningStep())
    return sparsity.strip_pruning(model)


def _cluster(
    twin: Twin, names: Collection[str], optimization: Optimization, train: Callable[..., None]
) -> tf_keras.Model:
    clustering = tfmot.clustering.keras

    def wrap(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        start = clustering.CentroidInitialization.LINEAR
        return clustering.cluster_weights(layer, optimization.clusters, start)

    model = _wrapped(twin, names, wrap)
    train(model)
    return clustering.strip_clustering(model)


def _round(
    twin: Twin, names: Collection[str], inputs: list[np.ndarray], train: Callable[..., None]
) -> tf_keras.Model:
    ranges = observed_ranges(twin.model, names, inputs)
    model = _wrapped(twin, names, lambda layer: RoundedLayer(layer, ranges[layer.name]))
    train(model)
    return model


def _wrapped(
    twin: Twin,
    names: Collection[str],
    wrap: Callable[[tf_keras.layers.Layer], tf_keras.layers.Layer],
) -> tf_keras.Model:
    """A copy of the twin's model with those layers wrapped; it shares all weights."""
    return tf_keras.models.clone_model(
        twin.model, clone_function=lambda layer: wrap(layer) if layer.name in names else layer
    )


def _layers_to_change(subnet: SlimmableUNet, twin: Twin, method: str) -> list[str]:
    """Names of the twin's convolutions and dense layers that a method works on."""
    kept = [subnet.input_conv, subnet.output_conv]
    if method == "qat":
        kept += [subnet.timestep_embedding.expand, subnet.timestep_embedding.project]
    return [
        name
        for name, layer in twin.sources.items()
        if isinstance(layer, SlimmableConv2D | SlimmableDense)
        and not any(layer is other for other in kept)
    ]


def _check_images(images: Any, image_shape: tuple[int, int, int]) -> None:
    dtype, shape = getattr(images, "dtype", None), getattr(images, "shape", (0,))
    if dtype not in (np.uint8, np.float32) or shape[1:] != image_shape or shape[0] == 0:
        sides = ", ".join(map(str, image_shape))
        rule = f"must be uint8 (N, {sides}) with N ≥ 1, or float32 if they are latents"
        raise invalid("images", (dtype, shape), rule)


def _check_labels(labels: Any, count: int, num_classes: int) -> None:
    if (labels is None) == bool(num_classes):
        rule = "must be given for a model with classes, and for no other"
        found = labels if labels is None else np.shape(labels)
        raise invalid("labels", found, f"{rule}; num_classes is {num_classes}")
    if labels is None:
        return
    labels = np.asarray(labels)
    whole = labels.dtype.kind in "iu" and labels.shape == (count,)
    if not whole or labels.min() < 0 or labels.max() >= num_classes:
        found = f"{labels.dtype} {labels.shape}"
        raise invalid("labels", found, f"must be integers ({count},) in [0, {num_classes - 1}]")


def _check_integer(name: str, value: Any, low: int, high: int = 2**63 - 1) -> None:
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise invalid(name, value, f"must be an integer in [{low}, {high}]")
