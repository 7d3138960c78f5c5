"""Sampling from a bundle with LiteRT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ddsm_tf.edge.bundle import Bundle
from ddsm_tf.errors import InputError, invalid, missing_extra
from ddsm_tf.sampling import sample_images
from ddsm_tf.schedule import StepSchedule


class EdgeSampler:
    """Samples images from a bundle; each width's network loads when a step first needs it.

    Args:
        bundle: what `Bundle.load` gave.
        threads: CPU threads of the interpreter; None leaves it to LiteRT.

    Example:
        >>> images = EdgeSampler(Bundle.load("bundle")).sample(16, seed=0)   # uint8 (16, H, W, C)
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise invalid("threads", threads, "must be at least 1")
        self.bundle = bundle
        self.threads = threads
        self._networks: dict[float, _Network] = {}

    def denoise(self, x: np.ndarray, t: int | np.ndarray, width: float) -> np.ndarray:
        """ε for x, float32 (N, H, W, C), at timestep t, a scalar or (N,).

        Raises:
            InputError: the bundle has no such width, or its file is no such network.
        """
        return self.network(width)(x, t)

    def network(self, width: float) -> _Network:
        """The network of a width."""
        if width not in self.bundle.files:
            raise invalid("width", width, f"is not in the bundle; it has {list(self.bundle.files)}")
        if width not in self._networks:
            self._networks[width] = _Network(
                self.bundle.files[width], self.bundle.image_shape, self.threads
            )
        return self._networks[width]

    def sample(
        self,
        count: int,
        seed: int = 0,
        *,
        schedule: StepSchedule | None = None,
        batch_size: int = 16,
        on_step: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Sample images: those of `DiffusionModel.sample` with the same schedule and seed.

        Args:
            count: number of images N.
            seed: image i depends on seed and i only.
            schedule: None takes the bundle's.
            batch_size: images at a time; 1 needs the least memory.
            on_step: called after every step of every batch with the step's index.

        Returns:
            uint8 (N, H, W, C).

        Raises:
            InputError: the schedule has a width or a number of timesteps that is not the bundle's.
        """
        schedule = schedule or self.bundle.schedule
        schedule.check_model(self.bundle.files, self.bundle.noise_table.train_timesteps)
        return sample_images(
            self.denoise,
            schedule,
            self.bundle.noise_table,
            self.bundle.image_shape,
            count,
            seed=seed,
            batch_size=batch_size,
            on_step=on_step,
        )


class _Network:
    """One TFLite file, `(x, t) → noise`, for any number of images.

    A file whose batch is free is resized to what it is called with. One whose batch is fixed runs
    as often as need be, and what its last batch lacks is filled up with blank images.
    """

    def __init__(self, path: Any, image_shape: tuple[int, int, int], threads: int | None) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise missing_extra("ai_edge_litert", "edge") from error
        try:
            # A path, not bytes: LiteRT maps the file and needs no copy of it.
            self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
            inputs = {
                len(details["shape"]): details for details in self._interpreter.get_input_details()
            }
            self._x, self._t = inputs[4]["index"], inputs[1]["index"]
            self._output = self._interpreter.get_output_details()[0]["index"]
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"`file` (={path.name!r}) is no network of (x, t): {reason}"
            ) from error
        if tuple(inputs[4]["shape"][1:]) != image_shape:
            rule = f"takes images of {tuple(inputs[4]['shape'][1:])}, not {image_shape}"
            raise invalid("file", path.name, rule)
        self._batch = 0
        is_free = inputs[4]["shape_signature"][0] < 0
        self._fixed_batch = None if is_free else int(inputs[4]["shape"][0])

    def __call__(self, x: np.ndarray, t: int | np.ndarray) -> np.ndarray:
        timesteps = np.broadcast_to(np.asarray(t, np.float32), (len(x),))
        size = self._fixed_batch or len(x)
        blank = -len(x) % size
        if len(x) == size:
            return self._run(x, timesteps)
        x = np.pad(x, ((0, blank), (0, 0), (0, 0), (0, 0)))
        timesteps = np.pad(timesteps, (0, blank))
        parts = [slice(first, first + size) for first in range(0, len(x), size)]
        noise = np.concatenate([self._run(x[part], timesteps[part]) for part in parts])
        return noise[: len(noise) - blank]

    def _run(self, x: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        if len(x) != self._batch:
            self._resize(x.shape)
        self._interpreter.set_tensor(self._x, np.ascontiguousarray(x, np.float32))
        self._interpreter.set_tensor(self._t, np.ascontiguousarray(timesteps))
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output)

    def _resize(self, shape: tuple[int, ...]) -> None:
        self._interpreter.resize_tensor_input(self._x, shape)
        self._interpreter.resize_tensor_input(self._t, shape[:1])
        self._interpreter.allocate_tensors()
        self._batch = shape[0]
