"""Precision: that of products of float32, which a user may have lowered and measurements raise again; and constants
that stay exact when the network around them changes its own."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import backends, nn


def reduced_precision(device: str) -> list[tuple[Callable[[Any], Any], Any, Any]]:
    """What lets PyTorch take products of float32 in TF32 or bfloat16, on a kind of device.

    Of each setting a function that sets it, its value, and that of full precision. PyTorch refuses to read its older
    settings once newer ones contradict them: those say all then.
    """
    cpu, (cuda, cudnn, mkldnn), found = device == "cpu", (backends.cuda, backends.cudnn, backends.mkldnn), []
    with suppress(RuntimeError):
        found += [] if cpu else [(partial(setattr, cudnn, "allow_tf32"), cudnn.allow_tf32, False)]
        found += [(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "highest")]
    if hasattr(backends, "fp32_precision"):  # PyTorch 2.9
        parts = (mkldnn.matmul, mkldnn.conv, mkldnn.rnn) if cpu else (cuda.matmul, cudnn.conv, cudnn.rnn)
        found += [(partial(_set_precision, part), part.fp32_precision, "ieee") for part in parts]
    return [setting for setting in found if setting[1] not in ("none", setting[2])]


def _set_precision(part: Any, value: str) -> None:
    """Sets a part's own precision, unless it is what all parts have."""
    part.fp32_precision = "none"
    if part.fp32_precision != value:
        part.fp32_precision = value


class Float64Module(nn.Module):
    """Its own buffers follow ``.to(device)`` but stay float64, or what they are, under ``.half()`` or ``.to(dtype)``.

    Schedules, scalings and covariances hold constants whose rounding would show in a log-likelihood, which is a
    small difference of sums over thousands of terms.
    """

    def _apply(self, fn, recurse: bool = True):  # noqa: ANN001, ANN202 (signature of nn.Module)
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self
