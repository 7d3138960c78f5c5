"""Keras callbacks of the training program."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_file
from ddsm_tf.images import save_images
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.checkpoints import Checkpoints
from ddsm_tf.training.progress import progress_bar
from ddsm_tf.training.run import Run
from ddsm_tf.training.strategy import Placement, peak_memory_gib

GRID_IMAGES = 36
GRID_STEPS = 25


class StepCallback(keras.callbacks.Callback):
    """A callback that knows the number of the step just done, across resumed runs."""

    def __init__(self, first_step: int) -> None:
        super().__init__()
        self.step = first_step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.step += 1
        self.after_step(logs or {})

    def after_step(self, logs: dict[str, Any]) -> None:
        """Called after each step; `self.step` steps are done."""
        raise NotImplementedError

    def sync(self) -> None:
        """Make the model's variables hold their present values; JAX keeps them elsewhere."""
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()


class LossLog(StepCallback):
    """Mean losses of every `every` steps: `history.jsonl`, and TensorBoard where it is installed.

    Raises:
        InputError: the loss is no longer a finite number.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        every: int,
        placement: Placement | None = None,
        batch_size: int = 1,
    ) -> None:
        super().__init__(first_step)
        self.every = every
        self.placement = placement or Placement()
        self.images_per_device = batch_size / self.placement.replicas
        self.history = folder / "history.jsonl"
        self.writer = None
        if self.placement.is_chief:
            folder.mkdir(parents=True, exist_ok=True)
            keep_history_until(self.history, first_step)
            self.writer = _summary_writer(folder)
        self.started, self.step_at_start = time.perf_counter(), first_step

    def after_step(self, logs: dict[str, Any]) -> None:
        if self.step % self.every:
            return
        self.sync()
        losses = self._means(logs)
        if not math.isfinite(losses["loss"]):
            rule = f"gave a loss of {losses['loss']} before step {self.step}; use a smaller one"
            raise invalid("learning_rate", float(self.model.optimizer.learning_rate), rule)
        self.model.reset_metrics()
        now = time.perf_counter()
        seconds = (now - self.started) / (self.step - self.step_at_start)
        entry = {
            "step": self.step,
            **losses,
            "seconds_per_step": seconds,
            "images_per_second_per_device": self.images_per_device / seconds,
            "peak_memory_gib": peak_memory_gib(),
        }
        self.started, self.step_at_start = now, self.step
        if not self.placement.is_chief:
            return
        with open(self.history, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._to_tensorboard(losses)

    def _means(self, logs: dict[str, Any]) -> dict[str, float]:
        """Mean losses since the last entry, of the widths that were trained since."""
        if self.placement.replicas > 1:
            # Each device has counts of its own; what `fit` reports is of all. An untrained width's
            # mean is exactly zero there.
            means = {name: float(np.mean(value)) for name, value in logs.items()}
            return {name: value for name, value in means.items() if value != 0.0}
        means = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        counts = {name: float(t.count) for name, t in _trackers(self.model).items()}
        return {name: value for name, value in means.items() if counts.get(name, 1.0) > 0}

    def _to_tensorboard(self, losses: dict[str, float]) -> None:
        if self.writer is None:
            return
        import tensorflow as tf

        with self.writer.as_default(step=self.step):
            for name, value in losses.items():
                tf.summary.scalar(name, value)
            tf.summary.scalar("learning_rate", float(self.model.optimizer.learning_rate))
        self.writer.flush()


def _trackers(model: Any) -> dict[str, Any]:
    return {tracker.name: tracker for tracker in model.loss_trackers.values()}


def _summary_writer(folder: Path) -> Any:
    try:
        import tensorflow as tf
    except ImportError:
        return None
    return tf.summary.create_file_writer(str(folder))


def read_history(path: Path) -> list[dict[str, float]]:
    """The entries of a `history.jsonl`; a last line cut short by a crash is left out."""
    entries = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return entries


def keep_history_until(path: Path, step: int) -> None:
    """Drop entries after `step`: a resumed run writes them again."""
    entries = [entry for entry in read_history(path) if entry["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


class SampleGrids(StepCallback):
    """A grid of images at the widest and the narrowest width every `every` steps.

    A run that is tuned for a schedule samples with that.
    """

    def __init__(self, run: Run, first_step: int, every: int) -> None:
        super().__init__(first_step)
        self.run = run
        self.every = every

    def after_step(self, logs: dict[str, Any]) -> None:
        if not self.every or self.step % self.every:
            return
        self.sync()
        with self.model.averaged_weights():
            for name, schedule in self._schedules():
                images = self.model.sample(schedule, GRID_IMAGES, seed=self.run.config.seed)
                file = f"step_{self.step:08d}_{name}.png"
                save_images(images, self.run.path / "samples" / file)

    def _schedules(self) -> Iterator[tuple[str, StepSchedule]]:
        config = self.run.config
        if config.tuned_from:
            yield "schedule", self.run.tuned_schedule
            return
        steps = min(GRID_STEPS, config.train_timesteps)
        for width in {max(config.widths), min(config.widths)}:
            yield f"width_{width:g}", self.run.schedule(f"uniform:{width}", steps=steps)


class Checkpointer(StepCallback):
    """Checkpoints every `every` steps, at the end, and when `stop` turns non-empty."""

    def __init__(
        self,
        run: Any,
        checkpoints: Checkpoints,
        variables: Sequence[Any],
        first_step: int,
        every: int,
        stop: list[bool],
        *,
        writes: bool = True,
    ) -> None:
        super().__init__(first_step)
        self.writes = writes
        self.run = run
        self.checkpoints = checkpoints
        self.variables = variables
        self.every = every
        self.stop = stop
        self.stopped_at: int | None = None

    def after_step(self, logs: dict[str, Any]) -> None:
        last = self.step == self.run.config.steps
        if not (last or self.stop or self.step % self.every == 0):
            return
        self.sync()
        if self.writes:
            self.checkpoints.save(self.step, self.variables)
            with self.model.averaged_weights():
                self.run.save_weights(self.model)
        if self.stop and not last:
            self.stopped_at = self.step
            self.model.stop_training = True


class StepBar(StepCallback):
    """A progress bar with the time left."""

    def __init__(self, first_step: int, steps: int) -> None:
        super().__init__(first_step)
        self.bar = progress_bar(steps, "train", initial=first_step)

    def after_step(self, logs: dict[str, Any]) -> None:
        self.bar.update()

    def on_train_end(self, logs: Any = None) -> None:
        self.bar.close()
