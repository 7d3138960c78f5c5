"""Networks in LiteRT's interpreter: one width's denoiser, and the decoder of latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddsm_tf.errors import InputError, invalid, missing_extra
from ddsm_tf.labels import check_labels


class Input(NamedTuple):
    """An input of a TFLite file: the shape of one row, and its type."""

    row_shape: tuple[int, ...]
    dtype: type


class Graph:
    """A TFLite file of one output, for any number of rows.

    A file whose batch is free is resized to what it is called with. One whose batch is fixed runs
    as often as need be, and what its last batch lacks is filled up with blank rows.

    Args:
        content: the file. LiteRT checks that it is a well-formed flatbuffer and reads the weights
            from these bytes, so what was verified is what runs.
        name: what to call it in an error message.
        inputs: what it takes; they are told apart by rank and type, for converters change names.
        output_shape: of one row of what it gives, float32.
        threads: CPU threads; None leaves the number to LiteRT.
        batch: rows that the file takes at once; None for any number.

    Raises:
        InputError: the file is no such graph.
    """

    def __init__(
        self,
        content: bytes,
        name: str,
        inputs: Sequence[Input],
        output_shape: tuple[int, ...],
        threads: int | None = None,
        batch: int | None = None,
    ) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise missing_extra("ai_edge_litert", "edge") from error
        self._name, self._output_shape = name, output_shape
        self._row_shapes = [each.row_shape for each in inputs]
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            found = {
                (len(details["shape"]) - 1, np.dtype(details["dtype"])): details
                for details in self._interpreter.get_input_details()
            }
            (output,) = self._interpreter.get_output_details()
        except (ValueError, RuntimeError, KeyError) as error:
            raise self._broken(error) from error
        wanted = [(len(each.row_shape), np.dtype(each.dtype)) for each in inputs]
        if set(found) != set(wanted) or output["dtype"] != np.float32:
            kinds = ", ".join(f"{dtype} of rank {rank + 1}" for rank, dtype in wanted)
            raise invalid("file", name, f"must take {kinds}, and give float32")
        for key, row_shape in zip(wanted, self._row_shapes, strict=True):
            taken = tuple(map(int, found[key]["shape"][1:]))
            if taken != row_shape:
                raise invalid("file", name, f"takes images of {taken}, not {row_shape}")
        if found[wanted[0]]["shape_signature"][0] != (batch or -1):
            raise invalid("file", name, f"must take {batch or 'any number of'} images at once")
        self._places = [found[key]["index"] for key in wanted]
        self._output = output["index"]
        self._fixed_batch = batch
        self._batch = 0

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """The output of N rows, float32 (N, …)."""
        count = len(inputs[0])
        size = self._fixed_batch or count
        if count == size:
            return self._run(inputs)
        blank = -count % size
        filled = [np.pad(rows, [(0, blank)] + [(0, 0)] * (rows.ndim - 1)) for rows in inputs]
        parts = [slice(first, first + size) for first in range(0, count + blank, size)]
        outputs = [self._run([rows[part] for rows in filled]) for part in parts]
        return np.concatenate(outputs)[:count]

    def prepare(self, count: int) -> None:
        """Make ready for so many rows at a time."""
        count = self._fixed_batch or count
        if count == self._batch:
            return
        try:
            for place, row_shape in zip(self._places, self._row_shapes, strict=True):
                self._interpreter.resize_tensor_input(place, (count, *row_shape))
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise self._broken(error) from error
        self._batch = count

    def _run(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        count = len(inputs[0])
        self.prepare(count)
        try:
            for place, rows in zip(self._places, inputs, strict=True):
                self._interpreter.set_tensor(place, np.ascontiguousarray(rows))
            self._interpreter.invoke()
            output = self._interpreter.get_tensor(self._output)
        except (ValueError, RuntimeError) as error:
            raise self._broken(error) from error
        if output.shape != (count, *self._output_shape):
            rule = f"gives {output.shape} for images of {inputs[0].shape}"
            raise invalid("file", self._name, rule)
        return output

    def _broken(self, error: Exception) -> InputError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        kinds = "(x, t)" if len(self._row_shapes) > 1 else "latents"
        return InputError(f"`file` (={self._name!r}) is no network of {kinds}: {reason}")


class Network:
    """One width's network, `(x, t) → output` or `(x, t, labels) → output`.

    Args:
        content, name, threads, batch: see `Graph`.
        image_shape: (H, W, C) of what it denoises.
        num_classes: of a model with classes; else 0.

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
        num_classes: int = 0,
    ) -> None:
        self._num_classes = num_classes
        inputs = [Input(image_shape, np.float32), Input((), np.float32)]
        if num_classes:
            inputs.append(Input((), np.int32))
        self._graph = Graph(content, name, inputs, image_shape, threads, batch)

    def __call__(
        self, x: np.ndarray, t: int | np.ndarray, labels: np.ndarray | None = None
    ) -> np.ndarray:
        """The output for x, float32 (N, H, W, C), at timestep t, a scalar or (N,).

        Models with classes need `labels`, int32 (N,) in [0, num_classes].

        Raises:
            InputError: the labels do not fit.
        """
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        inputs = [np.asarray(x, np.float32), timesteps]
        if (labels is None) == bool(self._num_classes):
            rule = f"must be given to a model with classes only; it has {self._num_classes}"
            raise invalid("labels", labels, rule)
        if labels is not None:
            # A wrong one would have the interpreter read beside its table.
            inputs.append(check_labels(labels, len(x), self._num_classes))
        return self._graph(*inputs)

    def prepare(self, count: int) -> None:
        """Make ready for so many images at a time."""
        self._graph.prepare(count)


class Decoder:
    """The decoder of latents, `latents → images`.

    Args:
        content, name, threads, batch: see `Graph`.
        latent_shape: (h, w, c) of what the networks denoise.
        image_shape: (H, W, C).

    Raises:
        InputError: the file is no such decoder.
    """

    def __init__(
        self,
        content: bytes,
        name: str,
        latent_shape: tuple[int, int, int],
        image_shape: tuple[int, int, int],
        threads: int | None = None,
        batch: int | None = None,
    ) -> None:
        inputs = [Input(latent_shape, np.float32)]
        self._graph = Graph(content, name, inputs, image_shape, threads, batch)

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Images, float32 (N, H, W, C) about [-1, 1], of latents, float32 (N, h, w, c)."""
        return self._graph(np.asarray(latents, np.float32))
