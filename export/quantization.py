"""Eight-bit weights and activations for a float32 TFLite file, with ai-edge-quantizer.

What stays float32 is named by the kind of its operators or by the class of its layer, so a recipe
holds for every network that the library can build. `docs/tflite.md` has the measurements.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from ai_edge_quantizer import qtyping
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.calibrator import Calibrator
from ai_edge_quantizer.quantizer import Quantizer
from ai_edge_quantizer.recipe_manager import RecipeManager

from ddsm_tf.console import debugging, without_stderr
from ddsm_tf.export.calibration import Samples

SIGNATURE = "serving_default"
# Calibration keeps every activation of a batch in memory: about a gigabyte for these pixels at the
# papers' CIFAR-10 size. Larger batches are quicker, for most of its work is per operator.
CALIBRATION_PIXELS = 8192

# The sinusoids of a rounded timestep are noise.
TIMESTEP = "(?i)timestep_?embedding"
# Means of squares span too much for eight bits, and XNNPACK has no integer reciprocal root.
NORMALISATION = "(?i)group_?norm"
# XNNPACK has no integer softmax, nor an integer product of two activations.
ATTENTION = "(?i)attention_?block"

Op = qtyping.TFLOperationName
ANYWHERE = ".*"


def quantized(data: bytes, quantize: str, samples: Samples | None = None) -> bytes:
    """A float32 TFLite file with eight-bit weights; inputs and output stay float32.

    Args:
        data: the file.
        quantize: "dynamic" or "int8", with "-mixed" to keep the first and the last convolution
            float32.
        samples: what the ranges of activations are taken from; "int8" needs them.
    """
    kind, _, mixed = quantize.partition("-")
    model = _with_signature(data)
    batch = _batch_of(model)
    recipe = _int8() if kind == "int8" else _dynamic()
    for name in end_convolutions(model) if mixed else ():
        _keep_float(recipe, f"^{re.escape(name)};", Op.CONV_2D)
    named = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    return _quietly(lambda: _quantize(named, recipe, samples, batch))


def _quietly(action: Callable[[], bytes]) -> bytes:
    """Without the quantiser's progress bars, its warnings and LiteRT's announcements."""
    if debugging():
        return action()
    with contextlib.redirect_stderr(io.StringIO()):
        return without_stderr(action)


def _dynamic() -> RecipeManager:
    """Weights of convolutions and dense layers; their inputs are quantised as they come."""
    recipe = RecipeManager()
    for operation in (Op.CONV_2D, Op.FULLY_CONNECTED):
        recipe.add_dynamic_config(ANYWHERE, operation, num_bits=8)
    _keep_float(recipe, NORMALISATION)
    return recipe


def _int8() -> RecipeManager:
    """Weights and activations of everything that XNNPACK computes in integers."""
    recipe = RecipeManager()
    recipe.add_static_config(ANYWHERE, Op.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for operation in (Op.INPUT, Op.OUTPUT, Op.BATCH_MATMUL, Op.SOFTMAX):
        _keep_float(recipe, ANYWHERE, operation)
    # The scores' scale lies between the two.
    _keep_float(recipe, ATTENTION, Op.MUL)
    _keep_float(recipe, TIMESTEP)
    # Its dense layers see sinusoids and not t: integer weights are as good there.
    recipe.add_dynamic_config(TIMESTEP, Op.FULLY_CONNECTED, num_bits=8)
    _keep_float(recipe, NORMALISATION)
    return recipe


def _keep_float(recipe: RecipeManager, scope: str, operation: Op = Op.ALL_SUPPORTED) -> None:
    recipe.add_quantization_config(scope, operation, algorithm_key=AlgorithmName.NO_QUANTIZE)


def _quantize(data: bytes, recipe: RecipeManager, samples: Samples | None, batch: int) -> bytes:
    quantizer = Quantizer(data, recipe.get_quantization_recipe())
    ranges = _ranges(data, recipe, samples, batch) if quantizer.need_calibration else None
    result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def _ranges(
    data: bytes, recipe: RecipeManager, samples: Samples, batch: int
) -> dict[str, qtyping.QSV]:
    """The range of every activation over all samples.

    The quantizer's own way, a running average of the ranges of batches, depends on the order and
    the size of batches; it cuts off what is rare, and the images are worse for it.
    """
    calibrator = Calibrator(data, num_threads=os.cpu_count() or 1, qsv_update_func=_widened)
    calibrator.calibrate({SIGNATURE: list(_batches(samples, batch))}, recipe)
    return calibrator.get_model_qsvs()


def _widened(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    if not known:
        return dict(found)
    return {
        "min": np.minimum(known["min"], found["min"]),
        "max": np.maximum(known["max"], found["max"]),
    }


def _batches(samples: Samples, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one size: the last is filled up with samples from the beginning."""
    count = -(-len(samples.t) // size) * size
    for rows in np.resize(np.arange(len(samples.t)), count).reshape(-1, size):
        labels = {} if samples.labels is None else {"labels": samples.labels[rows]}
        yield {"x": samples.x[rows], "t": samples.t[rows], **labels}


def end_convolutions(model: Any) -> list[str]:
    """The output names of the first convolutions after `x` and the last ones before the output."""
    graph = model.subgraphs[0]
    x = [index for index in graph.inputs if len(graph.tensors[index].shape) == 4]
    forwards = _nearest(model, x, "inputs", "outputs")
    backwards = _nearest(model, graph.outputs, "outputs", "inputs")
    ends = {id(operator): operator for operator in (*forwards, *backwards)}
    return [graph.tensors[end.outputs[0]].name.decode() for end in ends.values()]


def _nearest(model: Any, tensors: Any, near: str, far: str) -> list[Any]:
    """The convolutions that a walk from some tensors meets first."""
    found, waiting, seen = [], {int(index) for index in tensors}, set()
    while waiting:
        seen |= waiting
        met = [op for op in model.subgraphs[0].operators if waiting & set(getattr(op, near))]
        convolutions = [op for op in met if _is_convolution(model, op)]
        found += convolutions
        others = [op for op in met if not _is_convolution(model, op)]
        waiting = {int(index) for op in others for index in getattr(op, far)} - seen
    return found


def _is_convolution(model: Any, operator: Any) -> bool:
    code = model.operatorCodes[operator.opcodeIndex]
    return flatbuffer_utils.get_builtin_code_from_operator_code(code) == (
        schema.BuiltinOperator.CONV_2D
    )


def _batch_of(model: Any) -> int:
    """Images to calibrate with at a time: what the file says, or what memory allows."""
    graph = model.subgraphs[0]
    x = next(graph.tensors[i] for i in graph.inputs if len(graph.tensors[i].shape) == 4)
    batch, height, breadth, _ = map(int, x.shape)
    is_free = x.shapeSignature is not None and x.shapeSignature[0] < 0
    return max(1, CALIBRATION_PIXELS // (height * breadth)) if is_free else batch


def _with_signature(data: bytes) -> Any:
    """The file as an object that names its inputs and output, as calibration wants them."""
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    graph = model.subgraphs[0]
    names = {index: graph.tensors[index].name for index in graph.inputs}
    signature = schema.SignatureDefT()
    signature.signatureKey = SIGNATURE
    signature.subgraphIndex = 0
    signature.inputs = [_tensor_map(name, index) for index, name in names.items()]
    signature.outputs = [_tensor_map("noise", index) for index in graph.outputs]
    model.signatureDefs = [signature]
    return model


def _tensor_map(name: str | bytes, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry
