"""TFLite: one file a width, built-in operators only, any batch size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.export import QUANTIZE, width_name
from ddsm_tf.export.savedmodel import denoiser_function


def write_tflite(unet: Any, folder: Path, *, quantize: str = "none") -> dict[float, str]:
    """Write `unet_1_0.tflite`, …; returns width → file name.

    Raises:
        InputError: see `convert`.
    """
    files = {}
    for width in unet.widths:
        files[width] = f"{width_name(width)}.tflite"
        (folder / files[width]).write_bytes(convert(unet.subnet(width), quantize=quantize))
    return files


def convert(subnet: Any, *, quantize: str = "none") -> bytes:
    """A plain network as a TFLite file `(x, t) → noise`, float32 inputs and output.

    Args:
        subnet: a `SlimmableUNet` with one width.
        quantize: "none" (float32), "float16" (weights) or "dynamic" (int8 weights, activations
            quantised as they come).

    Raises:
        InputError: unknown `quantize`, or an operator that is not built in.
    """
    if quantize not in QUANTIZE:
        raise invalid("quantize", quantize, f"must be one of {', '.join(QUANTIZE)}")
    # Weights as constants: TFLite would else keep variables, which its delegates do not take.
    with numbered_layers(subnet):
        graph = convert_variables_to_constants_v2(denoiser_function(subnet).get_concrete_function())
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantize != "none":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    data = converter.convert()
    foreign = foreign_operators(data)
    if foreign:
        raise InputError(f"the network needs operators that TFLite has not built in: {foreign}")
    return data


@contextmanager
def numbered_layers(subnet: Any) -> Iterator[None]:
    """Name the layers by their place in the network while its graph is made.

    Their names stand in the file, and Keras numbers layers through the whole process: a second
    export of the same network would have other bytes.
    """
    layers = list(subnet._flatten_layers())
    names = [layer.name for layer in layers]
    for number, layer in enumerate(layers):
        layer.name = f"{type(layer).__name__}_{number}"
    try:
        yield
    finally:
        for layer, name in zip(layers, names, strict=True):
            layer.name = name


def foreign_operators(data: bytes) -> list[str]:
    """Flex, Select or custom operators of a TFLite file; none in what this module writes."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, experimental_preserve_all_tensors=False)
    names = {details["op_name"] for details in interpreter._get_ops_details()}
    return sorted(name for name in names if name.startswith(("Flex", "CUSTOM", "Custom")))
