"""TFLite: one file a width, built-in operators only, at a fixed or any batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.export import QUANTIZE, needs_calibration
from ddsm_tf.export.calibration import Samples
from ddsm_tf.export.savedmodel import denoiser_function
from ddsm_tf.schedule import width_name


def write_tflite(
    unet: Any,
    folder: Path,
    *,
    quantize: str = "none",
    batch: int | None = None,
    calibration: Mapping[float, Samples] | None = None,
) -> dict[float, str]:
    """Write `unet_1_0.tflite`, …; returns width → file name.

    Args:
        unet: a `SlimmableUNet`.
        folder: where to.
        quantize, batch: see `convert`.
        calibration: width → its samples.

    Raises:
        InputError: see `convert`.
    """
    files = {}
    for width in unet.widths:
        files[width] = f"{width_name(width)}.tflite"
        samples = calibration[width] if calibration else None
        data = convert(unet.subnet(width), quantize=quantize, batch=batch, calibration=samples)
        (folder / files[width]).write_bytes(data)
    return files


def convert(
    subnet: Any,
    *,
    quantize: str = "none",
    batch: int | None = None,
    calibration: Samples | None = None,
) -> bytes:
    """A plain network as a TFLite file `(x, t) → output`, float32 inputs and output.

    A model with classes has a third input, `labels`, int32.

    Args:
        subnet: a `SlimmableUNet` with one width.
        quantize: "none" (float32), "float16" (weights), "dynamic" (int8 weights, activations
            quantised as they come) or "int8" (int8 weights and activations, ranges from
            `calibration`; the timestep's sinusoids, group normalisation and attention's products
            stay float32). "dynamic-mixed" and "int8-mixed" keep the first and the last convolution
            float32.
        batch: images a call, fixed in the file; None leaves it free.
        calibration: what `calibration_samples` gave for this width; for int8 only.

    Raises:
        InputError: `quantize` is unknown, `batch` is below 1, int8 comes without samples, or an
            operator is not built in.
    """
    check_quantize(quantize)
    if batch is not None and batch < 1:
        raise invalid("batch", batch, "must be at least 1, or None for any")
    if needs_calibration(quantize) and calibration is None:
        rule = "needs `calibration`, the samples that `calibration_samples` draws"
        raise invalid("quantize", quantize, rule)
    float16 = quantize == "float16"
    data = _from_tensorflow(subnet, batch, optimized=float16, float16=float16)
    if quantize.startswith(("dynamic", "int8")):
        from ddsm_tf.export.quantization import quantized

        data = quantized(data, quantize, calibration)
    return built_in(data)


def convert_rounded(network: Any) -> bytes:
    """A network whose graph rounds as int8 does (after QAT) as a TFLite file with int8 kernels.

    Args:
        network: callable `(x, t) → noise` with an `image_shape`.

    Raises:
        InputError: an operator is not built in.
    """
    return built_in(_from_tensorflow(network, None, optimized=True))


def built_in(data: bytes) -> bytes:
    """A TFLite file, if it has built-in operators only; else `InputError`."""
    foreign = foreign_operators(data)
    if foreign:
        raise InputError(f"the network needs operators that TFLite has not built in: {foreign}")
    return data


def check_quantize(quantize: str) -> None:
    """Raise `InputError` unless it is one of `QUANTIZE`."""
    if quantize not in QUANTIZE:
        raise invalid("quantize", quantize, f"must be one of {', '.join(QUANTIZE)}")


def _from_tensorflow(
    subnet: Any, batch: int | None, *, optimized: bool, float16: bool = False
) -> bytes:
    # Weights as constants: TFLite would else keep variables, which its delegates do not take.
    with numbered_layers(subnet):
        function = denoiser_function(subnet, batch).get_concrete_function()
        graph = convert_variables_to_constants_v2(function)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if optimized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if float16:
        converter.target_spec.supported_types = [tf.float16]
    return converter.convert()


@contextmanager
def numbered_layers(subnet: Any) -> Iterator[None]:
    """Name the layers by their place in the network while its graph is made.

    Their names stand in the file, and Keras numbers layers through the whole process: a second
    export of the same network would have other bytes.
    """
    # What quantization-aware training gives is no Keras layer, and names its own.
    layers = list(subnet._flatten_layers()) if hasattr(subnet, "_flatten_layers") else []
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

    interpreter = Interpreter(model_content=data)
    names = {details["op_name"] for details in interpreter._get_ops_details()}
    return sorted(name for name in names if name.startswith(("Flex", "CUSTOM", "Custom")))


class Delegation(NamedTuple):
    """Who runs a TFLite file on this CPU.

    Attributes:
        partitions: parts that XNNPACK took; 1 is best.
        left_over: operator → how many of it LiteRT runs by itself, between the parts.
    """

    partitions: int
    left_over: Mapping[str, int]


def delegation(data: bytes, batch: int | None = None) -> Delegation:
    """How XNNPACK takes a TFLite file.

    Args:
        data: the file.
        batch: resize it to so many images first; for a file whose batch is free.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data)
    for details in interpreter.get_input_details() if batch else ():
        interpreter.resize_tensor_input(details["index"], (batch, *details["shape"][1:]))
    interpreter.allocate_tensors()
    # The list keeps the operators that were replaced, and the delegates stand at its end: what runs
    # is what the output needs, where the last maker of a tensor counts.
    operators = interpreter._get_ops_details()
    makers = {tensor: operator for operator in operators for tensor in operator["outputs"]}
    running: dict[int, str] = {}
    waiting = [interpreter.get_output_details()[0]["index"]]
    while waiting:
        maker = makers.get(waiting.pop())
        if maker and maker["index"] not in running:
            running[maker["index"]] = maker["op_name"]
            waiting += maker["inputs"].tolist()
    counts = Counter(running.values())
    return Delegation(counts.pop("DELEGATE", 0), counts)
