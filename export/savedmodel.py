"""SavedModels: one a width, laid out for TF Serving."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.export.sampler_graph import SamplerGraph
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, width_name

VERSION = "1"


def denoiser_function(
    subnet: Any, batch: int | None = None, *, xla: bool = False
) -> tf.types.experimental.PolymorphicFunction:
    """`(x, t) → output` as a graph, float32 throughout, for any batch size if `batch` is None.

    A model with classes takes `labels`, int32 (N,), as well. With `xla` the graph is compiled when
    it first meets a batch size.
    """

    @tf.autograph.experimental.do_not_convert
    def denoise(*inputs: tf.Tensor) -> tf.Tensor:
        return tf.cast(subnet(*inputs), tf.float32)

    signature = [
        tf.TensorSpec((batch, *subnet.image_shape), tf.float32, name="x"),
        tf.TensorSpec((batch,), tf.float32, name="t"),
    ]
    if getattr(subnet, "num_classes", 0):
        signature.append(tf.TensorSpec((batch,), tf.int32, name="labels"))
    # None and not False, which would keep callers from compiling it either.
    return tf.function(denoise, input_signature=signature, jit_compile=xla or None)


def write_savedmodels(unet: Any, folder: Path, *, xla: bool = False) -> None:
    """Write `unet_1_0/1/`, …; TF Serving loads such a folder under a model's name.

    The signature `serve` takes `x`, float32 (N, H, W, C), and `t`, float32 (N,), for a model with
    classes also `labels`, int32 (N,), and gives the network's output, float32 (N, H, W, C).

    Args:
        unet: the trained `SlimmableUNet`.
        folder: where to write.
        xla: have whoever loads them compile each batch size by XLA at its first call.
    """
    for width in unet.widths:
        subnet = unet.subnet(width)
        path = folder / width_name(width) / VERSION
        _save([subnet], {"serve": denoiser_function(subnet, xla=xla)}, path)


def write_sampler(
    unet: Any,
    noise_table: NoiseTable,
    schedule: StepSchedule,
    path: str | os.PathLike,
    autoencoder: Any = None,
    *,
    xla: bool = False,
) -> None:
    """Write the sampler SavedModel: every width, and the loop that switches between them.

    `tf.saved_model.load` reads it in a process without this package. Signatures, all of which give
    `images`, uint8 (N, H, W, C):

    - `sample` (also `serving_default`): `seed` and `count`, int64 scalars.
    - `sample_images`: `seed` and `index`, int64 (N,) each: row n is image index[n] of seed[n]. A
      server may join the rows of several requests.
    - `sample_noise`: `noise`, float32 (N, D, H, W, C) with D draws: x_T and one for each step that
      adds noise.
    - `sample_schedule`: `seed`, `first` (index of the first image) and `count`, int64 scalars, and
      the fields of a schedule: `timesteps` int32 (S,), `widths` float32 (S,), `sampler` and
      `variance` text, `eta`, `churn`, `churn_min`, `churn_max` (negative: no limit) and
      `churn_noise` float32; with classes also `guidance_scale` float32 and `guidance_widths`
      float32 (S,), or (0,) for the steps' own.

    Those of a model with classes also take `labels`, int32, one an image or one for all: the class,
    the number of classes for none, or -2 for the image's index modulo the number of classes.

    A request may ask for at most `MAX_IMAGES` images.

    Args:
        unet: the trained `SlimmableUNet`.
        noise_table: the one it was trained with.
        schedule: that of all signatures but the last.
        path: folder to make.
        autoencoder: a `KLAutoencoder` whose decoder turns latents into images, or None.
        xla: see `write_savedmodels`; the denoisers are compiled, the loop and the decoder are not.
    """
    subnets = {width: unet.subnet(width) for width in unet.widths}
    denoisers = {width: denoiser_function(subnet, xla=xla) for width, subnet in subnets.items()}
    decode, networks = None, list(subnets.values())
    if autoencoder is not None:
        from ddsm_tf.export.decoder import decoder_function

        decode = decoder_function(autoencoder)
        networks.append(autoencoder)
    shape, classes = unet.image_shape, unet.num_classes
    graph = SamplerGraph(denoisers, noise_table, schedule, shape, classes, decode)
    _save(networks, graph.signatures(), path)


def _save(subnets: Iterable[Any], functions: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Save functions as signatures; the first is also the default.

    Not by Keras's `ExportArchive`, whose files hold every weight twice.
    """
    module = tf.Module()
    module.weights = [variable.value for subnet in subnets for variable in subnet.variables]
    # Functions that are traced already: saving would trace others once more.
    signatures = {name: each.get_concrete_function() for name, each in functions.items()}
    for name, function in signatures.items():
        setattr(module, name, function)
    default = next(iter(signatures.values()))
    signatures[tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY] = default
    tf.saved_model.save(module, str(path), signatures=signatures)


class SavedModelDenoiser:
    """`denoise(x, t, width, labels)` over a folder of SavedModels, NumPy in and out.

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

    def __call__(
        self,
        x: np.ndarray,
        t: int | np.ndarray,
        width: float,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """The output for x, float32 (N, H, W, C), at timestep t, a scalar or (N,).

        Models with classes need `labels`, int32 (N,).
        """
        if width not in self._loaded:
            self._loaded[width] = self._load(width)
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        serve = self._loaded[width].signatures["serve"]
        conditional = "labels" in serve.structured_input_signature[1]
        if conditional != (labels is not None):
            rule = "must be given to a model with classes, and to no other"
            raise invalid("labels", labels, rule)
        given = {"labels": tf.constant(labels, tf.int32)} if conditional else {}
        outputs = serve(x=tf.constant(x), t=tf.constant(timesteps), **given)
        return next(iter(outputs.values())).numpy()

    def _load(self, width: float) -> Any:
        path = self.folder / width_name(width) / VERSION
        try:
            return tf.saved_model.load(str(path))
        except OSError as error:
            raise InputError(f"`width` (={width}) has no SavedModel at {path}") from error
