"""Networks for vectors, such as rows of a table: the classifier and the time-conditioned baseline."""

from typing import final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError
from torchcdm.networks.blocks import LabelEmbedding, time_embedding, two_layers
from torchcdm.networks.heads import HeadedBackbone, at_least_float32, from_zero, make_head
from torchcdm.runtime.validation import Count, Rate, Width, checked


@final
class VectorBlock(nn.Module):
    """LayerNorm, then twice SiLU and a linear layer, beside an identity; arguments as in :class:`ResidualBlock`."""

    def __init__(self, width: int, dropout: float = 0.0, embedding: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width)
        self.project = None if embedding is None else nn.Linear(embedding, width)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, width) and the vector (B, embedding) to (B, width)."""
        h = self.linear1(nn.functional.silu(self.norm(x)))
        if self.project is not None:
            h = h + self.project(nn.functional.silu(embedding))
        return x + self.linear2(self.dropout(nn.functional.silu(h)))


@final
class MLP(HeadedBackbone):
    """Residual SiLU blocks; the head sees the last features and inner products of them with the input.

    An inner product <x, s(x)> has s(x) itself in its gradient, so that the denoiser contains the features directly.
    Other arguments as in :class:`HeadedBackbone`.

    Args:
        dim: Numbers in one sample.
        width: Width of the hidden layers.
        depth: Residual blocks.
        dropout: Rate inside the blocks.
        energy_maps: Inner products with the input, ``width * dim`` weights each. None: 32, and fewer for
            more than a hundred numbers, where they cost most.
        context: Numbers that the density is conditional on, added inside the blocks as a label is; None: none.

    Example:
        >>> MLP(2, levels=102)(torch.zeros(5, 2)).shape
        torch.Size([5, 102])
    """

    @checked
    def __init__(
        self, dim: Count, levels: int, width: Width = 256, depth: Width = 4, dropout: Rate = 0.0,
        energy_maps: Width | None = None, classes: Count | None = None, joint: bool = False,
        context: Width | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if context is not None and classes is not None:
            raise UserError("network: it takes classes or a context, not both; put the class into the context")
        energy_maps = energy_maps or (32 if dim <= 100 else max(4, 3200 // dim))
        self.dim, self.energy_maps = dim, energy_maps
        self.classes, self.joint, self.context = classes, joint, context
        self.label = LabelEmbedding(classes, width) if classes is not None and not joint else None
        self.given = None if context is None else two_layers(context, width)
        self.linear_in = nn.Linear(dim, width)
        embedding = width if self.label or self.given else None
        self.blocks = nn.ModuleList(VectorBlock(width, dropout, embedding) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.energy = nn.Linear(width, energy_maps * dim)
        self.head = make_head(width + energy_maps, levels, classes, joint)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.context is not None and y is None:
            raise UserError(f"this density is conditional on {self.context} numbers a sample, and none was given")
        given = None if self.given is None else self.given(y.to(self.linear_in.weight.dtype))
        embedding = given if self.label is None else self.label(y, x)
        h = self.linear_in(x)
        for block in self.blocks:
            h = block(h, embedding)
        features = nn.functional.silu(self.norm(h))
        maps = self.energy(features).unflatten(1, (self.energy_maps, self.dim))
        energies = at_least_float32(maps * x[:, None]).sum(2)
        return torch.cat([at_least_float32(features), energies], 1)


@final
class DDMMLP(nn.Module):
    """The baseline on vectors: the same blocks, told the level, estimate the noise itself; arguments as of the MLP."""

    @checked
    def __init__(
        self, dim: Count, width: Width = 256, depth: Width = 4, dropout: Rate = 0.0, classes: Count | None = None
    ) -> None:
        super().__init__()
        self.width, self.classes = width, classes
        self.time = two_layers(width, width)
        self.label = None if classes is None else LabelEmbedding(classes, width)
        self.linear_in = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(VectorBlock(width, dropout, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.linear_out = from_zero(nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """eps (B, dim) from noisy vectors ``x`` (B, dim), levels ``t`` (B,) and classes ``y`` (B,)."""
        embedding = self.time(time_embedding(t, self.width, x.dtype))
        if self.label is not None:
            embedding = embedding + self.label(y, x)
        h = self.linear_in(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.linear_out(nn.functional.silu(self.norm(h)))
