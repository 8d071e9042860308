"""The encoder-only network: the backward pass plays the part of a U-Net's decoder."""

import math
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError
from torchcdm.networks import blocks as parts
from torchcdm.networks.heads import HeadedBackbone, at_least_float32, make_head
from torchcdm.runtime.validation import Count, Rate, Sides, Width, Widths, checked


@final
class Summary(nn.Module):
    """What one resolution tells the head: ``pooled`` features and ``energy_maps`` inner products with the input.

    As sum(s(x) * x) has s(x) itself in its gradient, the denoiser contains the features directly.
    """

    def __init__(self, channels: int, in_channels: int, pooled: int, energy_maps: int) -> None:
        super().__init__()
        self.energy_maps = energy_maps
        self.norm, self.activation = parts.group_norm(channels), parts.SiLU()
        self.pooled = parts.Pointwise(channels, pooled)
        self.energy = nn.Conv2d(channels, energy_maps * in_channels, 1)
        self.features = pooled + energy_maps

    def forward(self, h: Tensor, image: Tensor) -> Tensor:
        """Features (B, channels, H, W) and the image averaged to their size, to (B, features)."""
        h = self.activation(self.norm(h))
        # Over the number of pixels only now: going back, a mean divides each of them.
        pooled = at_least_float32(self.activation(self.pooled(h))).sum((2, 3)) / h.shape[2:].numel()
        # The maps are linear in h, so h meets the image before them: sums over pixels (B, in_channels, channels).
        with torch.autocast(h.device.type, enabled=False):
            h, image = at_least_float32(h).flatten(2), at_least_float32(image).flatten(2)
            maps = (self.energy.weight, self.energy.bias)
            weight, bias = (at_least_float32(part).view(self.energy_maps, -1) for part in maps)
            if parts.few_channels(image):
                products = torch.cat([(h * channel[:, None]).sum(2) for channel in image.unbind(1)], 1)
            else:
                products = (h @ image.mT).mT.flatten(1)
            energies = nn.functional.linear(products, weight)
            energies = energies + nn.functional.linear(image.sum(2), bias)
        return torch.cat([pooled, energies.to(pooled.dtype)], 1)


@final
class Encoder(parts.ImageNetwork, HeadedBackbone):
    """Residual blocks at falling resolutions, each summarised for the head; about half the cost of a U-Net.

    Other arguments as in :class:`ImageNetwork` and :class:`HeadedBackbone`.

    Args:
        width: Channels at the first resolution, before its multiplier.
        energy_maps: Inner products with the image at each resolution.
        positions: Adds a learned map after the first convolution, for images in which the place of a pixel matters.
        hidden: Hidden units of the head, which is linear in what the resolutions tell when None.
        pooled: Features that the head is told of each resolution, as means over its pixels. When None four times the
            channels of the last, and a quarter as many a channel of each before it, down to a quarter.

    UserError where ``pooled`` has not as many numbers as ``multipliers``.

    Example:
        >>> Encoder(1, 8, levels=102, multipliers=(1, 2))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 102])
    """

    @checked
    def __init__(
        self, in_channels: Width, image_size: parts.ImageSize, levels: int, width: Width = 32,
        multipliers: Widths = (1, 2, 2), blocks: Width = 2, dropout: Rate = 0.0, attention: Sides = (),
        energy_maps: Width = 32, classes: Count | None = None, joint: bool = False, positions: bool = False,
        hidden: Width | None = None, pooled: Widths | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = parts.halved_sizes(image_size, len(multipliers))
        if pooled is None:
            # A feature costs as much as its resolution has pixels.
            times = [max(4.0 ** (1 - behind), 0.25) for behind in reversed(range(len(multipliers)))]
            pooled = [math.ceil(k * width * multiplier) for k, multiplier in zip(times, multipliers, strict=True)]
        elif len(pooled) != len(multipliers):
            found = f"{len(pooled)} numbers for {len(multipliers)} resolutions"
            raise UserError(f"network: pooled has {found}; give one for each, or null for the usual ones")
        self.classes, self.joint = classes, joint
        embedding = 4 * width if classes is not None and not joint else None
        self.label = None if embedding is None else parts.LabelEmbedding(classes, embedding)
        options = {"dropout": dropout, "embedding": embedding}

        channels = width * multipliers[0]
        self.conv_in = parts.ImageConvolution(in_channels, channels)
        self.positions = nn.Parameter(torch.zeros(channels, *sizes[0])) if positions else None
        self.stages, self.downs, self.summaries = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (multiplier, size) in enumerate(zip(multipliers, sizes, strict=True)):
            if i:
                self.downs.append(parts.Downsampling(channels))
            inputs, channels = [channels, *[width * multiplier] * (blocks - 1)], width * multiplier
            attend = max(size) in attention
            self.stages.append(nn.ModuleList(parts.AttentiveBlock(c, channels, attend, **options) for c in inputs))
            self.summaries.append(Summary(channels, in_channels, pooled[i], energy_maps))
        self.head = make_head(sum(s.features for s in self.summaries), levels, classes, joint, hidden)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        embedding = None if self.label is None else self.label(y, x)
        h, image, features = self.conv_in(x), x, []
        if self.positions is not None:
            h += self.positions
        for i, (stage, summary) in enumerate(zip(self.stages, self.summaries, strict=True)):
            if i:
                h, image = self.downs[i - 1](h), nn.functional.avg_pool2d(image, 2)
            for step in stage:
                h = step(h, embedding)
            features.append(summary(h, image))
        return torch.cat(features, 1)
