"""A training step under JAX, compiled width by width.

A program of all widths would be needed for every choice of middle widths, and each is long to
compile. Here a step is a few programs, of which all choices are made: one draws timesteps and
noise, one a width adds its gradient, one updates the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import keras
from keras import ops

State = tuple[list, list, list, list]
"""Values of the trainable, non-trainable, optimizer's and metrics' variables, as Keras has them."""


class SandwichStep:
    """One step of a `DiffusionModel` on some of its widths; gives what Keras's `train_step` does.

    Args:
        model: compiled, with its optimizer built.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._draw = jax.jit(self._drawn, static_argnums=0)
        self._add_widest = jax.jit(self._gradient, static_argnums=0)
        self._add_narrower = jax.jit(self._added_gradient, static_argnums=0, donate_argnums=1)
        self._update = jax.jit(self._updated, donate_argnums=0)

    def __call__(
        self, widths: tuple[float, ...], state: State, data: Any
    ) -> tuple[dict[str, Any], State]:
        """Take a step.

        Args:
            widths: those to train, widest first.
            state: the variables' values; used up.
            data: a batch, as `fit` gives it.

        Returns:
            The logs, and the new values.
        """
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        trainable, other, optimizer, metrics = state
        drawn, other = self._draw(self._drawn_for(widths[0]), other, inputs)
        scale = self._loss_scale(optimizer)
        widest, *narrower = widths
        gradients, loss, teacher, other = self._add_widest(widest, other, trainable, drawn, scale)
        losses = {widest: loss}
        for width in narrower:
            if self._model._redraws:
                drawn, other = self._draw(self._drawn_for(width), other, inputs)
            gradients, losses[width], other = self._add_narrower(
                width, gradients, other, trainable, drawn, scale, teacher
            )
        logs, trainable, optimizer, metrics = self._update(
            (trainable, optimizer, metrics), gradients, losses, inputs
        )
        return logs, (trainable, other, optimizer, metrics)

    def _drawn_for(self, width: float) -> float:
        """The width that a draw is compiled for: any, where all draw alike."""
        alike = self._model._trained_timesteps(width) is None
        return self._model.unet.widths[0] if alike else width

    def _drawn(self, width: float, other: list, inputs: Any) -> tuple[Any, list]:
        with self._scope(other=other) as scope:
            drawn = self._model._draw_inputs(inputs, training=True, width=width)
        return drawn, self._values(scope, self._model.non_trainable_variables)

    def _gradient(self, width: float, *arguments: Any) -> tuple[list, Any, Any, list]:
        gradients, (losses, output, other) = self._differentiate(width, *arguments, None)
        return gradients, losses, output if self._model.distillation else None, other

    def _added_gradient(
        self, width: float, gradients: list, *arguments: Any
    ) -> tuple[list, Any, list]:
        more, (losses, _, other) = self._differentiate(width, *arguments)
        return jax.tree.map(ops.add, gradients, more), losses, other

    def _differentiate(
        self, width: float, other: list, trainable: list, drawn: Any, scale: Any, teacher: Any
    ) -> tuple[list, tuple]:
        def loss(trainable: list) -> tuple[Any, tuple]:
            with self._scope(trainable, other) as scope:
                losses, output = self._model._loss_at(width, *drawn, teacher, training=True)
            changed = self._values(scope, self._model.non_trainable_variables)
            return ops.mean(losses) * scale, (losses, output, changed)

        return jax.grad(loss, has_aux=True)(trainable)

    def _updated(self, state: tuple, gradients: list, losses: dict, inputs: Any) -> tuple:
        trainable, optimizer, metrics = state
        model = self._model
        trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
        named = {model.loss_trackers[width].name: loss for width, loss in losses.items()}
        total = sum(ops.mean(loss) for loss in losses.values())
        logs, metrics = model._update_metrics_variables(metrics, total, inputs, None, named, None)
        return logs, trainable, optimizer, metrics

    def _loss_scale(self, optimizer: list) -> Any:
        """What the losses are multiplied by, so that half precision holds their gradients."""
        mapping = zip(self._model.optimizer.variables, optimizer, strict=True)
        with keras.StatelessScope(state_mapping=list(mapping)):
            return ops.convert_to_tensor(self._model.optimizer.scale_loss(1.0), "float32")

    def _scope(self, trainable: Sequence | None = None, other: Sequence = ()) -> Any:
        model = self._model
        mapping = list(zip(model.non_trainable_variables, other, strict=True))
        if trainable is not None:
            mapping += zip(model.trainable_variables, trainable, strict=True)
        return keras.StatelessScope(state_mapping=mapping)

    @staticmethod
    def _values(scope: Any, variables: Sequence) -> list:
        return [scope.get_current_value(variable) for variable in variables]
