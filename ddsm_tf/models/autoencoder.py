"""A KL autoencoder: images to small latents and back, for latent diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from ddsm_tf.errors import invalid
from ddsm_tf.models.averaging import AveragedWeights
from ddsm_tf.models.blocks import AttentionBlock, Block, Upsample
from ddsm_tf.models.layers import (
    PACKAGE,
    ChannelAxis,
    SlimmableConv2D,
    SlimmableGroupNorm,
)
from ddsm_tf.models.unet import check_multipliers

GROUP_SIZE = 4
# Of log σ²: a standard deviation from e⁻¹⁵ to e¹⁰ (as Rombach et al. cut it).
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@keras.saving.register_keras_serializable(package=PACKAGE)
class ImageBlock(Block):
    """Norm, SiLU, convolution, twice, with a shortcut: a residual block without a timestep.

    Args:
        inputs: channel axis of the input.
        outputs: channel axis of the output.
    """

    def __init__(self, inputs: ChannelAxis, outputs: ChannelAxis, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inputs, self.outputs = ChannelAxis(*inputs), ChannelAxis(*outputs)
        self.input_norm = SlimmableGroupNorm((self.inputs,))
        self.input_conv = SlimmableConv2D((self.inputs,), self.outputs)
        self.output_norm = SlimmableGroupNorm((self.outputs,))
        self.output_conv = SlimmableConv2D(
            (self.outputs,), self.outputs, kernel_initializer="zeros"
        )
        self.shortcut = None
        if self.inputs != self.outputs:
            self.shortcut = SlimmableConv2D((self.inputs,), self.outputs, kernel_size=1)

    def call(self, x: Any) -> Any:
        h = self.input_conv(ops.silu(self.input_norm(x)))
        h = self.output_conv(ops.silu(self.output_norm(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inputs": self.inputs, "outputs": self.outputs}


@keras.saving.register_keras_serializable(package=PACKAGE)
class KLAutoencoder(AveragedWeights, keras.Model):
    """Encodes images as Gaussians over latents, and decodes latents (Rombach et al., 2022).

    The loss is the squared error a pixel plus `kl_weight` times the divergence from N(0, 1) a
    latent value (Kingma and Welling, 2014, arXiv 1312.6114, equation 10). There is no perceptual
    and no adversarial loss, which need other networks: reconstructions are a little soft.

    Args:
        image_size: side in pixels, divisible by 2^(levels - 1).
        channels: channels of the image, 1 to 4.
        latent_channels: channels of the latents, 1 to 4.
        base_channels: channels of the first level, a multiple of 4.
        channel_multipliers: one a level; latents are 2^(levels - 1) times smaller than images.
        blocks_per_level: residual blocks a level.
        kl_weight: see above.
        seed: fixes the latents that training draws.

    Call arguments:
        images: float (N, H, W, C) in [-1, 1].

    Returns:
        "reconstruction" and "kl" → float32 (N,), an image's losses.

    Raises:
        InputError: an argument breaks its rule.

    Example:
        >>> autoencoder = KLAutoencoder(image_size=64, channels=3, channel_multipliers=(1, 2, 4))
        >>> autoencoder.encode(images).shape
        (8, 16, 16, 4)

    Reference: Rombach et al., 2022, arXiv 2112.10752, section 3.1 and appendix G.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        latent_channels: int = 4,
        base_channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        blocks_per_level: int = 1,
        kl_weight: float = 1e-4,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        channel_multipliers = check_multipliers(channel_multipliers)
        factor = 2 ** (len(channel_multipliers) - 1)
        if image_size < factor or image_size % factor:
            raise invalid("image_size", image_size, f"must be divisible by {factor}")
        for name, value in (("channels", channels), ("latent_channels", latent_channels)):
            if not 1 <= value <= 4:
                raise invalid(name, value, "must lie in [1, 4]")
        if base_channels < GROUP_SIZE or base_channels % GROUP_SIZE:
            raise invalid("base_channels", base_channels, f"must be a multiple of {GROUP_SIZE}")
        if kl_weight < 0:
            raise invalid("kl_weight", kl_weight, "must be 0 or more")
        self.image_size, self.channels = image_size, channels
        self.latent_channels, self.base_channels = latent_channels, base_channels
        self.channel_multipliers = channel_multipliers
        self.blocks_per_level, self.kl_weight, self.seed = blocks_per_level, kl_weight, seed
        self.seed_generator = keras.random.SeedGenerator(seed % 2**32)  # all that JAX takes
        self._make_layers()
        for layer in self._flatten_layers(include_self=False, recursive=False):
            layer.build(None)
        self.latent_scale = self.add_weight(
            shape=(), initializer="ones", trainable=False, name="latent_scale"
        )
        names = ("reconstruction", "kl")
        self.loss_trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.built = True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (self.image_size, self.image_size, self.channels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        side = self.image_size // 2 ** (len(self.channel_multipliers) - 1)
        return (side, side, self.latent_channels)

    def _make_layers(self) -> None:
        image, latent = ChannelAxis(self.channels, 0), ChannelAxis(self.latent_channels, 0)
        axes = [self._axis(multiplier) for multiplier in self.channel_multipliers]
        middle = axes[-1]
        h = axes[0]
        self.encoder_layers = [SlimmableConv2D((image,), h)]
        for level, axis in enumerate(axes):
            for _ in range(self.blocks_per_level):
                self.encoder_layers.append(ImageBlock(h, axis))
                h = axis
            if level + 1 < len(axes):
                self.encoder_layers.append(SlimmableConv2D((h,), h, strides=2))
        self.encoder_layers += [ImageBlock(h, h), AttentionBlock(h), ImageBlock(h, h)]
        self.encoder_norm = SlimmableGroupNorm((h,))
        self.moments_conv = SlimmableConv2D((h,), ChannelAxis(2 * self.latent_channels, 0))
        self.decoder_layers = [SlimmableConv2D((latent,), middle)]
        self.decoder_layers += [
            ImageBlock(middle, middle),
            AttentionBlock(middle),
            ImageBlock(middle, middle),
        ]
        for level in reversed(range(len(axes))):
            for _ in range(self.blocks_per_level + 1):
                self.decoder_layers.append(ImageBlock(h, axes[level]))
                h = axes[level]
            if level:
                self.decoder_layers.append(Upsample(h))
        self.decoder_norm = SlimmableGroupNorm((h,))
        self.image_conv = SlimmableConv2D((h,), image)

    def _axis(self, multiplier: int) -> ChannelAxis:
        channels = self.base_channels * multiplier
        return ChannelAxis(channels, channels // GROUP_SIZE)

    def moments(self, images: Any) -> tuple[Any, Any]:
        """Mean and log σ² of the unscaled latents, float (N, h, w, c) each."""
        h = images
        for layer in self.encoder_layers:
            h = layer(h)
        moments = self.moments_conv(ops.silu(self.encoder_norm(h)))
        mean, log_variance = ops.split(ops.cast(moments, "float32"), 2, axis=-1)
        return mean, ops.clip(log_variance, *LOG_VARIANCE_RANGE)

    def encode(self, images: Any) -> Any:
        """The mean latents of images, float32 (N, h, w, c), times `latent_scale`.

        Args:
            images: float (N, H, W, C) in [-1, 1].
        """
        return self.moments(images)[0] * self.latent_scale

    def decode(self, latents: Any) -> Any:
        """Images, float32 (N, H, W, C) about [-1, 1], of scaled latents, float (N, h, w, c)."""
        return self._decode(ops.cast(latents, "float32") / self.latent_scale)

    def _decode(self, unscaled: Any) -> Any:
        h = unscaled
        for layer in self.decoder_layers:
            h = layer(h)
        return ops.cast(self.image_conv(ops.silu(self.decoder_norm(h))), "float32")

    def call(self, images: Any, training: bool = False) -> dict[str, Any]:
        images = ops.cast(images, "float32")
        mean, log_variance = self.moments(images)
        latents = mean
        if training:
            noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
            latents = mean + ops.exp(0.5 * log_variance) * noise
        error = ops.mean(ops.square(self._decode(latents) - images), axis=(1, 2, 3))
        divergence = ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance
        kl = 0.5 * ops.mean(divergence, axis=(1, 2, 3))
        self.add_loss(ops.mean(error) + self.kl_weight * ops.mean(kl))
        return {"reconstruction": error, "kl": kl}

    def compute_metrics(
        self, x: Any, y: Any, y_pred: dict[str, Any], sample_weight: Any = None
    ) -> dict[str, Any]:
        """Update the mean of each loss."""
        for name, tracker in self.loss_trackers.items():
            tracker.update_state(y_pred[name])
        return self.get_metrics_result()

    def set_latent_scale(self, images: np.ndarray, batch_size: int = 64) -> float:
        """Scale latents to unit variance over images (Rombach et al., appendix G).

        Args:
            images: float32 (N, H, W, C) in [-1, 1].
            batch_size: images at a time.

        Returns:
            The scale, 1 over the standard deviation of the means.
        """
        means = [
            ops.convert_to_numpy(self.moments(images[first : first + batch_size])[0])
            for first in range(0, len(images), batch_size)
        ]
        scale = 1.0 / float(np.std(np.concatenate(means), dtype=np.float64))
        self.latent_scale.assign(scale)
        return scale

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Inner layers take the precision in force where they are made; so must the whole.
        config.pop("dtype")
        names = ("image_size", "channels", "latent_channels", "base_channels")
        names += ("channel_multipliers", "blocks_per_level", "kl_weight", "seed")
        return {**config, **{name: getattr(self, name) for name in names}}
