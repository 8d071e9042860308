"""Importance weights from log ratios, and how many samples they leave."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from torchcdm.errors import UserError


def effective_sample_size(weights: Any) -> float:
    """(sum w)² / sum w²: so many samples of equal weight estimate a mean as well (Kish, 1965).

    Args:
        weights: Not negative, (N,).

    Raises:
        UserError: Negative or infinite weights, none, or only zeros.
    """
    w = checked(weights, "the weights")
    if (w < 0).any() or not w.any():
        raise UserError("the weights must not be negative and not all zero")
    w = w / w.max()
    return float(w.sum() ** 2 / np.square(w).sum())


def check_clip(clip: float | None) -> None:
    """Refuses a ``clip`` that is no share."""
    if clip is not None and not (isinstance(clip, Real) and 0 < clip <= 1):
        raise UserError(f"clip is {clip!r}; it is a quantile of the weights, above 0 and at most 1, such as 0.999")


def importance_weights(log_ratio: np.ndarray, clip: float | None = None) -> np.ndarray:
    """exp(log ratio) over its mean: float64 (N,) with mean 1.

    Args:
        log_ratio: Nats, finite, (N,).
        clip: Weights above this quantile of them are set to it; none when None.

    Raises:
        UserError: ``clip`` is no share, or log ratios that are no finite numbers.
    """
    check_clip(clip)
    log_ratio = checked(log_ratio, "the log ratios")
    limit = np.inf if clip is None else np.quantile(log_ratio, clip)
    weights = np.exp(np.minimum(log_ratio, limit) - log_ratio.max())
    return weights / weights.mean()


def checked(values: Any, name: str) -> np.ndarray:
    """Finite numbers as float64 (N,).

    Raises:
        UserError: None, another shape, or values that are no finite numbers.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "buif" or values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise UserError(f"{name} must be finite numbers of shape (N,); got {values.dtype} of shape {values.shape}")
    return values.astype(np.float64)
