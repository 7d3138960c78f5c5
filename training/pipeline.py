"""Batches whose order is a pure function of the seed: resumable, and split among workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.images import to_float

PREFETCHED = 4


class TrainingBatches:
    """The batch of every training step.

    Every epoch visits each image once in an order of its own; a batch may span two epochs. A batch
    depends on the seed and the step only, so a run that is resumed at any step sees the images
    that an uninterrupted one sees, and workers see their own rows of the same global batch.

    Args:
        images: uint8 (N, H, W, C), or latents float32; anything that integers (B,) index.
        batch_size: of the global batch.
        seed: fixes orders and flips.
        flip: mirror half of the images.
        labels: integers (N,), or None.
        shard: (index, count) of a worker, which gets the rows [index · B / count, …) of a batch.

    Raises:
        InputError: the workers cannot share a batch evenly.
    """

    def __init__(
        self,
        images: Any,
        *,
        batch_size: int,
        seed: int,
        flip: bool,
        labels: np.ndarray | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        index, count = shard
        if batch_size % count:
            raise invalid("batch_size", batch_size, f"must be divisible by the {count} workers")
        self.images, self.labels = images, labels
        self.batch_size, self.seed, self.flip = batch_size, seed, flip
        self.rows = slice(index * batch_size // count, (index + 1) * batch_size // count)
        # A batch may span epochs; each order is drawn once and not for every step.
        self._order = lru_cache(maxsize=4)(self._new_order)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """The batch of a step: float32 (B, H, W, C) in [-1, 1], and int32 labels where known."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]
        epochs, places = np.divmod(positions, len(self.images))
        rows = np.array([self._order(e)[p] for e, p in zip(epochs, places, strict=True)])
        batch = self.images[rows]
        # Latents are floats already.
        batch = to_float(batch) if batch.dtype == np.uint8 else np.array(batch)
        if self.flip:
            chance = np.random.default_rng([self.seed, 1, step]).random(self.batch_size)
            mirrored = chance[self.rows] < 0.5
            batch[mirrored] = batch[mirrored, :, ::-1]
        return batch if self.labels is None else (batch, self.labels[rows].astype(np.int32))

    def _new_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))


def training_batches(
    images: Any, *, first_step: int, steps: int, **options: Any
) -> Iterator[tuple]:
    """Batches of steps first_step … steps - 1; see `TrainingBatches` for the options.

    Yields:
        Tuples of one element, as Keras wants them: the images, or the pair of images and labels.
    """
    batch_of = TrainingBatches(images, **options)
    return ((batch_of(step),) for step in range(first_step, steps))


def training_pipeline(
    images: Any, *, first_step: int, steps: int, strategy: Any = None, **options: Any
) -> Iterable[tuple]:
    """`training_batches`, made ahead of their use.

    A `tf.data.Dataset` under TensorFlow; a generator over a thread elsewhere. Both give the same
    batches. Under a `tf.distribute.Strategy`, a data set that gives each device its own rows.
    """
    if strategy is not None:

        def rows_of(context: Any) -> Any:
            local = strategy.num_replicas_in_sync // context.num_input_pipelines
            shards = [
                TrainingBatches(
                    images,
                    **options,
                    shard=(context.input_pipeline_id * local + k, strategy.num_replicas_in_sync),
                )
                for k in range(local)
            ]
            # The devices of a worker take its elements in turn.
            return _dataset(
                lambda n: shards[n % local](n // local), first_step * local, steps * local
            )

        return strategy.distribute_datasets_from_function(rows_of)
    # Here, for commands read a run before TensorFlow has been told to be quiet.
    import keras

    batch_of = TrainingBatches(images, **options)
    if keras.backend.backend() == "tensorflow":
        return _dataset(batch_of, first_step, steps)
    return _ahead((batch_of(step),) for step in range(first_step, steps))


def _dataset(batch_of: Callable[[int], Any], first_step: int, steps: int) -> Any:
    import tensorflow as tf

    example = batch_of(first_step)
    with_labels = isinstance(example, tuple)
    arrays = example if with_labels else (example,)

    def make(step: tf.Tensor) -> Any:
        def run(step: np.ndarray) -> Any:
            made = batch_of(int(step))
            return list(made) if with_labels else [made]

        made = tf.numpy_function(run, [step], [array.dtype for array in arrays])
        shaped = [tf.ensure_shape(t, a.shape) for t, a in zip(made, arrays, strict=True)]
        return (tuple(shaped) if with_labels else shaped[0],)

    numbers = tf.data.Dataset.range(first_step, steps)
    # Two at a time, given in order: making a batch may wait for a disk.
    return numbers.map(make, num_parallel_calls=2, deterministic=True).prefetch(PREFETCHED)


def _ahead(batches: Iterator[tuple]) -> Iterator[tuple]:
    """The same, computed by a thread while the last ones are in use."""
    ready: queue.Queue = queue.Queue(PREFETCHED)
    done = threading.Event()

    def work() -> None:
        try:
            for batch in batches:
                while not done.is_set():
                    try:
                        ready.put((batch, None), timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if done.is_set():
                    return
            ready.put((None, StopIteration()))
        except Exception as error:  # whatever it is, the consumer must see it
            ready.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch
    finally:
        done.set()
