"""Flows of normflows: RealNVP, Glow, Residual Flow and i-ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from studies.compare.flows import FlowModule, FlowPeer
from studies.compare.gradient import Recipe


@final
class NormflowsFlow(FlowModule):
    """A normflows model.

    Args:
        flow: ``NormalizingFlow`` or ``MultiscaleFlow``.
        z: Training samples, model units (N, *shape).
        flat: Whether it takes vectors.
        network: The part whose calls are counted.
        lipschitz: Power iterations after each step, which keep residual blocks invertible; 0 for other flows.
    """

    def __init__(self, flow: nn.Module, z: Tensor, flat: bool, network: nn.Module, lipschitz: int = 0) -> None:
        super().__init__(flow, z, flat)
        self.network, self.lipschitz = network, lipschitz

    def density(self, w: Tensor) -> Tensor:
        # A multiscale flow asks for classes, which there are none of.
        return self.flow.log_prob(w) if self.flat else self.flow.log_prob(w, None)

    def draw(self, n: int) -> Tensor:
        return self.flow.sample(n)[0]

    def after_step(self) -> None:
        if self.lipschitz:
            from normflows.utils import update_lipschitz

            update_lipschitz(self.flow, self.lipschitz)


class NormflowsPeer(FlowPeer):
    """A flow of normflows."""

    library: ClassVar[str] = "normflows"


@final
class RealNVP(NormflowsPeer):
    """RealNVP (Dinh et al., 2017, arXiv 1605.08803), as in normflows' README: affine couplings, halves swapped."""

    name: ClassVar[str] = "realnvp"
    title: ClassVar[str] = "RealNVP"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-4, batch_size=512, weight_decay=1e-5)
    couplings: ClassVar[int] = 32
    hidden: ClassVar[int] = 64

    def build(self, z: Tensor) -> NormflowsFlow:
        import normflows as nf

        dim = z[0].numel()
        sizes, layers, networks = [(dim + 1) // 2, dim // 2], [], []
        for _ in range(self.couplings):
            kept, moved = sizes
            networks.append(nf.nets.MLP([kept, self.hidden, self.hidden, 2 * moved], init_zeros=True))
            layers += [nf.flows.AffineCouplingBlock(networks[-1]), nf.flows.Permute(dim, mode="swap")]
        flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), layers)
        return NormflowsFlow(flow, z, True, networks[0])

    def architecture(self, shape: Sequence[int]) -> str:
        return f"{self.couplings} affine couplings, MLP {self.hidden} x {self.hidden}, halves swapped, standardised"


@final
class Glow(NormflowsPeer):
    """Glow (Kingma and Dhariwal, 2018, arXiv 1807.03039), multiscale; images whose sides are even.

    normflows' example for CIFAR-10 has three scales of 16 blocks with 256 channels. Images with fewer values than
    that get a quarter of the channels, and as many scales as their sides can be halved, three at most.
    """

    name: ClassVar[str] = "glow"
    title: ClassVar[str] = "Glow"
    recipe: ClassVar[Recipe] = Recipe(lr=1e-3, batch_size=128, weight_decay=1e-5)
    flat: ClassVar[bool] = False
    blocks: ClassVar[int] = 16
    example_values: ClassVar[int] = 3 * 32 * 32

    def unsuited(self, shape: Sequence[int]) -> str | None:
        if len(shape) != 3:
            return "Glow models images; for vectors take realnvp"
        return None if self.scales(shape) else f"Glow halves the sides of images: {shape[1]} x {shape[2]} has none"

    @staticmethod
    def scales(shape: Sequence[int]) -> int:
        """How often both sides can be halved down to 2 pixels, three times at most."""
        return sum(all(side % 2**k == 0 and side >= 2 ** (k + 1) for side in shape[1:]) for k in (1, 2, 3))

    def channels(self, shape: Sequence[int]) -> int:
        """Of the hidden layers."""
        return 256 if torch.Size(shape).numel() >= self.example_values else 64

    def build(self, z: Tensor) -> NormflowsFlow:
        import normflows as nf

        channels, height, width = z.shape[1:]
        count, hidden = self.scales(z.shape[1:]), self.channels(z.shape[1:])
        bases, layers, merges = [], [], []
        # From the coarsest scale to the finest, in the direction of sampling.
        for scale in range(count):
            halvings = count - scale
            inside = channels * 2 ** (halvings + 1)
            blocks = [nf.flows.GlowBlock(inside, hidden, split_mode="channel") for _ in range(self.blocks)]
            layers.append([*blocks, nf.flows.Squeeze()])
            if scale:
                merges.append(nf.flows.Merge())
            kept = inside if scale == 0 else inside // 2
            bases.append(nf.distributions.DiagGaussian((kept, height >> halvings, width >> halvings)))
        flow = nf.MultiscaleFlow(bases, layers, merges, class_cond=False)
        coupling = layers[0][0].flows[0].flows[1]
        return NormflowsFlow(flow, z, False, coupling.param_map)

    def architecture(self, shape: Sequence[int]) -> str:
        return f"{self.scales(shape)} scales of {self.blocks} blocks, {self.channels(shape)} channels"


class ResidualPeer(NormflowsPeer):
    """Invertible residual blocks as in normflows' example.

    Attributes:
        terms: Terms of the power series of the log-determinant in training; None for a random number that makes the
            estimate unbiased. Scoring takes at least twenty and is unbiased in either case.
    """

    recipe: ClassVar[Recipe] = Recipe(lr=3e-4, batch_size=512, weight_decay=1e-5)
    blocks: ClassVar[int] = 16
    hidden: ClassVar[int] = 128
    terms: ClassVar[int | None]

    def build(self, z: Tensor) -> NormflowsFlow:
        import normflows as nf

        dim, layers = z[0].numel(), []
        for _ in range(self.blocks):
            network = nf.nets.LipschitzMLP([dim, self.hidden, self.hidden, dim], lipschitz_const=0.9, init_zeros=True)
            block = nf.flows.Residual(network, reduce_memory=True, n_power_series=self.terms)
            layers += [block, nf.flows.ActNorm(dim)]
        flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
        return NormflowsFlow(flow, z, True, layers[0].iresblock.nnet, lipschitz=50)

    def architecture(self, shape: Sequence[int]) -> str:
        series = "unbiased log-determinant" if self.terms is None else f"log-determinant of {self.terms} terms"
        return f"{self.blocks} residual blocks, MLP {self.hidden} x {self.hidden}, ActNorm, {series}, standardised"


@final
class ResidualFlow(ResidualPeer):
    """Residual Flow (Chen et al., 2019, arXiv 1906.02735)."""

    name: ClassVar[str] = "residual-flow"
    title: ClassVar[str] = "Residual Flow"
    terms: ClassVar[int | None] = None


@final
class IResNet(ResidualPeer):
    """i-ResNet (Behrmann et al., 2019, arXiv 1811.00995)."""

    name: ClassVar[str] = "i-resnet"
    title: ClassVar[str] = "i-ResNet"
    terms: ClassVar[int | None] = 10
