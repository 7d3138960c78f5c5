"""What a model must know of `tf.distribute`; one replica under every other backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras


def _replica_context() -> Any:
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return tf.distribute.get_replica_context()


def replica_count() -> int:
    """Replicas that train in step."""
    context = _replica_context()
    return context.num_replicas_in_sync if context else 1


def strategy_replicas() -> int:
    """Replicas of the strategy in force; may be asked outside of a training step."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_index() -> Any:
    """This replica's place in the global batch: int or int32 scalar tensor."""
    context = _replica_context()
    return context.replica_id_in_sync_group if context else 0


def sum_over_replicas(values: Sequence[Any]) -> list[Any]:
    """Each tensor summed over all replicas. Call it only where `replica_count()` > 1."""
    import tensorflow as tf

    return _replica_context().all_reduce(tf.distribute.ReduceOp.SUM, list(values))


def runs_on_several_hosts() -> bool:
    """Whether the strategy in force spans more than one process."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and (
        strategy.extended._in_multi_worker_mode()
    )
