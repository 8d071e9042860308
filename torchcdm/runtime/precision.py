"""Precision of products of float32: what a user may have lowered, and what measurements raise again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import backends


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
