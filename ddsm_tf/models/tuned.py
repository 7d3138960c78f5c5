"""The model that fits a slimmable UNet to one step schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from ddsm_tf.errors import InputError
from ddsm_tf.models.diffusion import DiffusionModel
from ddsm_tf.models.layers import PACKAGE
from ddsm_tf.models.unet import SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.schedule import StepSchedule


@keras.saving.register_keras_serializable(package=PACKAGE)
class TunedDiffusionModel(DiffusionModel):
    """Trains every width only at the timesteps where a schedule runs it.

    The sandwich rule makes each width good at all timesteps, as a search needs it. Once the
    schedule is known, most of that is never used: a step here trains one width, at its own
    timesteps, so the widths no longer compete for the weights that they share, and a step costs
    what a step of the schedule costs on average and not the sum of several widths. Other
    schedules become worse.

    Args:
        unet, noise_table, options: as of `DiffusionModel`; `middle_widths` says nothing here.
        schedule: whose widths and timesteps are trained.

    Raises:
        InputError: the schedule asks for what the network does not have, or `distillation` is on:
            a step has one width, and none to imitate.

    Attributes:
        width_probabilities: the schedule's widths, and the share of the steps that train each.
    """

    def __init__(
        self,
        unet: SlimmableUNet,
        noise_table: NoiseTable,
        *,
        schedule: StepSchedule,
        **options: Any,
    ) -> None:
        super().__init__(unet, noise_table, **options)
        if self.distillation:
            raise InputError(
                f"`distillation` (={self.distillation:g}) must be 0 with a schedule: a step trains "
                "one width, which has none to imitate"
            )
        schedule.check_model(unet.widths, noise_table.train_timesteps)
        self.schedule = schedule
        self._timesteps = schedule.timesteps_by_width()
        visits = {
            width: self._objective.probabilities_of(timesteps).sum()
            for width, timesteps in self._timesteps.items()
        }
        self.width_probabilities = {
            width: float(visited / sum(visits.values())) for width, visited in visits.items()
        }

    def _trained_timesteps(self, width: float) -> Sequence[int] | None:
        return self._timesteps[width]

    def _width_choices(self) -> list[tuple[float, ...]]:
        """The schedule's widths, one a step."""
        return [(width,) for width in self._timesteps]

    def _choose_widths(self, step: int) -> tuple[float, ...]:
        """The width of a step, as often as training visits its timesteps."""
        choices = self._width_choices()
        random = np.random.default_rng([self.seed, step])
        shares = list(self.width_probabilities.values())
        return choices[random.choice(len(choices), p=shares)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "schedule": self.schedule.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> TunedDiffusionModel:
        schedule = StepSchedule.from_dict(config["schedule"])
        return super().from_config({**config, "schedule": schedule}, custom_objects)
