"""The configuration of a run: every number needed to rebuild it, as one flat, validated record."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.files import check_keys, read_json, write_json
from ddsm_tf.labels import MAX_CLASSES
from ddsm_tf.noise import PREDICTIONS
from ddsm_tf.schedule import MAX_GUIDANCE, SAMPLERS
from ddsm_tf.timesteps import SPACINGS

FORMAT = "ddsm-run"
VERSION = 1


@dataclass(frozen=True)
class RunConfig:
    """What `config.json` holds. Every field but `preset` can be set with `--set field=value`.

    Attributes:
        preset: name of the preset the run started from.
        data: image source; see `ddsm_tf.training.data`.
        image_size: side in pixels; images are resized and cropped to it.
        channels: 1 (grey) to 4 (RGBA).
        base_channels, channel_multipliers, attention_resolutions, blocks_per_level, widths,
            dropout: see `ddsm_tf.models.SlimmableUNet`.
        num_classes: of the data's labels; 0 trains without them.
        noise_schedule: "linear" (from `beta_start` to `beta_end`), "cosine", or "edm" (noise levels
            from `sigma_min` to `sigma_max`).
        train_timesteps: T of the noise table.
        prediction: what the network puts out, "epsilon", "v", "x0" or "edm"; `data_std` belongs to
            the last; see `ddsm_tf.NoiseTable`.
        weighting: of the timesteps' losses, "uniform" or "min_snr".
        label_dropout: share of labels left out in training, for guidance.
        middle_widths, distillation: see `ddsm_tf.models.DiffusionModel`.
        steps: training steps in all.
        batch_size: images a step, over all devices.
        learning_rate, warmup_steps: Adam's rate, and the steps of its linear rise.
        learning_rate_decay: "constant" or "cosine" (to 5 % of the rate at the last step).
        ema_momentum: of the moving average of the weights.
        clip_norm: global norm that gradients are clipped to.
        horizontal_flip: mirror half of the images.
        held_out_images: kept from training for the importance table; at most a tenth of all.
        mixed_precision: "float32" or "mixed_bfloat16".
        jit_compile: compile steps with XLA.
        checkpoint_every, log_every, sample_every: in steps; 0 turns sample grids off.
        seed: fixes the weights, the order of the data, noise and widths.
        sampler, sampling_steps, timestep_spacing, guidance_scale: of samples, search and evaluation
            unless told otherwise; see `ddsm_tf.StepSchedule` and `ddsm_tf.timesteps`.
        search_segments, search_trials, search_images: defaults of `ddsm search`.

    Raises:
        InputError: a value has the wrong type or leaves its range.
    """

    preset: str
    data: str
    image_size: int
    channels: int
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    attention_resolutions: tuple[int, ...] = (16,)
    blocks_per_level: int = 2
    widths: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    dropout: float = 0.0
    num_classes: int = 0
    noise_schedule: str = "linear"
    train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    prediction: str = "epsilon"
    data_std: float = 0.5
    weighting: str = "uniform"
    label_dropout: float = 0.1
    middle_widths: int = 1
    distillation: float = 0.0
    steps: int = 100_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    warmup_steps: int = 1000
    learning_rate_decay: str = "constant"
    ema_momentum: float = 0.999
    clip_norm: float = 1.0
    horizontal_flip: bool = False
    held_out_images: int = 256
    mixed_precision: str = "float32"
    jit_compile: bool = False
    checkpoint_every: int = 1000
    log_every: int = 50
    sample_every: int = 1000
    seed: int = 0
    sampler: str = "ddim"
    sampling_steps: int = 50
    timestep_spacing: str = "even"
    guidance_scale: float = 1.0
    search_segments: int = 10
    search_trials: int = 48
    search_images: int = 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _coerce(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)
            _check_range(field.name, value)
        if (self.noise_schedule == "edm") != (self.prediction == "edm"):
            rule = 'must be "edm" where noise_schedule is, and nowhere else'
            raise invalid("prediction", self.prediction, rule)
        if self.guidance_scale != 1.0 and not self.num_classes:
            raise invalid("guidance_scale", self.guidance_scale, "needs num_classes above 0")

    def changed(self, assignments: Iterable[str]) -> RunConfig:
        """A copy with `key=value` texts applied, as given to `--set`.

        Raises:
            InputError: unknown key, no "=", or a value that does not fit.
        """
        changes = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise invalid("--set", assignment, "must read key=value")
            changes[key] = _parse(key, text)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of `config.json`."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def save(self, path: str | os.PathLike) -> None:
        """Write `config.json`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunConfig:
        """Read a `config.json`.

        Raises:
            InputError: it is missing, not JSON, of another format, or breaks a rule.
        """
        value = read_json(path, argument="config")
        required = {field.name for field in dataclasses.fields(cls)} - set(_SINCE)
        try:
            fields = check_keys(
                value, format=FORMAT, version=VERSION, required=required, optional=_SINCE
            )
            return cls(**{**_SINCE, **fields})
        except InputError as error:
            raise InputError(f"config {path}: {error}") from error


