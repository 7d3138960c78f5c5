"""What the machine can do at best: a large matrix product and a typical convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MATMUL_SIDE = 2048
# 3 × 3, 256 → 256 channels at 32 × 32: what most of the work of a base-128 network looks like.
CHANNELS, SIDE, KERNEL = 256, 32, 3
MATMUL_MACS = MATMUL_SIDE**3
CONVOLUTION_MACS = SIDE**2 * KERNEL**2 * CHANNELS**2


def matmuls(threads: int) -> dict[str, Callable[[], Any]]:
    """Library → a float32 product of two large square matrices."""
    import tensorflow as tf
    import torch

    torch.set_num_threads(threads)
    a, b = _normal(2, MATMUL_SIDE, MATMUL_SIDE)
    tensors = tf.constant(a), tf.constant(b)
    torch_tensors = torch.from_numpy(a), torch.from_numpy(b)
    return {
        "NumPy": lambda: a @ b,
        "TensorFlow": lambda: tf.matmul(*tensors).numpy(),
        "PyTorch": lambda: torch.matmul(*torch_tensors),
    }


def convolutions(batch: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Library → the typical convolution of so many images, float32, without a bias."""
    x = _normal(batch, SIDE, SIDE, CHANNELS)
    kernel = _normal(KERNEL, KERNEL, CHANNELS, CHANNELS)
    return {
        "TensorFlow": _tensorflow(x, kernel),
        "LiteRT": _litert(x, kernel, threads),
        "PyTorch": _torch(x, kernel, threads),
    }


def _tensorflow(x: np.ndarray, kernel: np.ndarray) -> Callable[[], Any]:
    import tensorflow as tf

    inputs, weights = tf.constant(x), tf.constant(kernel)
    graph = tf.function(lambda inputs: tf.nn.conv2d(inputs, weights, 1, "SAME"))
    return lambda: graph(inputs).numpy()


def _litert(x: np.ndarray, kernel: np.ndarray, threads: int) -> Callable[[], Any]:
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    weights = tf.constant(kernel)
    signature = [tf.TensorSpec(x.shape, tf.float32)]
    graph = tf.function(lambda inputs: tf.nn.conv2d(inputs, weights, 1, "SAME"), signature)
    concrete = graph.get_concrete_function()
    content = tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert()
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    return interpreter.invoke


def _torch(x: np.ndarray, kernel: np.ndarray, threads: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    inputs = torch.from_numpy(x).permute(0, 3, 1, 2)
    weights = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    weights = weights.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def convolve() -> Any:
        return torch.nn.functional.conv2d(inputs, weights, padding="same")

    return convolve


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
