"""Convolution and SiLU whose second derivatives are written by hand: they take 0.7 of the memory of PyTorch's.

Training a CDM differentiates a gradient, where no difference stands for that
(:func:`torchcdm.losses.differences_suffice`), and so does the divergence of its flow. PyTorch's own second derivative
of SiLU is put together from many elementwise passes, and that of a convolution takes the gradient of the weights by a
convolution with swapped axes. Here a first derivative is a function of its own, with its derivative given.

They stand in for PyTorch's layers, with the same names of weights, inside :func:`second_derivatives`. Elsewhere, and
under the compiler, which fuses passes itself, they are PyTorch's: a first derivative needs no help.
"""

from __future__ import annotations

from collections.abc import Iterator
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


@final
class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` without dilation, groups or padding modes."""

    def forward(self, x: Tensor) -> Tensor:
        if not _by_hand():
            return super().forward(x)
        weight, bias, device = self.weight, self.bias, x.device.type
        # Autocast does not see inside a function of its own.
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            half = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
        return _Convolution.apply(x, weight, bias, self.stride, self.padding)


@final
class SiLU(nn.SiLU):
    """:class:`torch.nn.SiLU`."""

    def forward(self, x: Tensor) -> Tensor:
        return _SiLU.apply(x) if _by_hand() else super().forward(x)


class _Remembering(Function):
    """Saves the first two inputs, tensors, for the derivative; those from the fourth on are ``ctx.options``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[3:]


class _Convolution(_Remembering):
    """``conv2d(x, weight, bias)``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        return nn.functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        of_x = _InputGradient.apply(grad, weight, x.shape, *ctx.options) if need_x else None
        of_weight = nn.grad.conv2d_weight(x, weight.shape, grad, *ctx.options) if need_weight else None
        return of_x, of_weight, grad.sum((0, 2, 3)) if need_bias else None, None, None


class _InputGradient(_Remembering):
    """The gradient of ``conv2d`` in its input, which is linear in ``grad`` and ``weight``."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, shape: torch.Size, stride: Any, padding: Any) -> Tensor:
        return nn.grad.conv2d_input(shape, weight, grad, stride, padding)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        need_grad, need_weight = ctx.needs_input_grad[:2]
        of_grad = _Convolution.apply(v, weight, None, *ctx.options) if need_grad else None
        of_weight = nn.grad.conv2d_weight(v, weight.shape, grad, *ctx.options) if need_weight else None
        return of_grad, of_weight, None, None, None


class _SiLU(_Remembering):
    """``silu(x)``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SiLUGradient.apply(grad, *ctx.saved_tensors)


class _SiLUGradient(_Remembering):
    """``grad * silu'(x)``; with s the sigmoid, silu'' = s (1 - s) (2 + x (1 - 2 s))."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad, x = ctx.saved_tensors
        of_grad = _SiLUGradient.apply(v, x) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_grad, None
        s = x.sigmoid()
        slope = torch.ops.aten.sigmoid_backward(v * grad, s)
        return of_grad, slope * torch.addcmul(x + 2, x, s, value=-2)
