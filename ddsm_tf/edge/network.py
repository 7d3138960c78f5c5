"""One width's network in LiteRT's interpreter."""

from __future__ import annotations

import numpy as np

from ddsm_tf.errors import InputError, invalid, missing_extra


class Network:
    """A TFLite file `(x, t) → noise`, for any number of images.

    A file whose batch is free is resized to what it is called with. One whose batch is fixed runs
    as often as need be, and what its last batch lacks is filled up with blank images.

    Args:
        content: the file. LiteRT checks that it is a well-formed flatbuffer and reads the weights
            from these bytes, so what was verified is what runs.
        name: what to call it in an error message.
        image_shape: (H, W, C).
        threads: CPU threads; None leaves the number to LiteRT.
        batch: images that the file takes at once; None for any number.

    Raises:
        InputError: the file is no such network.
    """

    def __init__(
        self,
        content: bytes,
        name: str,
        image_shape: tuple[int, int, int],
        threads: int | None = None,
        batch: int | None = None,
    ) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise missing_extra("ai_edge_litert", "edge") from error
        self._name, self._image_shape = name, image_shape
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            inputs = {
                len(details["shape"]): details for details in self._interpreter.get_input_details()
            }
            self._x, self._t = inputs[4]["index"], inputs[1]["index"]
            (output,) = self._interpreter.get_output_details()
        except (ValueError, RuntimeError, KeyError) as error:
            raise self._broken(error) from error
        self._output = output["index"]
        taken = tuple(map(int, inputs[4]["shape"][1:]))
        if taken != image_shape:
            raise invalid("file", name, f"takes images of {taken}, not {image_shape}")
        if {details["dtype"] for details in (*inputs.values(), output)} != {np.float32}:
            raise invalid("file", name, "must take and give float32")
        if inputs[4]["shape_signature"][0] != (batch or -1):
            raise invalid("file", name, f"must take {batch or 'any number of'} images at once")
        self._fixed_batch = batch
        self._batch = 0

    def __call__(self, x: np.ndarray, t: int | np.ndarray) -> np.ndarray:
        """ε for x, float32 (N, H, W, C), at timestep t, a scalar or (N,)."""
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        size = self._fixed_batch or len(x)
        if len(x) == size:
            return self._run(x, timesteps)
        blank = -len(x) % size
        x = np.pad(x, ((0, blank), (0, 0), (0, 0), (0, 0)))
        timesteps = np.pad(timesteps, (0, blank))
        parts = [slice(first, first + size) for first in range(0, len(x), size)]
        noise = np.concatenate([self._run(x[part], timesteps[part]) for part in parts])
        return noise[: len(noise) - blank]

    def prepare(self, count: int) -> None:
        """Make ready for so many images at a time."""
        count = self._fixed_batch or count
        if count == self._batch:
            return
        try:
            self._interpreter.resize_tensor_input(self._x, (count, *self._image_shape))
            self._interpreter.resize_tensor_input(self._t, (count,))
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise self._broken(error) from error
        self._batch = count

    def _run(self, x: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        self.prepare(len(x))
        try:
            self._interpreter.set_tensor(self._x, np.ascontiguousarray(x, np.float32))
            self._interpreter.set_tensor(self._t, np.ascontiguousarray(timesteps))
            self._interpreter.invoke()
            output = self._interpreter.get_tensor(self._output)
        except (ValueError, RuntimeError) as error:
            raise self._broken(error) from error
        if output.shape != x.shape:
            raise invalid("file", self._name, f"gives {output.shape} for images of {x.shape}")
        return output

    def _broken(self, error: Exception) -> InputError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        return InputError(f"`file` (={self._name!r}) is no network of (x, t): {reason}")
