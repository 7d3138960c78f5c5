"""Runs that go on from another run's network, for one schedule: configuration and folder."""

from __future__ import annotations

import dataclasses
import os

from ddsm_tf.errors import invalid
from ddsm_tf.files import copy_file
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.training.config import RunConfig
from ddsm_tf.training.latents import adopt_autoencoder
from ddsm_tf.training.run import Run
from ddsm_tf.training.train import open_or_resume

# What is left of a rate that has trained the network before, and of its steps.
RATE_SHARE = 0.5
STEPS_SHARE = 1 / 3
# The last file of a folder that is being made.
LAST_FILE = "tuning/schedule.json"
# What the network's weights depend on.
FIXED = (
    "image_size",
    "channels",
    "base_channels",
    "channel_multipliers",
    "attention_resolutions",
    "blocks_per_level",
    "widths",
    "autoencoder",
    "num_classes",
    "noise_schedule",
    "train_timesteps",
    "beta_start",
    "beta_end",
    "sigma_min",
    "sigma_max",
    "prediction",
    "data_std",
)


def tuned_config(source: Run) -> RunConfig:
    """The configuration that the tuning of a run's network starts from.

    It is the run's, with half of its learning rate, a third of its steps, and without
    distillation, which has no meaning where a step trains one width.
    """
    return dataclasses.replace(
        source.config,
        tuned_from=str(source.path),
        learning_rate=source.config.learning_rate * RATE_SHARE,
        steps=max(1, round(source.config.steps * STEPS_SHARE)),
        distillation=0.0,
    )


def check_tuned_config(config: RunConfig, source: Run) -> None:
    """Check that a configuration can go on from a run's network.

    Raises:
        InputError: it changes what the network's weights depend on, or asks for distillation.
    """
    for name in FIXED:
        asked, fixed = getattr(config, name), getattr(source.config, name)
        if asked != fixed:
            rule = f"is fixed by the network that is tuned: {fixed!r}"
            raise invalid("--set", f"{name}={asked}", rule)
    if config.distillation:
        rule = "must be 0: a step of tuning trains one width, which has none to imitate"
        raise invalid("distillation", config.distillation, rule)


def open_tuned_run(
    out: str | os.PathLike,
    config: RunConfig,
    source: Run,
    schedule: StepSchedule,
    *,
    resume: bool,
) -> Run:
    """A new tuned run, or the old one to go on with.

    The folder gets copies of the network it starts from, its schedule, which is also what the run
    samples with, and the classifier and autoencoder, so that it needs no other folder.

    Raises:
        InputError: the folder exists and `resume` is false, the configuration or the schedule
            changed, the source has no weights, or see `check_tuned_config`.
    """
    check_tuned_config(config, source)
    if not source.weights_path.is_file():
        raise invalid("RUN", str(source.path), "has no weights yet; see `ddsm train`")
    run = open_or_resume(Run, out, config, resume)
    begun = run.path / LAST_FILE
    if begun.exists():
        if run.tuned_schedule != schedule:
            rule = f"is another than the one in {begun}; resume with the same"
            raise invalid("--schedule", schedule.describe(), rule)
        return run
    run.tuning_path.mkdir(exist_ok=True)
    for copy, original in (
        (run.tuning_path / "config.json", source.path / "config.json"),
        (run.tuning_path / "weights.keras", source.weights_path),
        (run.path / "classifier.keras", source.path / "classifier.keras"),
    ):
        if original.exists():
            copy_file(original, copy)
    if config.autoencoder:
        adopt_autoencoder(str(source.autoencoder_path), run.autoencoder_path)
    schedule.save(run.schedule_path)
    schedule.save(begun)
    return run


def schedule_to_tune_for(source: Run, choice: str | None) -> StepSchedule:
    """The schedule that was named, or the one that a search chose.

    Raises:
        InputError: none was named and no search has run, or it does not fit the run.
    """
    if choice is None and not source.schedule_path.exists():
        rule = "has no schedule to tune for; run `ddsm search` first, or give --schedule"
        raise invalid("RUN", str(source.path), rule)
    return source.schedule(choice)
