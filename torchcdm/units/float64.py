"""Modules whose constants stay exact when the network around them changes precision."""

from __future__ import annotations

from torch import nn


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
