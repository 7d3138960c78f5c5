"""The training program: data, model, `fit`, and the callbacks that keep a run safe and visible."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.models import Adam, DiffusionModel, LinearWarmup
from ddsm_tf.training.callbacks import Checkpointer, LossLog, SampleGrids, StepBar
from ddsm_tf.training.checkpoints import Checkpoints
from ddsm_tf.training.config import RunConfig
from ddsm_tf.training.data import ImageSet
from ddsm_tf.training.flat_config import FlatConfig
from ddsm_tf.training.latents import ADOPTED, adopt_autoencoder
from ddsm_tf.training.pipeline import training_pipeline
from ddsm_tf.training.run import Run
from ddsm_tf.training.run_folder import CACHES, RunFolder, holds_no_run
from ddsm_tf.training.strategy import Placement, restart_after, restarts_left

AnyRun = TypeVar("AnyRun", bound=RunFolder)
WAIT_SECONDS = 120


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after a checkpoint."""


def open_run(out: str | os.PathLike, config: RunConfig, *, resume: bool) -> Run:
    """A new run, or the old one to go on with.

    A run may be resumed with more `steps`; every other field must be as it was.

    Raises:
        InputError: the folder exists and `resume` is false, the configuration changed, or there
            are fewer steps than before.
    """
    run = open_or_resume(Run, out, config, resume)
    if config.autoencoder and not (run.path / last_file_of(config)).exists():
        adopt_autoencoder(config.autoencoder, run.autoencoder_path)
    return run


@contextlib.contextmanager
def withdrawn_on_bad_input(out: str | os.PathLike) -> Iterator[None]:
    """Leave no new run behind whose first training is refused, only what it cached of its data.

    Or the corrected command would be refused for the sake of the wrong one's `config.json`.
    """
    path = Path(out)
    existed = path.exists()
    is_new = not existed or (path.is_dir() and holds_no_run(path))
    try:
        yield
    except InputError:
        if is_new and path.is_dir() and not Checkpoints(path / "checkpoints").steps():
            for item in path.iterdir():
                if item.name not in CACHES:
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
            if not existed and not any(path.iterdir()):
                path.rmdir()
        raise


def last_file_of(config: RunConfig) -> str:
    """What `open_run` makes last in a run folder."""
    return f"autoencoder/{ADOPTED[-1]}" if config.autoencoder else "config.json"


def open_shared_run(
    out: str | os.PathLike,
    config: RunConfig,
    opened: Callable[[], Run],
    placement: Placement,
    last_file: str,
) -> Run:
    """The run of one of several workers: the chief opens it, the others wait for it.

    Args:
        out: the run folder.
        config: of the run, as every worker was told.
        opened: opens or makes it.
        placement: of this worker.
        last_file: what is there once the folder is made.

    Raises:
        InputError: as `opened` does; or the folder does not appear.
    """
    if placement.is_chief:
        return opened()
    path, deadline = Path(out) / last_file, time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            rule = f"did not appear in {WAIT_SECONDS} s; every worker must see the chief's folder"
            raise invalid("--out", str(out), rule)
        time.sleep(0.2)
    # Not as the folder has it: the chief may be about to write more steps there.
    return Run(Path(out), config)


def train_placed(run: Run, placement: Placement) -> None:
    """`train`; when another worker is lost, this one starts again from the last checkpoint."""
    if placement.workers == 1:
        train(run, placement)
        return
    import tensorflow as tf

    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError)
    lost += (tf.errors.CancelledError, tf.errors.DeadlineExceededError)
    lost += (tf.errors.FailedPreconditionError, RuntimeError)
    try:
        train(run, placement)
    except lost as error:
        restart_after(error, restarts_left())


def open_or_resume(
    kind: type[AnyRun], out: str | os.PathLike, config: FlatConfig, resume: bool
) -> AnyRun:
    """`open_run` of any kind of run folder."""
    if not resume or not (Path(out) / "config.json").exists():
        return kind.create(out, config)
    run = kind.open(out)
    for field in dataclasses.fields(config):
        old, new = getattr(run.config, field.name), getattr(config, field.name)
        if old != new and field.name != "steps":
            rule = f"differs from the run's {old!r}; resume with the settings it was started with"
            raise invalid(field.name, new, rule)
    if config.steps < run.config.steps:
        rule = f"must be at least the run's {run.config.steps}: it was started for so many"
        raise invalid("steps", config.steps, rule)
    if config.steps > run.config.steps:
        config.save(run.path / "config.json")
    return kind(run.path, config)


