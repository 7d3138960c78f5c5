"""One network on every runtime that the benchmarks compare, each as `denoise(x, t, width)`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from names import (
    KERAS,
    KERAS_XLA,
    LITERT,
    LITERT_INT8,
    SAVEDMODEL,
    SAVEDMODEL_XLA,
    TORCH,
    TORCH_COMPILED,
)

from ddsm_tf.console import without_stderr
from ddsm_tf.edge.network import Network
from ddsm_tf.files import atomic_file
from ddsm_tf.models.compiled import CompiledDenoiser
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule, width_name
from ddsm_tf.serving.inputs import schedule_inputs

Denoise = Callable[[np.ndarray, Any, float], np.ndarray]

OURS = (KERAS, KERAS_XLA, SAVEDMODEL, SAVEDMODEL_XLA, LITERT, LITERT_INT8)
PEERS = (TORCH, TORCH_COMPILED)
QUANTIZE = {LITERT: "none", LITERT_INT8: "dynamic"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every program that times runtimes."""
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10", help="its architecture (cifar10)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", help="of the machine, if it gets a file of its own")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/speed"),
        help="keeps exports; delete it when the model changes",
    )


class Runtimes:
    """Makes runtimes of a network, each from the same weights.

    Args:
        unet: a `SlimmableUNet` without classes.
        folder: where exports are written, and found again.
        threads: CPU threads of each.
    """

    def __init__(self, unet: Any, folder: Path, threads: int) -> None:
        self.unet = unet
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.threads = threads
        self.noise_table = NoiseTable.linear(1000)

    def make(self, names: Sequence[str], batch: int) -> dict[str, Denoise]:
        """Name → denoiser for so many images at a time."""
        return {name: self._make(name, batch) for name in names}

    def _make(self, name: str, batch: int) -> Denoise:
        if name in (KERAS, KERAS_XLA):
            return CompiledDenoiser(self.unet, xla=name == KERAS_XLA)
        if name in (SAVEDMODEL, SAVEDMODEL_XLA):
            return self._savedmodel(xla=name == SAVEDMODEL_XLA)
        if name in QUANTIZE:
            return self._litert(QUANTIZE[name], batch)
        return torch_denoiser(self.unet, self.threads, compiled=name == TORCH_COMPILED)

    def _savedmodel(self, *, xla: bool) -> Denoise:
        from ddsm_tf.export.savedmodel import SavedModelDenoiser, write_savedmodels

        folder = self.folder / ("savedmodel_xla" if xla else "savedmodel")
        if not folder.exists():
            without_stderr(lambda: write_savedmodels(self.unet, folder, xla=xla))
        return SavedModelDenoiser(folder)

    def savedmodel_sampler(
        self, batch: int, *, xla: bool = False
    ) -> Callable[[StepSchedule], np.ndarray]:
        """Samples a batch of images in one call of the sampler SavedModel."""
        import tensorflow as tf

        from ddsm_tf.export.savedmodel import write_sampler

        folder = self.folder / ("sampler_xla" if xla else "sampler")
        if not folder.exists():
            full = StepSchedule((0,), (1.0,))
            arguments = self.unet, self.noise_table, full, folder
            without_stderr(lambda: write_sampler(*arguments, xla=xla))
        signature = tf.saved_model.load(str(folder)).signatures["sample_schedule"]

        def sample(schedule: StepSchedule) -> np.ndarray:
            inputs = schedule_inputs(schedule, batch, seed=0)
            inputs = {name: tf.constant(value) for name, value in inputs.items()}
            return signature(**inputs)["images"].numpy()

        return sample

    def _litert(self, quantize: str, batch: int) -> Denoise:
        networks = {
            width: Network(
                self.tflite(width, quantize, batch).read_bytes(),
                f"{width:g}",
                self.unet.image_shape,
                self.threads,
                batch,
            )
            for width in self.unet.widths
        }
        return lambda x, t, width: networks[width](x, t)

    def tflite(self, width: float, quantize: str, batch: int) -> Path:
        """The TFLite file of a width for a fixed batch, written where it is not there yet."""
        from ddsm_tf.export.quantization import quantized
        from ddsm_tf.export.tflite import convert

        path = self.folder / f"{width_name(width)}-{quantize}-{batch}.tflite"
        if not path.exists():
            if quantize == "none":
                content = without_stderr(lambda: convert(self.unet.subnet(width), batch=batch))
            else:
                floats = self.tflite(width, "none", batch).read_bytes()
                content = quantized(floats, quantize, None)
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)
        return path


def torch_denoiser(unet: Any, threads: int, *, compiled: bool) -> Denoise:
    """The network in PyTorch, NumPy in and out; `compiled` by `torch.compile`."""
    import torch
    from torch_unet import TorchUNet

    torch.set_num_threads(threads)
    if compiled:
        # Of what was compiled for other sizes; past its limit it would quietly run eagerly.
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    networks = {}
    for width in unet.widths:
        # Channels last, as NumPy has them: PyTorch's faster layout here (7 to 12 % at full width).
        network = TorchUNet(unet.subnet(width)).eval().to(memory_format=torch.channels_last)
        networks[width] = torch.compile(network, dynamic=False) if compiled else network

    @torch.inference_mode()
    def denoise(x: np.ndarray, t: Any, width: float) -> np.ndarray:
        timesteps = torch.from_numpy(np.broadcast_to(np.float32(t), (len(x),)).copy())
        images = torch.from_numpy(np.asarray(x, np.float32)).permute(0, 3, 1, 2)
        return networks[width](images, timesteps).permute(0, 2, 3, 1).numpy()

    return denoise
