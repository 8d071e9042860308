"""Flow matching with torchcfm: its network and its loss, our integration of the likelihood."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from studies.budget import Budget
from studies.compare.denoising import FittedDenoiser
from studies.compare.gradient import Recipe, Trainable, seeded, train
from studies.compare.peer import Peer, Task
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level, OptimalTransportSchedule
from torchcdm.models.denoiser import Denoiser
from torchcdm.units import DataTransform

LEVELS = 999
"""Of the optimal-transport path, on which flow matching runs in continuous time."""

VALIDATION_DRAWS = 4
"""Times and noises for each validation sample."""


@final
class FlowMatching(Denoiser):
    """A velocity network of flow matching as a denoiser (identity 5).

    torchcfm's time runs from noise, 0, to data, 1, and its velocity is x_0 - eps: alpha_t, and the negative of ours.
    The probability flow of this denoiser is the network's own ODE, whichever way noise and data were paired.

    Args:
        velocity: ``(time (B,), x (B, *shape)) -> (B, *shape)``.
        transform: Of the data.
        levels: Levels of the path.
    """

    def __init__(self, velocity: nn.Module, transform: DataTransform, levels: int = LEVELS) -> None:
        super().__init__(OptimalTransportSchedule(levels), transform)
        self.velocity = velocity

    @property
    def classes(self) -> None:
        return None

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        time = alpha_t.flatten().expand(len(x_t))
        eps = (x_t - alpha_t * self.velocity(time, x_t)) / (alpha_t + sigma_t)
        return Prediction(x_t, alpha_t, sigma_t, eps)


@final
class VelocityOfVectors(nn.Module):
    """torchcfm's MLP, with time as one more input.

    Args:
        dim: Of the vectors.
        width: Of the hidden layers.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        from torchcfm.models import MLP

        self.net = MLP(dim, w=width, time_varying=True)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, time[:, None]], 1))


@final
class Matching(Trainable):
    """The conditional flow-matching loss.

    Args:
        velocity: The network.
    """

    def __init__(self, velocity: nn.Module) -> None:
        super().__init__()
        self.velocity = velocity

    def loss(self, z: Tensor) -> Tensor:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        time, x, target = ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(
            torch.randn_like(z), z
        )
        return (self.velocity(time, x) - target).square().mean()

    def validation_loss(self, z: Tensor) -> float:
        with torch.no_grad():
            return sum(float(self.loss(z)) for _ in range(VALIDATION_DRAWS)) / VALIDATION_DRAWS


@final
class FlowMatchingPeer(Peer):
    """Flow matching (Lipman et al., 2022, arXiv 2210.02747) as in torchcfm's examples.

    Images: the U-Net of its MNIST example. Vectors: its MLP of width 64, four times as wide above 16 dimensions.
    Averaged weights as in its CIFAR-10 example, over fewer steps.
    """

    name: ClassVar[str] = "flow-matching"
    title: ClassVar[str] = "flow matching"
    library: ClassVar[str] = "torchcfm"
    recipe: ClassVar[Recipe] = Recipe(lr=1e-3, batch_size=128, ema_decay=0.995)

    def fit(self, task: Task, budget: Budget, rate: float = 1.0) -> FittedDenoiser:
        with seeded(task.seed):
            velocity, architecture = self._network(task.source.shape)
            module, training = train(
                Matching(velocity), task, self.recipe, budget, rate, self.title, architecture
            )
        denoiser = FlowMatching(module.velocity, task.source.transform).to(task.device).eval()
        return FittedDenoiser(denoiser, training, with_elbo=False)

    def _network(self, shape: tuple[int, ...]) -> tuple[nn.Module, str]:
        if len(shape) == 1:
            width = 64 if shape[0] <= 16 else 256
            return VelocityOfVectors(shape[0], width), f"independent pairs, MLP of width {width}"
        from torchcfm.models.unet import UNetModel

        halvings = sum(all(side % 2**k == 0 for side in shape[1:]) for k in (1, 2))
        multipliers = (1, 2, 2)[: halvings + 1]
        network = UNetModel(dim=shape, num_channels=32, num_res_blocks=1, channel_mult=multipliers)
        return network, f"independent pairs, U-Net of 32 channels x {multipliers}, one block a resolution"
