"""The DDPM U-Net, as a classifier of noise levels (the paper's CDM) and as a denoiser (its DDM baseline)."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError
from torchcdm.networks import blocks as parts
from torchcdm.networks.heads import CumulativeHead, HeadedBackbone, at_least_float32, from_zero, make_head
from torchcdm.runtime.validation import Count, Rate, Sides, Width, Widths, checked


@final
class UNet(parts.ImageNetwork):
    """What classifier and denoiser share: images, and a vector of width ``embedding``, to features of each pixel."""

    def __init__(
        self, in_channels: int, image_size: parts.ImageSize, channels: int, multipliers: Sequence[int], blocks: int,
        attention: Sequence[int], dropout: float, embedding: int | None, groups: int,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = parts.halved_sizes(image_size, len(multipliers))
        widths = [channels * m for m in multipliers]
        attend = [max(size) in attention for size in sizes]
        step = partial(parts.AttentiveBlock, dropout=dropout, embedding=embedding, groups=groups)

        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down_stages, self.downs = nn.ModuleList(), nn.ModuleList()
        skips, current = [channels], channels
        for i, width in enumerate(widths):
            if i:
                self.downs.append(parts.Downsampling(current))
                skips.append(current)
            inputs, current = [current, *[width] * (blocks - 1)], width
            self.down_stages.append(nn.ModuleList(step(channels, width, attend[i]) for channels in inputs))
            skips += [width] * blocks

        self.middle = nn.ModuleList([step(current, current, True), step(current, current, False)])

        self.up_stages, self.ups = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(widths))):
            stage = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.append(step(current + skips.pop(), widths[i], attend[i]))
                current = widths[i]
            self.up_stages.append(stage)
            if i:
                steps = {"repeat": nn.Upsample(scale_factor=2.0), "conv": nn.Conv2d(current, current, 3, padding=1)}
                self.ups.append(nn.Sequential(OrderedDict(steps)))
        self.norm_out, self.activation = parts.group_norm(current, groups), parts.SiLU()
        self.features = current

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) and the vector (B, embedding) to (B, features, H, W)."""
        h = self.conv_in(x)
        skips = [h]
        for i, stage in enumerate(self.down_stages):
            if i:
                h = self.downs[i - 1](h)
                skips.append(h)
            for step in stage:
                h = step(h, embedding)
                skips.append(h)
        for step in self.middle:
            h = step(h, embedding)
        for i, stage in enumerate(self.up_stages):
            for step in stage:
                h = step(torch.cat([h, skips.pop()], 1), embedding)
            if i < len(self.ups):
                h = self.ups[i](h)
        return self.activation(self.norm_out(h))


@final
class CDMUNet(parts.ImageNetwork, HeadedBackbone):
    """The paper's network: the U-Net without time, pooled over space, one logit a level.

    With 1002 levels and direction ``data`` it has the 33 405 930 parameters of the published CIFAR-10 model. An
    embedded label goes where DDPM has the time. Other arguments as in :class:`ImageNetwork` and
    :class:`HeadedBackbone`.

    Args:
        head_channels: Channels that are pooled for the head; twice the last block's when None, as published.
        direction: ``data``: the published head, a plain linear layer accumulated from level 0. ``noise``: from the
            noise end and zero at the start, which a model with Gaussian residual needs.
    """

    @checked
    def __init__(
        self, in_channels: Width, image_size: parts.ImageSize, levels: int, channels: Width = 128,
        multipliers: Widths = (1, 2, 2, 2), blocks: Width = 2, attention: Sides = (16,), dropout: Rate = 0.1,
        classes: Count | None = None, joint: bool = False, head_channels: Width | None = None,
        direction: Literal["data", "noise"] = "noise", groups: Width = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        if joint and direction == "data":
            raise UserError("network: a joint head accumulates from the noise end; leave direction out, or joint")
        self.classes, self.joint = classes, joint
        width = 4 * channels if classes is not None and not joint else None
        self.label = None if width is None else parts.LabelEmbedding(classes, channels)
        self.embed = None if width is None else parts.two_layers(channels, width)
        self.unet = UNet(in_channels, image_size, channels, multipliers, blocks, attention, dropout, width, groups)
        pooled = head_channels or 2 * self.unet.features
        self.conv_out = nn.Conv2d(self.unet.features, pooled, 3, padding=1)
        self.head = make_head(pooled, levels, classes, joint) if joint else CumulativeHead(pooled, levels, direction)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the head sees, (B, head_channels)."""
        embedding = None if self.label is None else self.embed(self.label(y, x))
        return at_least_float32(self.conv_out(self.unet(x, embedding))).mean((2, 3))


@final
class DDMUNet(parts.ImageNetwork):
    """The DDPM baseline: the same U-Net, told the level, estimates the noise itself; arguments as of the CDM's. The
    embedded label is added to the embedded level."""

    @checked
    def __init__(
        self, in_channels: Width, image_size: parts.ImageSize, channels: Width = 128,
        multipliers: Widths = (1, 2, 2, 2), blocks: Width = 2, attention: Sides = (16,), dropout: Rate = 0.1,
        classes: Count | None = None, groups: Width = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.classes = channels, classes
        width = 4 * channels
        self.embed = parts.two_layers(channels, width)
        self.label = None if classes is None else parts.LabelEmbedding(classes, width)
        self.unet = UNet(in_channels, image_size, channels, multipliers, blocks, attention, dropout, width, groups)
        self.conv_out = from_zero(nn.Conv2d(self.unet.features, in_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """eps (B, C, H, W) from noisy images ``x``, levels ``t`` (B,) and classes ``y`` (B,) or None."""
        embedding = self.embed(parts.time_embedding(t, self.channels, x.dtype))
        if self.label is not None:
            embedding = embedding + self.label(y, x)
        return self.conv_out(self.unet(x, embedding))
