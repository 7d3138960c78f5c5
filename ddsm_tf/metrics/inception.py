"""The Inception-v3 that FID is defined on, as a Keras model.

It is the network of the TensorFlow release of 2015-12-05 (Szegedy et al., 2015, arXiv 1512.00567),
with what tells it from later ones: average pools that leave the border out of the mean, a maximum
pool in the last block, 1,008 logits, and images resized as TensorFlow 1 did, without half-pixel
centres. Layers bear the names of the published PyTorch weight file, so that converting is a
renaming.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import atomic_file

SIZE = 299
FEATURES = 2048
LOGITS = 1008
BATCH_SIZE = 32
FORMAT = "ddsm-inception-2015-12-05"
# The published file's name ends in the first digits of its SHA-256.
PUBLISHED_SHA256 = "6726825d"
# Batch normalisation of every convolution.
EPSILON = 1e-3
_PARTS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")

_Tensors = dict[str, np.ndarray]


def resize_bilinear(images: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Resize as `tf.image.resize_bilinear` of TensorFlow 1 did: output i reads input i · scale.

    Args:
        images: (N, H, W, C), uint8 or float.
        size: side of the result.

    Returns:
        float32 (N, size, size, C).
    """
    x = images.astype(np.float32)
    for axis in (1, 2):
        x = _resize_axis(x, axis, size)
    return x


