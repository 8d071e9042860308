"""Building blocks of the convolutional networks; attention is written out, so that it is twice differentiable."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import Function

from torchcdm.errors import UserError

ImageSize = int | Sequence[int]  # side of a square image, or (height, width)


def halved_sizes(image_size: ImageSize, resolutions: int) -> list[tuple[int, int]]:
    """(height, width) at every resolution of a network that halves ``resolutions`` - 1 times.

    UserError for a side that cannot be halved so often; names the nearest sizes that can.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(map(int, image_size))
    if len(sides) != 2:
        raise UserError(f"network: image_size is {sides}; give the side of squares, or height and width")
    height, width = sides
    factor = 2 ** (resolutions - 1)
    if any(side % factor or side < factor for side in (height, width)):
        near = "x".join(str(math.ceil(max(side, 1) / factor) * factor) for side in (height, width))
        what = f"images of {height}x{width} cannot be halved {resolutions - 1} times"
        mend = f"use sides that are multiples of {factor}, such as {near}, or fewer multipliers"
        raise UserError(f"network: {what}; {mend}")
    return [(height // 2**i, width // 2**i) for i in range(resolutions)]


class ImageNetwork(nn.Module):
    """A network for images (B, in_channels, height, width), whose resolutions each halve the one before.

    Args:
        in_channels: Channels of the images.
        image_size: Side, or (height, width); multiples of 2 ** (len(multipliers) - 1), UserError for others.
        channels: Channels at the first resolution, before its multiplier.
        multipliers: Channels at each resolution, as multiples of ``channels``; in an encoder of ``width``.
        blocks: Residual blocks at each resolution; in a U-Net on the way down, and one more on the way up.
        attention: Resolutions (the longer side) whose blocks are followed by self-attention.
        dropout: Rate inside the residual blocks.
        groups: Groups of the normalisation where they divide the channels.
    """


def group_norm(channels: int, groups: int | None = None) -> nn.GroupNorm:
    """GroupNorm with ``groups`` groups where they divide the channels, else with at least 4 channels a group."""
    if groups is None or channels % groups:
        groups = math.gcd(channels, 32)
        while groups > 1 and channels // groups < 4:
            groups //= 2
    return nn.GroupNorm(groups, channels, eps=1e-6)


class LabelEmbedding(nn.Embedding):
    """A vector (B, width) for each class and for the null label, index ``classes``."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width)

    def forward(self, y: Tensor | None, x: Tensor) -> Tensor:
        """Embeds ``y`` (B,); None stands for the null label of every sample of the batch ``x``."""
        if y is None:
            y = torch.full((x.shape[0],), self.num_embeddings - 1, device=x.device)  # no len: see Pointwise
        return super().forward(y)


def two_layers(inputs: int, width: int) -> nn.Sequential:
    """What a context, or an embedded label or level, passes before the blocks see it: (B, inputs) to (B, width)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def time_embedding(t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of the level ``t`` (B,) at geometrically spaced frequencies, (B, width)."""
    half = width // 2
    rates = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / max(half - 1, 1))
    angle = t.float()[:, None] * rates.exp()
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, width % 2)).to(dtype)


@final
class SiLU(nn.SiLU):
    """:class:`torch.nn.SiLU`, in training with its second derivative by hand: 0.7 of the memory of PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        # The compiler fuses the many elementwise passes of PyTorch's own. Sampling takes one derivative alone, and a
        # tenth less time without a function in Python.
        return _SiLU.apply(x) if self.training and not torch.compiler.is_compiling() else super().forward(x)


class _SiLU(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return nn.functional.silu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SiLUGradient.apply(grad, *ctx.saved_tensors)


class _SiLUGradient(Function):
    """``grad * silu'(x)``; with s the sigmoid, silu'' = s (1 - s) (2 + x (1 - 2 s))."""

    generate_vmap_rule = True
    setup_context = _SiLU.setup_context

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        s = x.sigmoid()
        slope = torch.ops.aten.sigmoid_backward(v * grad, s)
        return _SiLUGradient.apply(v, x), slope * torch.addcmul(x + 2, x, s, value=-2)


@final
class Pointwise(nn.Conv2d):
    """A 1x1 convolution, as a matrix product: half of the time on a CPU, where a convolution lays images out anew."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        matrix = self.weight.flatten(1).expand(x.shape[0], -1, -1)  # no len: torch.export would fix the number
        return torch.baddbmm(self.bias[:, None], matrix, x.flatten(2)).unflatten(2, x.shape[2:])


def few_channels(image: Tensor) -> bool:
    """Whether the gradient in an image (B, channels, ...) is better not left to convolutions and products of matrices.

    Going back to few channels they take as long as to many on a CPU: three times as long as plain sums.
    """
    return image.device.type == "cpu" and image.shape[1] <= 4


@final
class ImageConvolution(nn.Conv2d):
    """A 3x3 convolution of an image; of one with :func:`few_channels` as a product with its nine shifts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        if not few_channels(x):
            return super().forward(x)
        (H, W), padded = x.shape[2:], nn.functional.pad(x, (1, 1, 1, 1))
        shifts = torch.cat([padded[..., i : i + H, j : j + W] for i in range(3) for j in range(3)], 1)
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1).expand(x.shape[0], -1, -1)  # no len: see Pointwise
        return torch.baddbmm(self.bias[:, None], matrix, shifts.flatten(2)).unflatten(2, (H, W))


@final
class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU and a 3x3 convolution, beside an identity or 1x1 shortcut.

    From ``inputs`` channels to ``outputs``. ``dropout`` is the rate before the second convolution; ``embedding`` the
    width of a conditioning vector that is added between the convolutions, None for none; ``groups`` as in
    :func:`group_norm`.
    """

    def __init__(
        self, inputs: int, outputs: int, dropout: float = 0.0, embedding: int | None = None, groups: int | None = None
    ) -> None:
        super().__init__()
        self.activation = SiLU()
        self.norm1 = group_norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.project = None if embedding is None else nn.Linear(embedding, outputs)
        self.norm2 = group_norm(outputs, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = None if inputs == outputs else Pointwise(inputs, outputs)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) and the vector (B, embedding) to (B, outputs, H, W)."""
        h = self.conv1(self.activation(self.norm1(x)))
        if self.project is not None:
            h += self.project(nn.functional.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(self.activation(self.norm2(h))))
        h += x if self.shortcut is None else self.shortcut(x)
        return h


@final
class Attention(nn.Module):
    """Self-attention over the pixels, one head, residual. Fused kernels have no second derivative."""

    def __init__(self, channels: int, groups: int | None = None) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.query, self.key, self.value, self.out = (Pointwise(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.query, self.key, self.value))
        weight = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.out((v @ weight.transpose(1, 2)).reshape(x.shape))


@final
class AttentiveBlock(nn.Module):
    """A residual block, followed by attention where asked for; ``options`` of :class:`ResidualBlock`."""

    def __init__(self, inputs: int, outputs: int, attend: bool, **options: Any) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, **options)
        self.attention = Attention(outputs, options.get("groups")) if attend else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) and the vector (B, embedding) to (B, outputs, H, W)."""
        h = self.block(x, embedding)
        return h if self.attention is None else self.attention(h)


@final
class Downsampling(nn.Module):
    """Halves both sides by a strided 3x3 convolution; pads on the right and below only, as DDPM does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, channels, H / 2, W / 2)."""
        # Padded everywhere and cut: a padding layer would copy the larger image, going forth and back.
        return self.conv(x)[..., 1:, 1:]
