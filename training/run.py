"""The run folder: where a run keeps its configuration, checkpoints, weights and results."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_tf.edge.manifest import MAX_TEXT
from ddsm_tf.errors import invalid
from ddsm_tf.files import atomic_file
from ddsm_tf.labels import check_conditional
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule
from ddsm_tf.timesteps import spaced_timesteps
from ddsm_tf.training.checkpoints import Checkpoints
from ddsm_tf.training.config import AutoencoderConfig, RunConfig
from ddsm_tf.training.data import ImageSet, check_classes, load_images, split_images
from ddsm_tf.training.run_folder import RunFolder


class Run(RunFolder):
    """The run folder of a diffusion model."""

    Config = RunConfig
    command = "ddsm train"

    @property
    def weights_path(self) -> Path:
        """The network with its averaged weights."""
        return self.path / "weights.keras"

    @property
    def schedule_path(self) -> Path:
        """The schedule that the search chose."""
        return self.path / "schedule.json"

    @property
    def importance_path(self) -> Path:
        """The importance table of the averaged weights."""
        return self.path / "importance.json"

    @property
    def search_path(self) -> Path:
        """Everything of the search."""
        return self.path / "search"

    def method_path(self, method: str) -> Path:
        """Where a search method keeps its trials; the main one's lie at the top."""
        return self.search_path if method == "nsga2" else self.search_path / method

    @property
    def bundle_path(self) -> Path:
        """The bundle that the demo exports and the report shows."""
        return self.path / "bundle"

    @property
    def noise_table(self) -> NoiseTable:
        """The forward process, and what the network puts out."""
        config = self.config
        T = config.train_timesteps
        if config.noise_schedule == "edm":
            sigmas = config.sigma_min, config.sigma_max
            return NoiseTable.edm(T, *sigmas, data_std=config.data_std)
        if config.noise_schedule == "cosine":
            table = NoiseTable.cosine(T)
        else:
            table = NoiseTable.linear(T, config.beta_start, config.beta_end)
        return table.predicting(config.prediction)

    @property
    def provenance(self) -> dict[str, str | int]:
        """What an export says of where its weights come from."""
        steps = Checkpoints(self.path / "checkpoints").steps()
        trained = {"training_steps": steps[-1]} if steps else {}
        tuned = {}
        if self.config.tuned_from:
            tuned = {"tuned_for": _note(self.tuned_schedule)}
        return {"preset": self.config.preset, **trained, **tuned}

    @property
    def tuning_path(self) -> Path:
        """What a tuned run started from: a run folder of configuration, weights and schedule."""
        return self.path / "tuning"

    @property
    def tuned_schedule(self) -> StepSchedule:
        """The schedule that a tuned run trains for."""
        return StepSchedule.load(self.tuning_path / "schedule.json")

    def load_data(self) -> ImageSet:
        """All images of the run's source; those of a run on latents are pixels as well."""
        config = self.config
        images = load_images(config.data, *self.pixel_format, self.path / "cache")
        if config.num_classes:
            check_classes(images, config.data, config.num_classes)
        return images

    def load_split(self) -> tuple[ImageSet, ImageSet]:
        """The images that the run trains on, and those it holds out."""
        return split_images(self.load_data(), self.config.held_out_images, self.config.seed)

    @property
    def autoencoder_path(self) -> Path:
        """The autoencoder of a run on latents."""
        return self.path / "autoencoder"

    @property
    def pixel_format(self) -> tuple[int, int]:
        """Side in pixels and channels of the run's images, decoded where it denoises latents."""
        if not self.config.autoencoder:
            return self.config.image_size, self.config.channels
        config = AutoencoderConfig.load(self.autoencoder_path / "config.json")
        return config.image_size, config.channels

    @cached_property
    def autoencoder(self) -> Any:
        """The `KLAutoencoder` of a run on latents, or None.

        Raises:
            InputError: it cannot be read, or its latents have another shape than the run's.
        """
        if not self.config.autoencoder:
            return None
        from ddsm_tf.training.autoencoder import load_autoencoder

        autoencoder = load_autoencoder(self.autoencoder_path / "autoencoder.keras")
        config = self.config
        shape = (config.image_size, config.image_size, config.channels)
        if autoencoder.latent_shape != shape:
            rule = f"has latents of {autoencoder.latent_shape}, not image_size and channels {shape}"
            raise invalid("autoencoder", config.autoencoder, rule)
        return autoencoder

    def denoised(self, images: np.ndarray, *, mirrored: bool = False) -> np.ndarray:
        """What the network denoises: images, uint8 (N, H, W, C), or their latents, float32.

        Args:
            images: uint8 (N, H, W, C) pixels.
            mirrored: whether latents of the mirrored images follow.
        """
        if self.autoencoder is None:
            return images
        from ddsm_tf.training.latents import encode_images

        weights = self.autoencoder_path / "autoencoder.keras"
        folder = self.path / "latents"
        return encode_images(self.autoencoder, weights, images, folder, mirrored=mirrored)

    def new_unet(self) -> Any:
        """The run's architecture with fresh weights."""
        return network_of(self.config)

    def model_to_train(self) -> Any:
        """A model of fresh weights, or of a tuned run's, which are another run's and its schedule.

        Raises:
            InputError: these are missing or broken.
        """
        if not self.config.tuned_from:
            return self.new_model()
        # Of this run's precision, whatever the other's was.
        unet = self.new_unet()
        unet.set_weights(Run.open(self.tuning_path).load_unet().get_weights())
        return self.new_model(unet, self.tuned_schedule)

    def new_model(self, unet: Any = None, tuned_for: StepSchedule | None = None) -> Any:
        """A `DiffusionModel` as the configuration says, over `unet` or fresh weights.

        Args:
            unet: the network; None makes one.
            tuned_for: a schedule to train for alone.
        """
        from ddsm_tf.models import DiffusionModel, TunedDiffusionModel
        from ddsm_tf.models.compiled import CompiledDecoder

        config = self.config
        options: dict[str, Any] = {}
        if self.autoencoder is not None:
            options = {"clip": False, "decode": CompiledDecoder(self.autoencoder)}
        kind = DiffusionModel
        if tuned_for is not None:
            kind, options["schedule"] = TunedDiffusionModel, tuned_for
        return kind(
            unet or self.new_unet(),
            self.noise_table,
            middle_widths=config.middle_widths,
            distillation=config.distillation,
            weighting=config.weighting,
            label_dropout=config.label_dropout,
            seed=config.seed,
            **options,
        )

    def load_unet(self) -> Any:
        """The network with its averaged weights.

        Raises:
            InputError: there are none yet, the file is broken, or of another architecture.
        """
        import keras

        from ddsm_tf.models import SlimmableUNet

        if not self.weights_path.is_file():
            raise invalid("RUN", str(self.path), "has no weights yet; see `ddsm train`")
        try:
            unet = keras.saving.load_model(self.weights_path, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises many types for a broken archive
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise invalid("weights", str(self.weights_path), f"cannot be read: {reason}") from error
        if not isinstance(unet, SlimmableUNet):
            raise invalid("weights", str(self.weights_path), "hold no SlimmableUNet")
        expected, found = self.new_unet().get_config(), unet.get_config()
        for key in expected:
            if key not in ("name", "dtype") and expected[key] != found[key]:
                rule = f"have {key} {found[key]}, but config.json says {expected[key]}"
                raise invalid("weights", str(self.weights_path), rule)
        return unet

    def load_model(self, *, xla: bool = False) -> Any:
        """A `DiffusionModel` over `load_unet`, ready to sample.

        Args:
            xla: sample with graphs that XLA compiles; see `CompiledDenoiser`.
        """
        from ddsm_tf.models.compiled import CompiledDenoiser

        model = self.new_model(self.load_unet())
        if xla:
            model.denoise = CompiledDenoiser(model.unet, xla=True)
        return model

    def save_weights(self, model: Any) -> None:
        """Write the network of a `DiffusionModel`, atomically."""
        with atomic_file(self.weights_path) as temporary:
            model.unet.save(temporary)

    def schedule(
        self,
        choice: str | None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        churn: float | None = None,
        guidance_scale: float | None = None,
        guidance_width: float | None = None,
    ) -> StepSchedule:
        """The schedule a user named.

        Args:
            choice: "full", "uniform:W", a schedule file, or None for the chosen one (full width
                where no search has run).
            sampler, spacing, guidance_scale: of "full" and "uniform:W"; None takes the
                configuration's.
            steps: of these; None takes the configuration's, or all for DDPM.
            eta, churn: of these, for the samplers that have them; None is 0.
            guidance_width: of their unconditional branch; None is the step's own.

        Raises:
            InputError: the file is broken or asks for what the model does not have, or an option is
                given beside a file, which has its own.
        """
        config = self.config
        if choice is None:
            choice = str(self.schedule_path) if self.schedule_path.exists() else "full"
        options = {
            "--sampler": sampler,
            "--steps": steps,
            "--timesteps": spacing,
            "--eta": eta,
            "--churn": churn,
            "--guidance": guidance_scale,
            "--guidance-width": guidance_width,
        }
        if choice == "full" or choice.startswith("uniform:"):
            width = max(config.widths) if choice == "full" else _parse_width(choice)
            sampler = sampler or config.sampler
            if steps is None:
                steps = config.train_timesteps if sampler == "ddpm" else config.sampling_steps
            spacing = spacing or config.timestep_spacing
            if eta is not None and sampler != "ddim":
                raise invalid("--eta", eta, "is for ddim")
            scale = config.guidance_scale if guidance_scale is None else guidance_scale
            schedule = StepSchedule.uniform(
                width,
                spaced_timesteps(spacing, self.noise_table, steps),
                train_timesteps=config.train_timesteps,
                sampler=sampler,
                eta=eta or 0.0,
                churn=churn or 0.0,
                guidance_scale=scale,
                guidance_widths=guidance_width and (guidance_width,) * steps,
            )
        else:
            for name, value in options.items():
                if value is not None:
                    rule = f"is for full and uniform:W; {choice} has its own (add --schedule full?)"
                    raise invalid(name, value, rule)
            schedule = StepSchedule.load(choice)
        schedule.check_model(config.widths, config.train_timesteps)
        check_conditional(schedule.guidance_scale, config.num_classes)
        return schedule

    def full_schedule(self, schedule: StepSchedule) -> StepSchedule:
        """Full width at every step, also at those that the search of the schedule left out.

        Raises:
            InputError: what the search wrote is broken.
        """
        pareto = self.search_path / "pareto.json"
        searched = pareto.exists() and self.schedule_path.exists()
        if searched and schedule == StepSchedule.load(self.schedule_path):
            from ddsm_tf.search.pareto import full_width_entry, read_pareto

            return StepSchedule.from_dict(full_width_entry(read_pareto(pareto))["schedule"])
        return schedule.at_width(max(self.config.widths))


def network_of(config: RunConfig) -> Any:
    """The `SlimmableUNet` of a configuration with fresh weights."""
    from ddsm_tf.models import SlimmableUNet

    return SlimmableUNet(
        image_size=config.image_size,
        channels=config.channels,
        base_channels=config.base_channels,
        channel_multipliers=config.channel_multipliers,
        attention_resolutions=config.attention_resolutions,
        blocks_per_level=config.blocks_per_level,
        widths=config.widths,
        dropout=config.dropout,
        num_classes=config.num_classes,
        name="unet",
    )


def _note(schedule: StepSchedule) -> str:
    """A schedule as a bundle's provenance takes it: how many steps at each width, if they fit."""
    counts = schedule.width_counts()
    text = ", ".join(f"{count} steps at {width:g}" for width, count in counts.items())
    return text if len(text) <= MAX_TEXT else f"{len(schedule)} steps at {len(counts)} widths"


def _parse_width(choice: str) -> float:
    try:
        return float(choice.removeprefix("uniform:"))
    except ValueError as error:
        raise invalid("--schedule", choice, "must be full, uniform:WIDTH or a file") from error