def _resize_axis(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    source = x.shape[axis]
    places = np.arange(size, dtype=np.float32) * np.float32(source / size)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, source - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    share = (places - low).astype(np.float32).reshape(shape)
    first, second = np.take(x, low, axis), np.take(x, high, axis)
    return first + (second - first) * share


class _Builder:
    """Lays out the network; every convolution has a batch normalisation and a ReLU."""

    def conv(
        self,
        x: Any,
        name: str,
        channels: int,
        kernel: int | tuple[int, int],
        strides: int = 1,
        padding: str = "same",
    ) -> Any:
        x = layers.Conv2D(channels, kernel, strides, padding, use_bias=False, name=f"{name}.conv")(
            x
        )
        x = layers.BatchNormalization(epsilon=EPSILON, name=f"{name}.bn")(x)
        return layers.ReLU()(x)

    def average(self, x: Any) -> Any:
        # TensorFlow's own leaves the border out; elsewhere it may not.
        return _BorderlessAverage()(x)

    def block_a(self, x: Any, name: str, pooled: int) -> Any:
        one = self.conv(x, f"{name}.branch1x1", 64, 1)
        five = self.conv(x, f"{name}.branch5x5_1", 48, 1)
        five = self.conv(five, f"{name}.branch5x5_2", 64, 5)
        three = self.conv(x, f"{name}.branch3x3dbl_1", 64, 1)
        three = self.conv(three, f"{name}.branch3x3dbl_2", 96, 3)
        three = self.conv(three, f"{name}.branch3x3dbl_3", 96, 3)
        pool = self.conv(self.average(x), f"{name}.branch_pool", pooled, 1)
        return layers.Concatenate()([one, five, three, pool])

    def block_b(self, x: Any, name: str) -> Any:
        three = self.conv(x, f"{name}.branch3x3", 384, 3, 2, "valid")
        double = self.conv(x, f"{name}.branch3x3dbl_1", 64, 1)
        double = self.conv(double, f"{name}.branch3x3dbl_2", 96, 3)
        double = self.conv(double, f"{name}.branch3x3dbl_3", 96, 3, 2, "valid")
        return layers.Concatenate()([three, double, layers.MaxPooling2D(3, 2)(x)])

    def block_c(self, x: Any, name: str, inner: int) -> Any:
        one = self.conv(x, f"{name}.branch1x1", 192, 1)
        seven = self.conv(x, f"{name}.branch7x7_1", inner, 1)
        seven = self.conv(seven, f"{name}.branch7x7_2", inner, (1, 7))
        seven = self.conv(seven, f"{name}.branch7x7_3", 192, (7, 1))
        double = self.conv(x, f"{name}.branch7x7dbl_1", inner, 1)
        double = self.conv(double, f"{name}.branch7x7dbl_2", inner, (7, 1))
        double = self.conv(double, f"{name}.branch7x7dbl_3", inner, (1, 7))
        double = self.conv(double, f"{name}.branch7x7dbl_4", inner, (7, 1))
        double = self.conv(double, f"{name}.branch7x7dbl_5", 192, (1, 7))
        pool = self.conv(self.average(x), f"{name}.branch_pool", 192, 1)
        return layers.Concatenate()([one, seven, double, pool])

    def block_d(self, x: Any, name: str) -> Any:
        three = self.conv(x, f"{name}.branch3x3_1", 192, 1)
        three = self.conv(three, f"{name}.branch3x3_2", 320, 3, 2, "valid")
        seven = self.conv(x, f"{name}.branch7x7x3_1", 192, 1)
        seven = self.conv(seven, f"{name}.branch7x7x3_2", 192, (1, 7))
        seven = self.conv(seven, f"{name}.branch7x7x3_3", 192, (7, 1))
        seven = self.conv(seven, f"{name}.branch7x7x3_4", 192, 3, 2, "valid")
        return layers.Concatenate()([three, seven, layers.MaxPooling2D(3, 2)(x)])

    def block_e(self, x: Any, name: str, last: bool) -> Any:
        one = self.conv(x, f"{name}.branch1x1", 320, 1)
        three = self.conv(x, f"{name}.branch3x3_1", 384, 1)
        wide = self.conv(three, f"{name}.branch3x3_2a", 384, (1, 3))
        high = self.conv(three, f"{name}.branch3x3_2b", 384, (3, 1))
        double = self.conv(x, f"{name}.branch3x3dbl_1", 448, 1)
        double = self.conv(double, f"{name}.branch3x3dbl_2", 384, 3)
        double_wide = self.conv(double, f"{name}.branch3x3dbl_3a", 384, (1, 3))
        double_high = self.conv(double, f"{name}.branch3x3dbl_3b", 384, (3, 1))
        pool = layers.MaxPooling2D(3, 1, "same")(x) if last else self.average(x)
        pool = self.conv(pool, f"{name}.branch_pool", 192, 1)
        return layers.Concatenate()([one, wide, high, double_wide, double_high, pool])


class _BorderlessAverage(layers.Layer):
    """Mean over 3 × 3 pixels, those outside of the image left out."""

    def call(self, x: Any) -> Any:
        total = ops.average_pool(ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 1, "valid")
        ones = ops.pad(ops.ones_like(x[:1, :, :, :1]), ((0, 0), (1, 1), (1, 1), (0, 0)))
        return total / ops.average_pool(ones, 3, 1, "valid")


def build_inception() -> keras.Model:
    """The network with fresh weights: float (N, 299, 299, 3) in [-1, 1] → features and logits.

    Features are float32 (N, 2048); logits, without their bias as the Inception Score takes them,
    float32 (N, 1008).
    """
    build = _Builder()
    image = keras.Input((SIZE, SIZE, 3))
    x = build.conv(image, "Conv2d_1a_3x3", 32, 3, 2, "valid")
    x = build.conv(x, "Conv2d_2a_3x3", 32, 3, 1, "valid")
    x = build.conv(x, "Conv2d_2b_3x3", 64, 3)
    x = layers.MaxPooling2D(3, 2)(x)
    x = build.conv(x, "Conv2d_3b_1x1", 80, 1, 1, "valid")
    x = build.conv(x, "Conv2d_4a_3x3", 192, 3, 1, "valid")
    x = layers.MaxPooling2D(3, 2)(x)
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = build.block_a(x, name, pooled)
    x = build.block_b(x, "Mixed_6a")
    for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = build.block_c(x, name, inner)
    x = build.block_d(x, "Mixed_7a")
    x = build.block_e(x, "Mixed_7b", last=False)
    x = build.block_e(x, "Mixed_7c", last=True)
    features = layers.GlobalAveragePooling2D(name="pool3")(x)
    logits = layers.Dense(LOGITS, use_bias=False, name="fc")(features)
    return keras.Model(image, [features, logits], name="inception_2015_12_05")


def weight_names() -> list[str]:
    """The tensors of the published file that the network takes, in its order."""
    names = [layer.name for layer in build_inception().layers if layer.name.endswith(".conv")]
    units = [name.removesuffix(".conv") for name in names]
    return [f"{unit}.{part}" for unit in units for part in _PARTS] + ["fc.weight"]


def assign_weights(model: keras.Model, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy the tensors of a PyTorch state dict into the network.

    Args:
        model: of `build_inception`.
        tensors: name → array; convolutions OIHW, dense layers (outputs, inputs).

    Raises:
        InputError: one is missing or has another shape.
    """

    def tensor(name: str) -> np.ndarray:
        if name not in tensors:
            raise invalid("weights", name, "is missing; is it the Inception-v3 of 2015-12-05?")
        return np.asarray(tensors[name], np.float32)

    def assign(variable: Any, value: np.ndarray, name: str) -> None:
        if tuple(variable.shape) != value.shape:
            rule = f"has the shape {value.shape}, not {tuple(variable.shape)}"
            raise invalid("weights", name, rule)
        variable.assign(value)

    for layer in model.layers:
        unit, _, kind = layer.name.rpartition(".")
        if kind == "conv":
            name = f"{unit}.conv.weight"
            assign(layer.kernel, tensor(name).transpose(2, 3, 1, 0), name)
        elif kind == "bn":
            variables = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
            for variable, part in zip(variables, _PARTS[1:], strict=True):
                assign(variable, tensor(f"{unit}.{part}"), f"{unit}.{part}")
        elif layer.name == "fc":
            assign(layer.kernel, tensor("fc.weight").T, "fc.weight")


class InceptionNetwork:
    """Features and class probabilities of images of any size.

    Args:
        tensors: name → array, of the published file; see `assign_weights`.
        sha256: of that file, or "" for other weights.

    Attributes:
        digest: of the tensors.
        is_published: whether distances on its features may be called FID.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], sha256: str = "") -> None:
        self.digest = tensors_digest(tensors)
        self._model = build_inception()
        assign_weights(self._model, tensors)
        self.sha256 = sha256
        self.is_published = sha256.startswith(PUBLISHED_SHA256)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features of uint8 (N, H, W, 1 or 3) images, float32 (N, 2048)."""
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features, float32 (N, 2048), and logits, float32 (N, 1008), of uint8 images.

        Raises:
            InputError: the images have another dtype or number of channels.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            given = f"{images.dtype} {images.shape}"
            raise invalid("images", given, "must be uint8 (N, H, W, 1 or 3)")
        features, logits = [], []
        for first in range(0, len(images), BATCH_SIZE):
            batch = np.asarray(images[first : first + BATCH_SIZE])
            batch = np.repeat(batch, 3 // batch.shape[-1], axis=-1)
            x = (resize_bilinear(batch) - np.float32(128.0)) / np.float32(128.0)
            some, scores = self._model.predict_on_batch(x)
            features.append(some)
            logits.append(scores)
        return np.concatenate(features), np.concatenate(logits)

    @classmethod
    def load(cls, path: str | os.PathLike) -> InceptionNetwork:
        """Read what `convert_inception` wrote.

        Raises:
            InputError: the file cannot be read, or is not what it was written as.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as archive:
                values = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, KeyError) as error:
            rule = f"cannot be read ({error}); see `ddsm metrics convert-inception`"
            raise invalid("inception", str(path), rule) from error
        about = {name: str(values.pop(name, "")) for name in ("format", "sha256", "digest")}
        if about["format"] != FORMAT:
            raise invalid("inception", str(path), "is no file of `ddsm metrics convert-inception`")
        network = cls(values, about["sha256"])
        if about["digest"] != network.digest:
            raise invalid("inception", str(path), "has changed since it was converted; do so again")
        return network


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name], np.float32)
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(value)
    return digest.hexdigest()


