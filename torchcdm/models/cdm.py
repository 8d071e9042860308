"""Classification diffusion: densities, scores and denoisers from one classifier of noise levels."""

from typing import final

import torch
from torch import Tensor, nn

from torchcdm.diffusion.base import BaseDensity, StandardNormal
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.density import DensityModel
from torchcdm.networks.heads import at_least_float32
from torchcdm.random import stream
from torchcdm.runtime.precision import Float64Module
from torchcdm.units import DataTransform


def log_shares(frequencies: Tensor) -> Tensor:
    """log p(y) of classes by their frequencies, (classes,)."""
    return (frequencies / frequencies.sum()).log()


@final
class ClassificationDiffusion(Float64Module, DensityModel):
    """A classifier of noise levels, read as a density at every level (identities 1 to 4).

    The backbone's output h corrects a base density that is known in closed form at every level:
    ``log p_t(x) = base_t(x) + h_t(x) - h_{T+1}(x)``. With the standard normal as base this is identity 1; with
    fitted Gaussian marginals the network learns only what is not Gaussian. The classifier's logits are the
    same numbers: ``p(t | x) = softmax_t(log p_t(x))`` under the uniform prior over levels of training. Constants of
    the levels, 0 unless :mod:`torchcdm.training.finish` has set them, are added to h.

    A *joint* backbone gives (B, classes, T+2): log p_t(x|y) for all classes at once (identity 10).

    Args:
        backbone: Any twice differentiable ``nn.Module``: ``(x (B, *shape), y (B,) or None) -> h (B, T+2)``; called
            with ``x`` alone where it has neither ``classes`` nor ``context``.
        schedule: The noise schedule, T + 2 levels.
        transform: Data units to model units; None where the caller works in model units.
        gaussian: The base density; the standard normal when None.
        class_prior: p(y) of a joint backbone, (classes,), or frequencies; uniform when None, UserError for others. A
            training sets it to the frequencies of its labels.

    Example:
        >>> schedule = UniformSigmaSchedule(100)
        >>> model = ClassificationDiffusion(MLP(2, levels=102), schedule)
        >>> model.log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self, backbone: nn.Module, schedule: NoiseSchedule, transform: DataTransform | None = None,
        gaussian: BaseDensity | None = None, class_prior: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(schedule, transform, backbone, StandardNormal(schedule) if gaussian is None else gaussian)
        self.level_constants = nn.Buffer(torch.zeros(schedule.T + 2))
        if self.joint:
            prior = torch.ones(self.classes or 1) if class_prior is None else torch.as_tensor(class_prior)
            fits = prior.shape == (self.classes or 1,) and bool((prior >= 0).all()) and float(prior.sum()) > 0
            if not fits:
                raise UserError(f"class_prior: {self.classes} numbers are needed, none negative, and one above 0")
            self.log_class_prior = nn.Buffer(log_shares(prior))

    @property
    def joint(self) -> bool:
        return getattr(self.backbone, "joint", False)

    def class_log_prob_levels(self, x_t: Tensor) -> Tensor:
        """log p_t(x_t | y) of every class and level, float64 (B, classes, T+2); UserError if not joint."""
        if not self.joint:
            raise UserError("class_log_prob_levels needs a backbone with a joint head over (class, level)")
        self.check_inputs(x_t)
        return self.base.log_prob_levels(x_t)[:, None] + self._class_corrections(x_t).double()

    def class_posterior(self, x_t: Tensor, t: Level) -> Tensor:
        """p(y | x_t, t), (B, classes): the classifier that the joint logits contain (identity 10)."""
        joint = self.class_log_prob_levels(x_t) + self.log_class_prior[:, None]
        self.schedule.check_levels(t, x_t)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        return joint[torch.arange(len(x_t), device=x_t.device), :, levels].softmax(1)

    def draw_classes(self, n: int, seed: int = 0) -> Tensor | None:
        if not self.joint or self.classes is None:
            return None
        edges = self.log_class_prior.double().exp().cumsum(0)[:-1]
        places = torch.rand(n, generator=stream(seed, "classes"), dtype=torch.float64)
        return torch.bucketize(places.to(edges), edges)

    def _network(self, x_t: Tensor, y: Tensor | None) -> Tensor:
        """h - h_{T+1} with the constants of the levels, (B, [classes,] T+2), at least float32."""
        h = at_least_float32(self.backbone(x_t, y) if self.conditional else self.backbone(x_t))
        if h.shape[-1] != self.schedule.T + 2:
            raise UserError(f"the backbone gives {h.shape[-1]} logits; the schedule has {self.schedule.T + 2} levels")
        return h - h[..., -1:] + self.level_constants.to(h.dtype)

    def _class_corrections(self, x_t: Tensor) -> Tensor:
        """log p_t(x|y) - base_t(x), (B, classes, T+2), of a joint backbone; all classes agree at level T+1."""
        by_class, effects = self._network(x_t, None), self.base.class_effects(x_t)
        return by_class if effects is None else by_class + effects

    def corrections(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.joint:
            correction = self._network(x_t, y)
            return correction, correction
        by_class = self._class_corrections(x_t)
        unconditional = (by_class + self.log_class_prior[:, None].to(by_class.dtype)).logsumexp(1)
        if y is None:
            return unconditional, unconditional
        # Label `classes` is the null label, as in every conditional backbone.
        candidates = torch.cat([by_class, unconditional[:, None]], 1)
        return candidates[torch.arange(len(y), device=y.device), y], unconditional
