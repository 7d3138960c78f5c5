"""The model that trains a slimmable UNet through plain Keras `fit`, and samples from it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.models.averaging import AveragedWeights, steps_done
from ddsm_tf.models.compiled import CompiledDenoiser
from ddsm_tf.models.draws import TrainingDraws
from ddsm_tf.models.layers import PACKAGE
from ddsm_tf.models.objective import Objective
from ddsm_tf.models.optimizers import _ClipReducedGradients
from ddsm_tf.models.replicas import runs_on_several_hosts, strategy_replicas
from ddsm_tf.models.unet import SlimmableUNet
from ddsm_tf.noise import NoiseTable
from ddsm_tf.sampling import clip_to_range, sample_images
from ddsm_tf.schedule import StepSchedule


def loss_name(width: float) -> str:
    """The log entry of a width's loss, such as `loss_0.5`."""
    return f"loss_{width:g}"


@keras.saving.register_keras_serializable(package=PACKAGE)
class DiffusionModel(AveragedWeights, keras.Model):
    """Trains a `SlimmableUNet` to denoise at every width, and samples images.

    Each step runs the widest, the narrowest and some random middle widths on the same images and
    sums their losses (the sandwich rule: Yu and Huang, 2019, arXiv 1903.05134; DDSM, section 3.2).
    Every width has timesteps and noise of its own, because gradients that err independently add up
    to a better one; with distillation they share them. The middle widths are drawn on the host and
    every choice has a compiled step of its own, so slicing stays static; with
    `steps_per_execution` > 1 a choice holds that long.

    Under `tf.distribute` each replica takes its rows of the timesteps and the noise of the global
    batch, so the loss is that of one device on the same batch.

    Args:
        unet: the network.
        noise_table: the forward process, and what the network puts out.
        middle_widths: how many random middle widths a step trains; more than there are means all.
        distillation: in [0, 1], the share of a narrower width's target that is the widest
            width's output (in place, no gradient) and not the truth.
        weighting: of the timesteps, "uniform", "min_snr" or "min_snr_plus_one"; see
            `ddsm_tf.models.objective`.
        label_dropout: in [0, 1], the share of labels that training replaces by "no class", so that
            samples can be guided (classifier-free guidance, algorithm 1).
        clip: whether samples lie in [-1, 1]; latents do not.
        decode: latents float32 (N, H, W, C) → images float (N, H', W', C') in [-1, 1], for
            `sample`; None where images are denoised. It is no part of the saved model.
        seed: fixes timesteps, noise, dropped labels and the choice of widths.

    Call arguments:
        inputs: float (N, H, W, C) in [-1, 1]; with classes the pair of these and labels, integers
            (N,) in [0, K).
        training: the sandwich's widths if true; every width, on the same timesteps and noise, if
            not.

    Returns:
        Width's log name → its weighted squared error per image, float32 (N,).

    Raises:
        InputError: an argument breaks its rule, or the images are integers.

    Example:
        >>> model = DiffusionModel(SlimmableUNet(), NoiseTable.linear(1000))
        >>> model.compile(Adam(2e-4, use_ema=True, ema_momentum=0.9999))
        >>> model.fit(dataset, epochs=10)
        >>> images = model.sample(StepSchedule.load("schedule.json"), 64, seed=0)
    """

    def __init__(
        self,
        unet: SlimmableUNet,
        noise_table: NoiseTable,
        middle_widths: int = 1,
        distillation: float = 0.0,
        seed: int = 0,
        weighting: str = "uniform",
        label_dropout: float = 0.1,
        clip: bool = True,
        decode: Callable[[np.ndarray], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if middle_widths < 0:
            raise invalid("middle_widths", middle_widths, "must be 0 or more")
        if not 0.0 <= distillation <= 1.0:
            raise invalid("distillation", distillation, "must lie in [0, 1]")
        if not 0.0 <= label_dropout <= 1.0:
            raise invalid("label_dropout", label_dropout, "must lie in [0, 1]")
        # Keras would round the images to half precision.
        self.autocast = False
        self.unet = unet
        self.noise_table = noise_table
        self.middle_widths = middle_widths
        self.distillation = float(distillation)
        self.weighting = weighting
        self.label_dropout = float(label_dropout)
        self.clip = clip
        self.decode = decode
        self._objective = Objective.of(noise_table, weighting)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed % 2**32)  # all that JAX takes
        self._draws = TrainingDraws(self.seed_generator, self._objective, unet.image_shape)
        self.loss_trackers = {
            width: keras.metrics.Mean(name=loss_name(width)) for width in unet.widths
        }
        self.denoise = CompiledDenoiser(unet)
        self._training_widths = unet.widths
        self.built = True

    def compile(self, optimizer: Any = None, **kwargs: Any) -> None:
        """Keras's `compile`; the loss is the model's own.

        Raises:
            InputError: `global_clipnorm` with a plain Keras optimizer on several replicas.
        """
        clips = getattr(optimizer, "global_clipnorm", None) is not None
        if clips and strategy_replicas() > 1 and not isinstance(optimizer, _ClipReducedGradients):
            raise InputError(
                "`global_clipnorm` of a Keras optimizer clips each replica's gradient by itself; "
                "use ddsm_tf.models.Adam, which clips the global batch's"
            )
        super().compile(optimizer=optimizer, **kwargs)

    def call(self, inputs: Any, training: bool = False) -> dict[str, Any]:
        widths = self._training_widths if training else self.unet.widths
        losses, drawn, teacher = {}, None, None
        for width in widths:
            if drawn is None or (training and self._redraws):
                drawn = self._draw_inputs(inputs, training, width)
            loss, output = self._loss_at(width, *drawn, teacher, training)
            losses[loss_name(width)] = loss
            teacher = output if teacher is None else teacher
        self.add_loss(sum(ops.mean(loss) for loss in losses.values()))
        return losses

    @property
    def _redraws(self) -> bool:
        """Whether each width of a step has timesteps and noise of its own.

        A teacher's output is a target for its own input alone.
        """
        return not self.distillation

    def _trained_timesteps(self, width: float) -> Sequence[int] | None:
        """The timesteps that training shows a width, rising; None means all."""
        return None

    def _draw_inputs(self, inputs: Any, training: bool, width: float) -> tuple[tuple, Any, Any]:
        """What a width gets: the network's inputs, its target and the weight."""
        images, labels = self._check_inputs(inputs)
        count = ops.shape(images)[0]
        among = self._trained_timesteps(width) if training else None
        t, noise = self._draws.timesteps_and_noise(count, among)
        if labels is not None and training and self.label_dropout:
            hidden = self._draws.hidden(count, self.label_dropout)
            labels = ops.where(hidden, self.unet.num_classes, labels)
        at_t = self._objective.at(t)
        x_t = at_t.signal * images + at_t.noise * noise
        target = at_t.target_image * images + at_t.target_noise * noise
        network_inputs = (at_t.input_scale * x_t, t, *(() if labels is None else (labels,)))
        return network_inputs, target, at_t.weight

    def _loss_at(
        self, width: float, inputs: tuple, target: Any, weight: Any, teacher: Any, training: bool
    ) -> tuple[Any, Any]:
        """A width's squared error, float32 (N,) (DDPM, equation 14), and its output.

        In training a share of the target may be `teacher`, the widest width's output.
        """
        output = ops.cast(self.unet(*inputs, width=width, training=training), "float32")
        loss = ops.mean(ops.square(output - target), axis=(1, 2, 3))
        if teacher is not None and training and self.distillation:
            imitation = ops.mean(ops.square(output - teacher), axis=(1, 2, 3))
            loss = (1.0 - self.distillation) * loss + self.distillation * imitation
        return loss * ops.reshape(weight, (-1,)), ops.stop_gradient(output)

    def _check_inputs(self, inputs: Any) -> tuple[Any, Any]:
        if not self.unet.num_classes:
            return self._check_images(inputs), None
        if not isinstance(inputs, (tuple, list)) or len(inputs) != 2:
            rule = f"must be a pair of images and labels, for {self.unet.num_classes} classes"
            raise invalid("inputs", type(inputs).__name__, rule)
        images, labels = inputs
        if len(labels.shape) != 1 or keras.backend.is_float_dtype(labels.dtype):
            given = f"{keras.backend.standardize_dtype(labels.dtype)} {tuple(labels.shape)}"
            raise invalid("labels", given, "must be integers (N,)")
        return self._check_images(images), ops.cast(labels, "int32")

    def _check_images(self, images: Any) -> Any:
        expected = self.unet.image_shape
        if len(images.shape) != 4 or tuple(images.shape[1:]) != expected:
            raise invalid("images", tuple(images.shape), f"must have the shape (N, *{expected})")
        if not keras.backend.is_float_dtype(images.dtype):
            rule = "must be floats in [-1, 1]; see ddsm_tf.images.to_float"
            raise invalid("images", f"dtype {images.dtype}", rule)
        return ops.cast(images, "float32")

    def compute_metrics(
        self, x: Any, y: Any, y_pred: dict[str, Any], sample_weight: Any = None
    ) -> dict[str, Any]:
        """Update each trained width's mean loss."""
        for tracker in self.loss_trackers.values():
            if tracker.name in y_pred:
                tracker.update_state(y_pred[tracker.name])
        results = self.get_metrics_result()
        if runs_on_several_hosts():
            # Keras 3.15 averages logs over their first axis there, and scalars have none.
            results = {name: ops.reshape(value, (1,)) for name, value in results.items()}
        return results

    def make_train_function(self, force: bool = False) -> None:
        """One compiled step per choice of middle widths; the host picks which to run."""
        _unshare(self.trainable_variables)
        if self.train_function is not None and not force:
            return
        if not self.optimizer.built:
            # A step that made variables would be traced twice.
            self.optimizer.build(self.trainable_variables)
        steps = self._compiled_steps()
        step = steps_done(self.optimizer)

        def train_function(*arguments: Any) -> Any:
            nonlocal step
            logs = steps[self._choose_widths(step)](*arguments)
            # Not reached by the call that finds the end of the data.
            step += self.steps_per_execution
            return logs

        self.train_function = train_function

    def _compiled_steps(self) -> dict[tuple[float, ...], Callable]:
        """Choice of widths → what runs a step of it, of Keras's arguments."""
        compiled = self.jit_compile and not self.run_eagerly
        # Keras's own step knows how to lay out the state over several devices.
        one_device = keras.distribution.distribution() is None
        if keras.backend.backend() == "jax" and compiled and one_device:
            from ddsm_tf.models.jax_step import SandwichStep

            step = SandwichStep(self)
            return {
                choice: self._make_function(functools.partial(step, choice))
                for choice in self._width_choices()
            }
        steps = {}
        for choice in self._width_choices():
            # A function of its own each: JAX would share one trace between equal functions.
            self.train_step = self._step_at(choice)
            super().make_train_function(force=True)
            steps[choice] = self.train_function
        del self.train_step
        return steps

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Nothing to do: the model is built as it is made.

        Keras would take the mean of a batch over all workers, which fails for tuples of arrays.
        """

    def _step_at(self, widths: tuple[float, ...]) -> Callable:
        train_step = type(self).train_step

        def step(*arguments: Any) -> Any:
            # Runs while the step is traced: the widths become part of the compiled graph.
            self._training_widths = widths
            try:
                return train_step(self, *arguments)
            finally:
                self._training_widths = self.unet.widths

        return step

    def _width_choices(self) -> list[tuple[float, ...]]:
        """Every set of widths that a step may train, each widest first."""
        widest, *rest = self.unet.widths
        if not rest:
            return [(widest,)]
        *middle, narrowest = rest
        drawn = min(self.middle_widths, len(middle))
        return [(widest, *some, narrowest) for some in itertools.combinations(middle, drawn)]

    def _choose_widths(self, step: int) -> tuple[float, ...]:
        """The widths of a step: a pure function of seed and step, so a resumed run agrees."""
        choices = self._width_choices()
        return choices[np.random.default_rng([self.seed, step]).integers(len(choices))]

    def sample(
        self,
        schedule: StepSchedule,
        count: int,
        seed: int = 0,
        *,
        batch_size: int = 64,
        labels: Any = None,
        clip: bool | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Sample images with the model's present weights (after `fit` with EMA: the average).

        Args:
            schedule: timesteps and widths.
            count: number of images N.
            seed: image i depends on seed and i only.
            batch_size: images at a time.
            labels: classes of a model that has them, integers (N,) or one for all; None takes them
                in turn. The number of classes stands for none of them.
            clip: clip each step's estimate of the image to [-1, 1]; None does as the model says.
            on_step: called after every step of every batch with the step's index.

        Returns:
            uint8 (N, H, W, C).

        Raises:
            InputError: the schedule has a width or a number of timesteps that is not the model's,
                or the labels do not fit.
        """
        schedule.check_model(self.unet.widths, self.noise_table.train_timesteps)
        return sample_images(
            self.denoise,
            schedule,
            self.noise_table,
            self.unet.image_shape,
            count,
            seed=seed,
            batch_size=batch_size,
            labels=labels,
            num_classes=self.unet.num_classes,
            clip=clip_to_range if (self.clip if clip is None else clip) else None,
            decode=self.decode,
            on_step=on_step,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "unet": keras.saving.serialize_keras_object(self.unet),
            "noise_table": self.noise_table.to_dict(),
            "middle_widths": self.middle_widths,
            "distillation": self.distillation,
            "weighting": self.weighting,
            "label_dropout": self.label_dropout,
            "clip": self.clip,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> DiffusionModel:
        config = dict(config)
        config["unet"] = keras.saving.deserialize_keras_object(
            config["unet"], custom_objects=custom_objects
        )
        config["noise_table"] = NoiseTable.from_dict(config["noise_table"])
        return cls(**config)


def _unshare(variables: Sequence[Any]) -> None:
    """Give each variable a buffer of its own.

    Keras ends `fit` by assigning the moving average to the weights, which under JAX makes both
    one buffer; the next `fit` would donate it twice and fail.
    """
    if keras.backend.backend() == "jax":
        for variable in variables:
            variable.assign(ops.copy(variable))
