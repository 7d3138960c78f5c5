"""The same UNet in PyTorch, as its users would write it: what our runtimes are compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ddsm_tf.models.blocks import AttentionBlock, ResidualBlock, Upsample
from ddsm_tf.models.layers import SlimmableConv2D, SlimmableDense, SlimmableGroupNorm


class TorchUNet(nn.Module):
    """A subnet's architecture and weights as a PyTorch module, `(x, t) → output`.

    Channels come second here: x and output are float32 (N, C, H, W), t is float32 (N,).

    Args:
        subnet: a `SlimmableUNet` of one width, without classes.
    """

    def __init__(self, subnet: Any) -> None:
        super().__init__()
        self.embedding = TorchTimestepEmbedding(subnet.timestep_embedding)
        self.input_conv = convolution(subnet.input_conv)
        self.down = nn.ModuleList(
            _stage(stage) for stages in subnet.down_levels for stage in stages
        )
        self.middle = _stage(subnet.middle)
        self.up = nn.ModuleList(_stage(stage) for stages in subnet.up_levels for stage in stages)
        self.output_norm = TorchGroupNorm(subnet.output_norm)
        self.output_conv = convolution(subnet.output_conv)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        embedding = functional.silu(self.embedding(t))
        h = self.input_conv(x)
        skips = [h]
        for stage in self.down:
            for layer in stage:
                h = _run(layer, h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = _run(layer, h, embedding)
        for stage in self.up:
            if isinstance(stage[0], TorchResidualBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            for layer in stage:
                h = _run(layer, h, embedding)
        return self.output_conv(functional.silu(self.output_norm(h)))


class TorchTimestepEmbedding(nn.Module):
    """Sinusoids of t, then two dense layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        half = layer.frequency_channels // 2
        exponents = torch.arange(half, dtype=torch.float32) / max(half - 1, 1)
        self.register_buffer("frequencies", torch.exp(-math.log(10000.0) * exponents))
        self.expand, self.project = dense(layer.expand), dense(layer.project)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        sinusoids = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return self.project(functional.silu(self.expand(sinusoids)))


class TorchResidualBlock(nn.Module):
    """Norm, SiLU, convolution, plus the timestep; norm, SiLU, convolution; shortcut."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.input_norm = TorchGroupNorm(block.input_norm)
        self.input_conv = convolution(block.input_conv)
        self.timestep_dense = dense(block.timestep_dense)
        self.output_norm = TorchGroupNorm(block.output_norm)
        self.output_conv = convolution(block.output_conv)
        self.shortcut = nn.Identity() if block.shortcut is None else convolution(block.shortcut)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.input_conv(functional.silu(self.input_norm(x)))
        h = h + self.timestep_dense(embedding)[:, :, None, None]
        h = self.output_conv(functional.silu(self.output_norm(h)))
        return h + self.shortcut(x)


class TorchAttentionBlock(nn.Module):
    """Single-head self-attention over pixels with a residual."""

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.norm = TorchGroupNorm(block.norm)
        self.query, self.key = convolution(block.query), convolution(block.key)
        self.value, self.output_conv = convolution(block.value), convolution(block.output_conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        # (N, C, H, W) → (N, 1 head, H · W, C)
        query, key, value = (
            projection(h).flatten(2).transpose(1, 2)[:, None]
            for projection in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        return x + self.output_conv(attended[:, 0].transpose(1, 2).reshape(x.shape))


class TorchUpsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, block: Upsample) -> None:
        super().__init__()
        self.conv = convolution(block.conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


class TorchGroupNorm(nn.Module):
    """Group normalisation; parts of a concatenation whose groups differ in size go one by one."""

    def __init__(self, layer: SlimmableGroupNorm) -> None:
        super().__init__()
        sizes = {part.group_size for part in layer.inputs}
        parts = [(part.channels, part.groups) for part in layer.inputs]
        if len(sizes) == 1:
            parts = [tuple(map(sum, zip(*parts, strict=True)))]
        self.channels, self.groups = map(list, zip(*parts, strict=True))
        self.weight = _parameter(layer.gamma)
        self.bias = _parameter(layer.beta)
        self.epsilon = layer.epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = [
            functional.group_norm(piece, groups, weight, bias, self.epsilon)
            for piece, groups, weight, bias in zip(
                x.split(self.channels, dim=1),
                self.groups,
                self.weight.split(self.channels),
                self.bias.split(self.channels),
                strict=True,
            )
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def convolution(layer: SlimmableConv2D) -> nn.Conv2d:
    """The same convolution with the same weights."""
    height, _, channels_in, channels_out = layer.kernel.shape
    conv = nn.Conv2d(channels_in, channels_out, height, layer.strides, padding=height // 2)
    conv.weight = _parameter(layer.kernel, (3, 2, 0, 1))
    conv.bias = _parameter(layer.bias)
    return conv


def dense(layer: SlimmableDense) -> nn.Linear:
    """The same dense layer with the same weights."""
    linear = nn.Linear(*layer.kernel.shape)
    linear.weight = _parameter(layer.kernel, (1, 0))
    linear.bias = _parameter(layer.bias)
    return linear


def _parameter(variable: Any, axes: tuple[int, ...] | None = None) -> nn.Parameter:
    value = np.ascontiguousarray(np.transpose(np.asarray(variable), axes))
    return nn.Parameter(torch.from_numpy(value.copy()), requires_grad=False)


def _stage(layers: list[Any]) -> nn.ModuleList:
    return nn.ModuleList(_module(layer) for layer in layers)


def _module(layer: Any) -> nn.Module:
    if isinstance(layer, ResidualBlock):
        return TorchResidualBlock(layer)
    if isinstance(layer, AttentionBlock):
        return TorchAttentionBlock(layer)
    return TorchUpsample(layer) if isinstance(layer, Upsample) else convolution(layer)


def _run(layer: nn.Module, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    return layer(h, embedding) if isinstance(layer, TorchResidualBlock) else layer(h)
