"""The configuration of a run: every number needed to rebuild it, as one flat, validated record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ddsm_tf.errors import invalid
from ddsm_tf.training.flat_config import FlatConfig


@dataclass(frozen=True)
class RunConfig(FlatConfig):
    """What `config.json` holds. Every field can be set with `--set field=value`, but for `preset`
    and `tuned_from`.

    Attributes:
        preset: name of the preset the run started from.
        tuned_from: folder of the run whose network `ddsm tune` started from; empty for other runs.
            The run folder has copies of what it needs.
        data: image source; see `ddsm_tf.training.data`.
        autoencoder: run folder of an autoencoder (`ddsm autoencoder`) whose latents are denoised;
            empty where images are.
        image_size: side in pixels; images are resized and cropped to it. With an autoencoder, the
            side of its latents.
        channels: 1 (grey) to 4 (RGBA); with an autoencoder, those of its latents.
        base_channels, channel_multipliers, attention_resolutions, blocks_per_level, widths,
            dropout: see `ddsm_tf.models.SlimmableUNet`.
        num_classes: of the data's labels; 0 trains without them.
        noise_schedule: "linear" (from `beta_start` to `beta_end`), "cosine", or "edm" (noise levels
            from `sigma_min` to `sigma_max`).
        train_timesteps: T of the noise table.
        prediction: what the network puts out, "epsilon", "v", "x0" or "edm"; `data_std` belongs to
            the last; see `ddsm_tf.NoiseTable`.
        weighting: of the timesteps' losses, "uniform", "min_snr" or "min_snr_plus_one"; see
            `ddsm_tf.models.objective`.
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
        jit_compile: compile steps with XLA; under JAX they always are.
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
    autoencoder: str = ""
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
    tuned_from: str = ""

    # Fields that older runs lack, and what those runs did.
    FORMAT: ClassVar[str] = "ddsm-run"
    SINCE: ClassVar[Mapping[str, Any]] = {
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
        "autoencoder": "",
        "tuned_from": "",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.noise_schedule == "edm") != (self.prediction == "edm"):
            rule = 'must be "edm" where noise_schedule is, and nowhere else'
            raise invalid("prediction", self.prediction, rule)
        if self.guidance_scale != 1.0 and not self.num_classes:
            raise invalid("guidance_scale", self.guidance_scale, "needs num_classes above 0")


@dataclass(frozen=True)
class AutoencoderConfig(FlatConfig):
    """What `config.json` of an autoencoder holds. Every field but `preset` can be set.

    Attributes:
        preset: name of the preset whose latents are denoised; empty for none.
        data: image source; see `ddsm_tf.training.data`.
        image_size, channels: of the images.
        latent_channels, base_channels, channel_multipliers, blocks_per_level, kl_weight: see
            `ddsm_tf.models.autoencoder.KLAutoencoder`.
        steps, batch_size, learning_rate, warmup_steps, learning_rate_decay, ema_momentum,
            clip_norm, horizontal_flip, held_out_images, mixed_precision, jit_compile,
            checkpoint_every, log_every, sample_every, seed: as in `RunConfig`.

    Raises:
        InputError: a value has the wrong type or leaves its range.
    """

    data: str
    preset: str = ""
    image_size: int = 256
    channels: int = 3
    latent_channels: int = 4
    base_channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    blocks_per_level: int = 2
    kl_weight: float = 1e-4
    steps: int = 100_000
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup_steps: int = 500
    learning_rate_decay: str = "cosine"
    ema_momentum: float = 0.999
    clip_norm: float = 1.0
    horizontal_flip: bool = True
    held_out_images: int = 256
    mixed_precision: str = "float32"
    jit_compile: bool = False
    checkpoint_every: int = 1000
    log_every: int = 50
    sample_every: int = 1000
    seed: int = 0

    FORMAT: ClassVar[str] = "ddsm-autoencoder"