def train(run: Run, placement: Placement | None = None) -> DiffusionModel:
    """Train a run to its last step, from its newest checkpoint where there is one.

    Args:
        run: a run; with several workers they must all see its folder.
        placement: the devices; one if left out.

    Returns:
        The model with averaged weights, as saved to `weights.keras`.

    Raises:
        InputError: the data or a checkpoint cannot be used.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    config = run.config
    images = run.load_split()[0]
    keras.utils.set_random_seed(config.seed % 2**32)
    keras.config.set_dtype_policy(config.mixed_precision)
    placement = placement or Placement()
    placement.check_batch(config.batch_size)
    with placement.scope():
        model = run.model_to_train()
        model.compile(make_optimizer(config), jit_compile=uses_xla(config))
        model.optimizer.build(model.trainable_variables)
    checkpoints = run.checkpoints
    first_step = checkpoints.restore_latest(state_variables(model))
    if first_step < config.steps:
        _fit(run, model, images, checkpoints, first_step, placement)
    if placement.is_chief:
        with model.averaged_weights():
            run.save_weights(model)
    return run.load_model()


def make_optimizer(config: Any) -> Adam:
    """Adam with warm-up, decay, moving average and clipping as the configuration says."""
    if config.learning_rate_decay == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            config.learning_rate / max(config.warmup_steps, 1),
            max(config.steps - config.warmup_steps, 1),
            alpha=0.05,
            warmup_target=config.learning_rate,
            warmup_steps=config.warmup_steps,
        )
    else:
        rate = LinearWarmup(config.learning_rate, config.warmup_steps)
    return Adam(
        rate, use_ema=True, ema_momentum=config.ema_momentum, global_clipnorm=config.clip_norm
    )


def uses_xla(config: Any) -> bool:
    """Whether XLA compiles steps: as the configuration says, and always under JAX.

    JAX has no graphs of its own: what XLA does not compile runs operation by operation.
    """
    return config.jit_compile or keras.backend.backend() == "jax"


def state_variables(model: keras.Model) -> list[Any]:
    """Everything that must be kept for training to go on as if it had never stopped."""
    return [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
    ]


def _fit(
    run: Run,
    model: DiffusionModel,
    images: ImageSet,
    checkpoints: Checkpoints,
    first_step: int,
    placement: Placement,
) -> None:
    config = run.config
    # Latents are mirrored as they are encoded.
    mirrored = bool(config.autoencoder) and config.horizontal_flip
    labels = images.labels if config.num_classes else None
    if mirrored and labels is not None:
        labels = np.concatenate([labels, labels])
    batches = training_pipeline(
        run.denoised(images.images, mirrored=mirrored),
        labels=labels,
        batch_size=config.batch_size,
        seed=config.seed,
        first_step=first_step,
        steps=config.steps,
        flip=config.horizontal_flip and not mirrored,
        strategy=placement.strategy,
    )
    grids = SampleGrids(run, first_step, config.sample_every if placement.is_chief else 0)
    fit_with_checkpoints(run, model, batches, checkpoints, first_step, grids, placement)


def fit_with_checkpoints(
    run: Any,
    model: Any,
    batches: Iterable[tuple],
    checkpoints: Checkpoints,
    first_step: int,
    grids: keras.callbacks.Callback,
    placement: Placement | None = None,
) -> None:
    """`fit` from one step to the last, with logs, pictures, checkpoints and a progress bar.

    Args:
        run: has `path`, `config` and `save_weights`.
        model: compiled; see `AveragedWeights`.
        batches: of steps first_step … steps - 1.
        checkpoints: of the run.
        first_step: how many steps are done.
        grids: a callback that writes pictures.
        placement: the devices; one if left out.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    config, placement = run.config, placement or Placement()
    # A worker that stops alone would leave the others waiting: there a signal acts as usual.
    with stop_flag() if placement.workers == 1 else contextlib.nullcontext([]) as stop:
        checkpointer = Checkpointer(
            run,
            checkpoints,
            state_variables(model),
            first_step,
            config.checkpoint_every,
            stop,
            writes=placement.is_chief,
        )
        log = LossLog(run.path / "logs", first_step, config.log_every, placement, config.batch_size)
        callbacks = [
            log,
            grids,
            checkpointer,
            StepBar(first_step, config.steps),
        ]
        # One epoch of all steps: epochs mean nothing here, and the iterator is made once.
        model.fit(
            batches,
            steps_per_epoch=config.steps - first_step,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    # `fit` ends by writing the average over the weights; the last checkpoint has them raw.
    checkpoints.restore_latest(state_variables(model))
    if checkpointer.stopped_at is not None:
        raise Interrupted(f"stopped at step {checkpointer.stopped_at}; go on with --resume")


@contextlib.contextmanager
def stop_flag() -> Iterator[list[bool]]:
    """A list that turns non-empty when SIGINT or SIGTERM comes; a second signal acts as usual."""
    stop: list[bool] = []
    previous = {}

    def request(number: int, frame: Any) -> None:
        stop.append(True)
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)

    # Signals can be caught in the main thread alone; elsewhere they act as usual.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
