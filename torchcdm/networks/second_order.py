"""Convolution, group normalisation and SiLU whose second derivatives are written by hand.

Training a CDM differentiates a gradient, where no difference stands for that
(:func:`torchcdm.losses.differences_suffice`), and so does the divergence of its flow. PyTorch's own second derivatives
of these layers are put together from many elementwise passes, and that of a convolution takes the gradient of the
weights by a convolution with swapped axes, at twice the cost of the kernel made for it. Here a first derivative is a
function of its own, with its derivative given.

They stand in for PyTorch's layers, with the same names of weights, inside :func:`second_derivatives`. Elsewhere, and
under the compiler, which fuses passes itself, they are PyTorch's: a first derivative needs no help.

Autocast does not see inside a function of its own, so the layers do here what it would do: convolutions in its half
precision; norms keep their statistics and weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import Function

_wanted = ContextVar("second_derivatives", default=False)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """A forward pass inside is differentiated twice."""
    if torch.compiler.is_compiling():
        yield
        return
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def _by_hand() -> bool:
    return not torch.compiler.is_compiling() and _wanted.get()


def _autocast_type(x: Tensor) -> torch.dtype | None:
    """The half precision that autocast wants for a convolution of ``x``, None outside of autocast."""
    device = x.device.type
    wanted = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if wanted else None


# --- convolution -------------------------------------------------------------------------------------------------


@final
class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` without dilation, groups or padding modes."""

    def forward(self, x: Tensor) -> Tensor:
        if not _by_hand():
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if (half := _autocast_type(x)) is not None:
            x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
        return _Convolution.apply(x, weight, bias, self.stride, self.padding)


class _Convolution(Function):
    """``conv2d(x, weight, bias)``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        return nn.functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        of_x = _InputGradient.apply(grad, weight, x.shape, ctx.stride, ctx.padding) if need_x else None
        of_weight = _weight_gradient(x, grad, weight, ctx) if need_weight else None
        return of_x, of_weight, grad.sum((0, 2, 3)) if need_bias else None, None, None


class _InputGradient(Function):
    """The gradient of ``conv2d`` in its input, which is linear in ``grad`` and ``weight``."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, shape: torch.Size, stride: Any, padding: Any) -> Tensor:
        return nn.grad.conv2d_input(shape, weight, grad, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        of_grad = _Convolution.apply(v, weight, None, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        of_weight = _weight_gradient(v, grad, weight, ctx) if ctx.needs_input_grad[1] else None
        return of_grad, of_weight, None, None, None


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    return nn.grad.conv2d_weight(x, weight.shape, grad, ctx.stride, ctx.padding)


# --- group normalisation -----------------------------------------------------------------------------------------


@final
class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` with weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        if not _by_hand():
            return super().forward(x)
        if _autocast_type(x) is not None and x.device.type != "cpu":
            x = x.float()  # as autocast does there; the kernels of the CPU take half precision with float32 weights
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)[0]


class _GroupNorm(Function):
    """``group_norm(x, weight, bias)``, beside the mean and the inverse deviation of every group, (B, groups)."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, c = x.shape[:2]
        return torch.native_group_norm(x.contiguous(), weight, bias, n, c, x[0, 0].numel(), groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.groups, ctx.eps = inputs
        _, mean, inverse = output
        ctx.mark_non_differentiable(mean, inverse)
        ctx.save_for_backward(x, weight, mean, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return *_norm_gradients(grad, *ctx.saved_tensors, needed), None, None
        x, weight, mean, inverse = ctx.saved_tensors
        of_x = _NormGradient.apply(grad, x, weight, mean, inverse) if needed[0] else None
        of_weight = None
        if needed[1]:
            of_weight = (grad * nn.functional.group_norm(x, ctx.groups, eps=ctx.eps)).sum((0, 2, 3))
        return of_x, of_weight, grad.sum((0, 2, 3)) if needed[2] else None, None, None


def _norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of ``group_norm`` in x, weight and bias, as far as needed, by PyTorch's kernel."""
    n, c, *size = x.shape
    return torch.ops.aten.native_group_norm_backward(
        grad.contiguous(), x.contiguous(), mean, inverse, weight, n, c, math.prod(size), mean.shape[1], list(needed)
    )


class _NormGradient(Function):
    """The gradient of ``group_norm`` in ``x``; ``mean`` and ``inverse`` are functions of ``x``.

    With g = weight * grad, z = inverse * (x - mean) and <·> the mean over a group it is
    inverse * (g - <g> - z <g z>).
    """

    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        return _norm_gradients(grad, x, weight, mean, inverse, (True, False, False))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # mean and inverse would count as constants
            raise RuntimeError("a gradient through these layers can be differentiated once, not twice")
        grad, x, weight, mean, inverse = ctx.saved_tensors
        v = v.contiguous()
        # Sums over pixels (B, C), then means over groups, (B, C) again: everything else is affine in v, grad and x.
        pixels = x[0, 0].numel()
        sum_v, sum_g, vx, gx, vg = v.sum((2, 3)), grad.sum((2, 3)), _dot(v, x), _dot(grad, x), _dot(v, grad)
        mean, r = _by_channel(mean, x), _by_channel(inverse, x)

        def average(sums: Tensor) -> Tensor:
            grouped = sums.unflatten(1, (inverse.shape[1], -1))
            return (grouped.mean(2, keepdim=True) / pixels).expand_as(grouped).flatten(1)

        v_mean, g_mean = average(sum_v), average(weight * sum_g)
        vz = r * (average(vx) - mean * v_mean)
        gz = r * (average(weight * gx) - mean * g_mean)
        of_grad = of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            scale = weight * r
            of_grad = _affine(scale * (vz * r * mean - v_mean), (scale, v), (-scale * vz * r, x))
        if ctx.needs_input_grad[1]:
            k = r * (3 * vz * gz - average(weight * vg) + v_mean * g_mean)
            constant = r**2 * (gz * v_mean + vz * g_mean - k * mean)
            of_x = _affine(constant, (-(r**2) * gz, v), (-(r**2) * vz * weight, grad), (r**2 * k, x))
        if ctx.needs_input_grad[2]:
            of_weight = (r * (vg - v_mean * sum_g - vz * r * (gx - mean * sum_g))).sum(0)
        return of_grad, of_x, of_weight, None, None


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of the groups (B, groups) as those of the channels, (B, C)."""
    return values.repeat_interleave(x.shape[1] // values.shape[1], 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the pixels of a product, (B, C)."""
    return (a * b).sum((2, 3))


def _affine(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """A constant and multiples of images (B, C, H, W); constant and factors are (B, C)."""
    total = constant[:, :, None, None].to(terms[0][1].dtype)
    for factor, image in terms:
        total = torch.addcmul(total, factor[:, :, None, None].to(image.dtype), image)
    return total


# --- SiLU --------------------------------------------------------------------------------------------------------


@final
class SiLU(nn.SiLU):
    """:class:`torch.nn.SiLU`."""

    def forward(self, x: Tensor) -> Tensor:
        return _SiLU.apply(x) if _by_hand() else super().forward(x)


class _SiLU(Function):
    """``silu(x)``."""

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

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad, x = ctx.saved_tensors
        of_grad = _SiLUGradient.apply(v, x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_grad, None
        s = x.sigmoid()
        slope = torch.ops.aten.sigmoid_backward(v * grad, s)
        return of_grad, slope * torch.addcmul(x + 2, x, s, value=-2)
