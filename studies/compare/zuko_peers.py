"""Flows of zuko: neural spline flow, masked autoregressive flow, and FFJORD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from studies.compare.flows import FlowModule, FlowPeer
from studies.compare.gradient import Recipe
from torchcdm.likelihood.flow import EXACT_DIMENSIONS

HIDDEN = (256, 256)
"""Between the three layers of 128 of zuko's README and the two of 512 of its tabular benchmark."""

RECIPE = Recipe(lr=1e-3, batch_size=256, weight_decay=1e-4, optimizer=torch.optim.AdamW)
"""Of zuko's tabular benchmark."""


@final
class ZukoFlow(FlowModule):
    """A zuko flow behind the standardisation that its documentation recommends.

    Args:
        flow: A ``zuko.lazy.Flow``.
        z: Training samples, model units (N, *shape).
        network: The part whose calls are counted.
    """

    def __init__(self, flow: nn.Module, z: Tensor, network: nn.Module) -> None:
        super().__init__(flow, z, flat=True)
        self.network = network

    def density(self, w: Tensor) -> Tensor:
        return self.flow().log_prob(w)

    def draw(self, n: int) -> Tensor:
        return self.flow().sample((n,))


class AutoregressivePeer(FlowPeer):
    """A zuko flow of masked autoregressive transforms.

    Attributes:
        transforms: How many.
    """

    library: ClassVar[str] = "zuko"
    recipe: ClassVar[Recipe] = RECIPE
    transforms: ClassVar[int]

    def build(self, z: Tensor) -> ZukoFlow:
        import zuko

        kind = {"nsf": zuko.flows.NSF, "maf": zuko.flows.MAF}[self.name]
        flow = kind(z[0].numel(), transforms=self.transforms, hidden_features=HIDDEN)
        # One of the transforms: all are called equally often.
        return ZukoFlow(flow, z, flow.transform.transforms[0].hyper)

    def architecture(self, shape: Sequence[int]) -> str:
        return f"{self.transforms} autoregressive transforms, MLP {' x '.join(map(str, HIDDEN))}, standardised"


@final
class NSF(AutoregressivePeer):
    """Neural spline flow (Durkan et al., 2019, arXiv 1906.04032), rational-quadratic, autoregressive."""

    name: ClassVar[str] = "nsf"
    title: ClassVar[str] = "neural spline flow"
    transforms: ClassVar[int] = 3


@final
class MAF(AutoregressivePeer):
    """Masked autoregressive flow (Papamakarios et al., 2017, arXiv 1705.07057)."""

    name: ClassVar[str] = "maf"
    title: ClassVar[str] = "MAF"
    transforms: ClassVar[int] = 5


@final
class FFJORD(FlowPeer):
    """Continuous normalising flow with a free-form Jacobian (Grathwohl et al., 2018, arXiv 1810.01367).

    The divergence is the exact trace in few dimensions, above a Hutchinson estimate with one probe: unbiased, so the
    mean NLL is right and its standard error contains the probes'.
    """

    name: ClassVar[str] = "ffjord"
    title: ClassVar[str] = "FFJORD"
    library: ClassVar[str] = "zuko"
    recipe: ClassVar[Recipe] = RECIPE

    def build(self, z: Tensor) -> ZukoFlow:
        import zuko

        dim = z[0].numel()
        flow = zuko.flows.CNF(dim, hidden_features=HIDDEN, exact=dim <= EXACT_DIMENSIONS)
        return ZukoFlow(flow, z, _transform(flow).ode)

    def architecture(self, shape: Sequence[int]) -> str:
        return f"CNF, MLP {' x '.join(map(str, HIDDEN))}, adaptive Dormand-Prince, one Hutchinson probe, standardised"


def _transform(flow: nn.Module) -> nn.Module:
    """The one transform of a CNF, which zuko may wrap in a composition."""
    return getattr(flow.transform, "transforms", [flow.transform])[0]