# Fields that older runs lack, and what those runs did.
_SINCE = {
    "held_out_images": 0,
    "num_classes": 0,
    "noise_schedule": "linear",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "prediction": "epsilon",
    "data_std": 0.5,
    "weighting": "uniform",
    "label_dropout": 0.1,
    "sampler": "ddim",
    "timestep_spacing": "even",
    "guidance_scale": 1.0,
}
_CHOICES = {
    "noise_schedule": ("linear", "cosine", "edm"),
    "prediction": PREDICTIONS,
    "weighting": ("uniform", "min_snr"),
    "sampler": SAMPLERS,
    "timestep_spacing": SPACINGS,
    "learning_rate_decay": ("constant", "cosine"),
    "mixed_precision": ("float32", "mixed_bfloat16"),
}
_AT_LEAST_ZERO = {"sample_every", "warmup_steps", "middle_widths", "held_out_images"}
_LIMITS = {
    "num_classes": (0, MAX_CLASSES),
    "label_dropout": (0, 1),
    "guidance_scale": (0, MAX_GUIDANCE),
    "channels": (1, 4),
    "dropout": (0, 1),
    "distillation": (0, 1),
    "ema_momentum": (0, 1),
    "seed": (0, 2**63 - 1),
    "train_timesteps": (1, 100_000),
}
_PARSERS = {"int": int, "float": float, "str": str}


def _field_type(key: str) -> str:
    for field in dataclasses.fields(RunConfig):
        if field.name == key and key != "preset":
            return field.type
    names = [field.name for field in dataclasses.fields(RunConfig) if field.name != "preset"]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
    raise invalid("--set", key, f"is no field of the configuration; {hint}")


def _parse(key: str, text: str) -> Any:
    """The value of a `--set` text, by the field's type."""
    kind = _field_type(key)
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind.startswith("tuple"):
            item = _PARSERS[kind[6:].split(",")[0]]
            return tuple(item(part) for part in text.split(",") if part.strip())
        return _PARSERS[kind](text)
    except (ValueError, KeyError) as error:
        names = {"bool": "true or false", "int": "an integer", "float": "a number"}
        rule = names.get(kind, "numbers separated by commas")
        raise invalid("--set", f"{key}={text}", f"must be {rule}") from error


def _coerce(key: str, value: Any, kind: str) -> Any:
    """Check a value's type; whole numbers may stand for floats and lists for tuples."""
    if kind.startswith("tuple"):
        if not isinstance(value, (list, tuple)):
            raise invalid(key, value, "must be a list of numbers")
        item = kind[6:].split(",")[0]
        return tuple(_coerce(key, part, item) for part in value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    expected = {"int": int, "float": float, "str": str, "bool": bool}[kind]
    if not isinstance(value, expected) or (kind == "int" and isinstance(value, bool)):
        raise invalid(key, value, f"must be of the type {kind}")
    if kind == "float" and not math.isfinite(value):
        raise invalid(key, value, "must be finite")
    return value


def _check_range(key: str, value: Any) -> None:
    if key in _LIMITS:
        low, high = _LIMITS[key]
        if not low <= value <= high:
            raise invalid(key, value, f"must lie in [{low:g}, {high:g}]")
    elif key in _CHOICES:
        if value not in _CHOICES[key]:
            raise invalid(key, value, f"must be one of {', '.join(_CHOICES[key])}")
    elif key in _AT_LEAST_ZERO:
        if value < 0:
            raise invalid(key, value, "must be 0 or more")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
        raise invalid(key, value, "must be above 0")
