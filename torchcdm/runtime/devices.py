"""Devices by name."""

from __future__ import annotations

import warnings

import torch

from torchcdm.errors import UserError, reason


def chosen_device(name: str | torch.device | None) -> torch.device:
    """The device asked for; the best there is when None.

    UserError where it is not there, holds no values (``meta``), or has no float64, in which densities are kept.
    """
    if name is None:
        return best_device()
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=name, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        why = reason(error).split(". ")[0]
        raise UserError(f"device {str(name)!r} cannot be used: {why}; leave --device out, or give cpu") from None
    return torch.device(name)


def best_device() -> torch.device:
    """The GPU where there is one; Apple's are left out, they have no float64."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
