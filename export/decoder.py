"""The decoder of latents as a TensorFlow function and as a TFLite file."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from ddsm_tf.export.bundle import TFLiteDecoder
from ddsm_tf.export.tflite import built_in, numbered_layers


def decoder_function(
    autoencoder: Any, batch: int | None = None
) -> tf.types.experimental.PolymorphicFunction:
    """`latents → images` as a graph: float32 (N, h, w, c) → float32 (N, H, W, C) about [-1, 1].

    Args:
        autoencoder: a `KLAutoencoder`.
        batch: N; None for any.
    """

    @tf.autograph.experimental.do_not_convert
    def decode(latents: tf.Tensor) -> tf.Tensor:
        return autoencoder.decode(latents)

    signature = [tf.TensorSpec((batch, *autoencoder.latent_shape), tf.float32, name="latents")]
    return tf.function(decode, input_signature=signature)


def decoder_tflite(autoencoder: Any, batch: int | None = None) -> TFLiteDecoder:
    """The decoder for a device, in float32.

    Raises:
        InputError: an operator is not built in.
    """
    with numbered_layers(autoencoder):
        function = decoder_function(autoencoder, batch).get_concrete_function()
        graph = convert_variables_to_constants_v2(function)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return TFLiteDecoder(built_in(converter.convert()), autoencoder.image_shape)
