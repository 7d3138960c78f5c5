"""SavedModels: one a width, laid out for TF Serving."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.export import width_name

VERSION = "1"


def denoiser_function(
    subnet: Any, batch: int | None = None
) -> tf.types.experimental.PolymorphicFunction:
    """`(x, t) → noise` as a graph, float32 throughout, for any batch size if `batch` is None."""

    @tf.autograph.experimental.do_not_convert
    def denoise(x: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        return tf.cast(subnet(x, t), tf.float32)

    signature = [
        tf.TensorSpec((batch, *subnet.image_shape), tf.float32, name="x"),
        tf.TensorSpec((batch,), tf.float32, name="t"),
    ]
    return tf.function(denoise, input_signature=signature)


def write_savedmodels(unet: Any, folder: Path) -> None:
    """Write `unet_1_0/1/`, …; TF Serving loads such a folder under a model's name.

    The signature `serve` takes `x`, float32 (N, H, W, C), and `t`, float32 (N,), and gives the
    noise, float32 (N, H, W, C).
    """
    for width in unet.widths:
        subnet = unet.subnet(width)
        archive = keras.export.ExportArchive()
        archive.track(subnet)
        archive.add_endpoint("serve", denoiser_function(subnet))
        archive.write_out(str(folder / width_name(width) / VERSION), verbose=False)


class SavedModelDenoiser:
    """`denoise(x, t, width)` over a folder of SavedModels, NumPy in and out.

    Args:
        folder: what `ddsm export RUN savedmodel` wrote.

    Raises:
        InputError: the folder is not there.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise invalid("folder", str(folder), "must be a folder of SavedModels")
        self._loaded: dict[float, Any] = {}

    def __call__(self, x: np.ndarray, t: int | np.ndarray, width: float) -> np.ndarray:
        """ε for x, float32 (N, H, W, C), at timestep t, a scalar or (N,)."""
        if width not in self._loaded:
            self._loaded[width] = self._load(width)
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        serve = self._loaded[width].signatures["serve"]
        outputs = serve(x=tf.constant(x), t=tf.constant(timesteps))
        return next(iter(outputs.values())).numpy()

    def _load(self, width: float) -> Any:
        path = self.folder / width_name(width) / VERSION
        try:
            return tf.saved_model.load(str(path))
        except OSError as error:
            raise InputError(f"`width` (={width}) has no SavedModel at {path}") from error