def convert_inception(
    source: str | os.PathLike, out: str | os.PathLike, *, allow_other: bool = False
) -> str:
    """Convert the published PyTorch weight file, which needs `torch` once, to an `.npz`.

    Args:
        source: `pt_inception-2015-12-05-6726825d.pth`.
        out: the `.npz` to write.
        allow_other: convert a file with another SHA-256; what is measured on it is not FID.

    Returns:
        The SHA-256 of `source`.

    Raises:
        InputError: the file cannot be read, is another one, or lacks a tensor.
    """
    source = Path(source)
    try:
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    except OSError as error:
        raise invalid("FILE", str(source), f"cannot be read: {error.strerror}") from error
    if not sha256.startswith(PUBLISHED_SHA256) and not allow_other:
        rule = f"has the SHA-256 {sha256[:16]}…, not {PUBLISHED_SHA256}…; --allow-other takes it"
        raise invalid("FILE", str(source), rule)
    state = _read_state(source)
    missing = [name for name in weight_names() if name not in state]
    if missing:
        raise invalid("FILE", str(source), f"lacks {len(missing)} tensors, such as {missing[0]}")
    tensors = {name: state[name] for name in weight_names()}
    assign_weights(build_inception(), tensors)
    digest = tensors_digest(tensors)
    about = {"format": np.array(FORMAT), "sha256": np.array(sha256), "digest": np.array(digest)}
    with atomic_file(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **about, **tensors)
    return sha256


def _read_state(source: Path) -> _Tensors:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "`ddsm metrics convert-inception` needs PyTorch to read the file: pip install torch"
        ) from error
    try:
        # Only tensors: nothing else in the file is made into an object.
        state = torch.load(source, map_location="cpu", weights_only=True)
        return {name: value.float().numpy() for name, value in state.items()}
    except Exception as error:  # torch raises as many types as there are ways to break a file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise invalid("FILE", str(source), f"cannot be read: {reason}") from error
