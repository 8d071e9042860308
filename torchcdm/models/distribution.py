"""A density model as a distribution of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from torchcdm.errors import UserError
from torchcdm.models.inputs import as_labels

if TYPE_CHECKING:
    from torchcdm.models.density import DensityModel


@final
class ModelDistribution(Distribution):
    """p_0(x) or p_0(x | y) in data units; nothing makes its log_prob integrate to exactly one.

    Args:
        model: The model.
        y: One class, or one context; None for the unconditional density.
        **options: Of :func:`torchcdm.sample`.

    Raises:
        UserError: The model does not know the shape of its events, or has no such class.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, model: DensityModel, y: Any = None, **options: Any) -> None:
        if model.shape is None:
            raise UserError("distribution: the model has no transform, and so no shape of its events")
        self.model, self.options = model, options
        self.y = as_labels(y, model, 1, one_for_all=True)
        super().__init__(event_shape=torch.Size(model.shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats in data units, float64 (*batch,), from values (*batch, *event_shape): one pass; differentiable."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        x = value.reshape(-1, *self.event_shape)
        y = None if self.y is None else self.y.expand(len(x), *self.y.shape[1:])
        return self.model.log_prob(x, y=y).reshape(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws (*sample_shape, *event_shape) on the CPU; their seed is torch's next random number."""
        n = torch.Size(sample_shape).numel()
        seed = int(torch.randint(2**31, ()))
        y = None if self.y is None else self.y.expand(n, *self.y.shape[1:])
        return self.model.sample(n, y=y, seed=seed, **self.options).reshape(*sample_shape, *self.event_shape)
