"""The slimmable UNet: DDPM's architecture, runnable at several widths."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from ddsm_tf.errors import InputError, invalid
from ddsm_tf.labels import MAX_CLASSES
from ddsm_tf.models.blocks import (
    AttentionBlock,
    ClassEmbedding,
    ResidualBlock,
    TimestepEmbedding,
    Upsample,
)
from ddsm_tf.models.layers import (
    PACKAGE,
    ChannelAxis,
    SlimmableConv2D,
    SlimmableGroupNorm,
    SlimmableLayer,
    active_groups,
    silu,
)


@keras.saving.register_keras_serializable(package=PACKAGE)
class SlimmableUNet(keras.Model):
    """A noise predictor ε_θ(x_t, t) that can run at any of a set of widths.

    At width w every feature map keeps its first w of the channels. The narrow network is a plain
    UNet whose weights are slices of the wide one's; `subnet` returns it.

    Args:
        image_size: side in pixels, or (height, width); divisible by 2^(levels - 1).
        channels: channels of the image, 1 to 4.
        base_channels: channels of the first level at width 1, at least 4.
        channel_multipliers: one a level: its channels over `base_channels`.
        attention_resolutions: heights of the feature maps that get self-attention.
        blocks_per_level: residual blocks a level on the way down; one more on the way up.
        widths: the widths in (0, 1] that can be called, widest first when read back.
        dropout: rate in the residual blocks, in [0, 1).
        group_size: channels of a normalisation group at the first level. None takes the
            smallest of at least 4 and base_channels / 32 that makes every width exact.
        timestep_channels: sinusoids of the timestep embedding; None takes `base_channels`.
        num_classes: K of a model with classes; 0 is a model without.

    Call arguments:
        x: noisy images, float (N, H, W, C), about unit variance.
        t: timesteps, (N,), integers or whole floats.
        labels: classes, integers (N,) in [0, K], where K is "no class"; None without classes.
        width: one of `widths`; None takes the widest.
        training: whether dropout is on.

    Returns:
        The predicted noise, float (N, H, W, C), or what else `NoiseTable.prediction` says.

    Raises:
        InputError: an argument breaks its rule, `width` is none of `widths`, or labels are given to
            a model without classes or left out of one with.

    Example:
        >>> unet = SlimmableUNet(image_size=8, channels=1, base_channels=16,
        ...                      channel_multipliers=(1, 2), widths=(1.0, 0.5))
        >>> unet(np.zeros((2, 8, 8, 1)), np.array([0, 999]), width=0.5).shape
        (2, 8, 8, 1)

    References: DDPM (arXiv 2006.11239), appendix B; DDSM (arXiv 2310.03337), section 3.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 32,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[float] = (1, 2, 2, 2),
        attention_resolutions: Sequence[int] = (16,),
        blocks_per_level: int = 2,
        widths: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
        dropout: float = 0.0,
        group_size: int | None = None,
        timestep_channels: int | None = None,
        num_classes: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Keras would round float timesteps to half precision, where 501 and 500 are the same.
        self.autocast = False
        self.channel_multipliers = check_multipliers(channel_multipliers)
        self.image_size = _check_image_size(image_size, len(self.channel_multipliers))
        self.channels = _check_integer("channels", channels, 1, 4)
        self.base_channels = _check_integer("base_channels", base_channels, 4, 4096)
        self.attention_resolutions = _check_numbers("attention_resolutions", attention_resolutions)
        self.blocks_per_level = _check_integer("blocks_per_level", blocks_per_level, 1, 16)
        self.widths = _check_widths(widths)
        self.dropout = _check_dropout(dropout)
        self.group_size = choose_group_size(base_channels, self.widths, group_size)
        self.timestep_channels = _check_timestep_channels(timestep_channels, base_channels)
        self.num_classes = _check_integer("num_classes", num_classes, 0, MAX_CLASSES)
        self._check_widths_differ()
        self._make_layers()
        for layer in self._flatten_layers(include_self=False, recursive=False):
            layer.build(None)
        self.built = True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*self.image_size, self.channels)

    @property
    def groups(self) -> int:
        """Groups of every feature map at width 1."""
        return self.base_channels // self.group_size

    def _axis(self, multiplier: float) -> ChannelAxis:
        channels = self.base_channels * multiplier
        if channels != int(channels) or (self.group_size * multiplier) % 1:
            rule = f"times base_channels (={self.base_channels}) must give whole groups"
            raise invalid("channel_multipliers", multiplier, rule)
        # The same multiple of the group at every level, so that a subnet's levels have it too.
        return ChannelAxis(int(channels), self.groups, int(self.group_size * multiplier))

    def _make_layers(self) -> None:
        """Lay out the network; the order of creation is the order of the weights."""
        image = ChannelAxis(self.channels, 0)
        axes = [self._axis(multiplier) for multiplier in self.channel_multipliers]
        embedding = self._axis(4)

        def block(inputs: tuple[ChannelAxis, ...], outputs: ChannelAxis) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embedding, self.dropout)

        self.timestep_embedding = TimestepEmbedding(self.timestep_channels, embedding)
        self.input_conv = SlimmableConv2D((image,), axes[0])
        self.down_levels, skips = [], [axes[0]]
        h = axes[0]
        for level, axis in enumerate(axes):
            stages = []
            for _ in range(self.blocks_per_level):
                stages.append([block((h,), axis), *self._attention(level, axis)])
                h = axis
                skips.append(h)
            if level + 1 < len(axes):
                stages.append([SlimmableConv2D((h,), h, strides=2)])
                skips.append(h)
            self.down_levels.append(stages)
        self.middle = [block((h,), h), AttentionBlock(h), block((h,), h)]
        self.up_levels = []
        for level in reversed(range(len(axes))):
            stages = []
            for _ in range(self.blocks_per_level + 1):
                stages.append(
                    [block((h, skips.pop()), axes[level]), *self._attention(level, axes[level])]
                )
                h = axes[level]
            if level:
                stages.append([Upsample(h)])
            self.up_levels.append(stages)
        self.output_norm = SlimmableGroupNorm((h,))
        self.output_conv = SlimmableConv2D((h,), image, kernel_initializer="zeros")
        self.class_embedding = None
        if self.num_classes:
            self.class_embedding = ClassEmbedding(self.num_classes, embedding)

    def _attention(self, level: int, axis: ChannelAxis) -> list[AttentionBlock]:
        height = self.image_size[0] >> level
        return [AttentionBlock(axis)] if height in self.attention_resolutions else []

    def call(
        self,
        x: Any,
        t: Any,
        labels: Any = None,
        width: float | None = None,
        training: bool = False,
    ) -> Any:
        width = self.check_width(width)
        x = ops.cast(x, self.compute_dtype)
        embedding = self.timestep_embedding(t, width=width)
        if (labels is None) != (self.class_embedding is None):
            rule = "must be given to a model with classes, and to no other"
            raise invalid("labels", labels, f"{rule}; num_classes is {self.num_classes}")
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(labels, width=width)

        def run(layer: keras.layers.Layer, h: Any) -> Any:
            if isinstance(layer, ResidualBlock):
                return layer(h, embedding, width=width, training=training)
            return layer(h, width=width)

        h = self.input_conv(x, width=width)
        skips = [h]
        for stages in self.down_levels:
            for stage in stages:
                for layer in stage:
                    h = run(layer, h)
                skips.append(h)
        for layer in self.middle:
            h = run(layer, h)
        for stages in self.up_levels:
            for stage in stages:
                if isinstance(stage[0], ResidualBlock):
                    h = ops.concatenate([h, skips.pop()], axis=-1)
                for layer in stage:
                    h = run(layer, h)
        h = silu(self.output_norm(h, width=width), training)
        return self.output_conv(h, width=width)

    def check_width(self, width: float | None) -> float:
        """`width`, or the widest for None; `InputError` if the network does not have it."""
        if width is None:
            return self.widths[0]
        if width not in self.widths:
            raise invalid("width", width, f"must be one of the network's {self.widths}")
        return width

    def subnet(self, width: float) -> SlimmableUNet:
        """The network at `width` as a plain, narrower UNet with copied weights.

        It has the one width 1.0 and no slicing; its output equals the slimmable call's at
        `width`.

        Raises:
            InputError: `width` is none of `widths`.
        """
        width = self.check_width(width)
        config = self.get_config()
        config.update(
            base_channels=self._axis(1).active(width),
            group_size=self.group_size,
            timestep_channels=self.timestep_channels,
            widths=(1.0,),
            name=f"{self.name}_{str(width).replace('.', '_')}",
        )
        narrow = SlimmableUNet.from_config(config)
        for target, wide in zip(_slimmable_layers(narrow), _slimmable_layers(self), strict=True):
            target.assign_slices(wide, width)
        return narrow

    def _check_widths_differ(self) -> None:
        kept = [active_groups(self.groups, width) for width in self.widths]
        if len(set(kept)) < len(kept):
            raise InputError(
                f"`widths` (={self.widths}) keep {tuple(kept)} of the {self.groups} channel groups "
                f"at base_channels (={self.base_channels}): each must keep another number; "
                "use more base channels or fewer widths"
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Inner layers take the precision in force where they are made; so must the whole.
        config.pop("dtype")
        return {
            **config,
            "image_size": self.image_size,
            "channels": self.channels,
            "base_channels": self.base_channels,
            "channel_multipliers": self.channel_multipliers,
            "attention_resolutions": self.attention_resolutions,
            "blocks_per_level": self.blocks_per_level,
            "widths": self.widths,
            "dropout": self.dropout,
            "num_classes": self.num_classes,
            "group_size": self.group_size,
            "timestep_channels": self.timestep_channels,
        }


def choose_group_size(base_channels: int, widths: Sequence[float], asked: int | None) -> int:
    """Channels of a group at the first level.

    At least 4, since a group of one channel would cancel the timestep that is added to it, and
    at least base_channels / 32, which is DDPM's. Within that, the smallest that divides
    `base_channels` and makes every width exact; if none does, widths are rounded to groups.
    """
    if asked is not None:
        return _check_integer("group_size", asked, 2, base_channels)
    smallest = max(4, base_channels // 32)
    for size in range(smallest, base_channels + 1):
        if base_channels % size:
            continue
        kept = [width * base_channels / size for width in widths]
        if np.allclose(kept, np.round(kept), atol=1e-6):
            return size
    return smallest


def _slimmable_layers(unet: SlimmableUNet) -> list[SlimmableLayer]:
    return [layer for layer in unet._flatten_layers() if isinstance(layer, SlimmableLayer)]


def _check_integer(argument: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
        raise invalid(argument, value, f"must be an integer in [{low}, {high}]")
    return int(value)


def _check_numbers(argument: str, value: Any) -> tuple[Any, ...]:
    """`value` as a tuple, if it is a sequence of real numbers."""
    numbers_only = isinstance(value, Iterable) and not isinstance(value, str)
    if not numbers_only or not all(isinstance(part, numbers.Real) for part in value):
        raise invalid(argument, value, "must be a list of numbers")
    return tuple(value)


def _check_image_size(image_size: Any, levels: int) -> tuple[int, int]:
    sides = (image_size, image_size) if hasattr(image_size, "__index__") else image_size
    sides = _check_numbers("image_size", sides)
    factor = 2 ** (levels - 1)
    if len(sides) != 2 or any(side < 1 or side % factor or side % 1 for side in sides):
        rule = f"must be divisible by {factor}, the downsampling of {levels} levels"
        raise invalid("image_size", image_size, rule)
    return int(sides[0]), int(sides[1])


def check_multipliers(multipliers: Sequence[float]) -> tuple[float, ...]:
    multipliers = _check_numbers("channel_multipliers", multipliers)
    if not multipliers or any(multiplier <= 0 for multiplier in multipliers):
        raise invalid("channel_multipliers", multipliers, "must be one or more positive numbers")
    return multipliers


def _check_widths(widths: Sequence[float]) -> tuple[float, ...]:
    widths = tuple(map(float, _check_numbers("widths", widths)))
    if not widths or not all(0.0 < width <= 1.0 for width in widths):
        raise invalid("widths", widths, "must be one or more numbers in (0, 1]")
    if len(set(widths)) < len(widths):
        raise invalid("widths", widths, "must not repeat")
    return tuple(sorted(widths, reverse=True))


def _check_timestep_channels(asked: int | None, base_channels: int) -> int:
    if asked is None:
        return base_channels + base_channels % 2
    if _check_integer("timestep_channels", asked, 2, 65_536) % 2:
        raise invalid("timestep_channels", asked, "must be even: as many sines as cosines")
    return int(asked)


def _check_dropout(dropout: float) -> float:
    if not isinstance(dropout, numbers.Real) or not 0.0 <= dropout < 1.0:
        raise invalid("dropout", dropout, "must lie in [0, 1)")
    return float(dropout)
