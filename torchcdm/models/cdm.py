"""Classification diffusion: densities, scores and denoisers from one classifier of noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from torchcdm.diffusion.gaussian import BaseDensity, StandardNormal
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, Prediction, working_dtype
from torchcdm.models.readout import Readout
from torchcdm.networks.second_order import second_derivatives
from torchcdm.units import DataTransform

Graph = Literal["none", "densities", "denoiser"]
"""What of an evaluation stays differentiable."""


@dataclass(frozen=True)
class Evaluation:
    """All that one forward and one backward pass tell.

    Attributes:
        eps: E[eps | x_t], (B, *shape).
        log_prob_levels: log p_t(x_t | y) at every level, or log p_t(x_t) without labels; float64 (B, T+2).
        unconditional: log p_t(x_t) at every level where the same pass gives it (joint backbones);
            ``log_prob_levels`` itself elsewhere.
    """

    eps: Tensor
    log_prob_levels: Tensor
    unconditional: Tensor


@final
class ClassificationDiffusion(Denoiser):
    """A classifier of noise levels, read as a density at every level (identities 1 to 4).

    The backbone's output h corrects a base density that is known in closed form at every level:
    ``log p_t(x) = base_t(x) + h_t(x) - h_{T+1}(x)``. With the standard normal as base this is identity 1; with
    fitted Gaussian marginals the network learns only what is not Gaussian. The classifier's logits are the
    same numbers: ``p(t | x) = softmax_t(log p_t(x))`` under the uniform prior over levels of training. Constants of
    the levels, 0 unless :mod:`torchcdm.training.level_constants` has set them, are added to h. A readout, where
    :mod:`torchcdm.training.path_calibration` has set one, gives the values of log p in the place of h, whose
    gradient stays the denoiser.

    A *joint* backbone gives (B, classes, T+2): log p_t(x|y) for all classes at once (identity 10).

    Args:
        backbone: Any twice differentiable ``nn.Module``: ``(x (B, *shape), y (B,) or None) -> h (B, T+2)``; called
            with ``x`` alone where it has neither ``classes`` nor ``context``.
        schedule: The noise schedule, T + 2 levels.
        transform: Data units to model units; None where the caller works in model units.
        gaussian: The base density; the standard normal when None.
        class_prior: p(y) of a joint backbone, (classes,); uniform when None.

    Example:
        >>> schedule = UniformSigmaSchedule(100)
        >>> model = ClassificationDiffusion(MLP(2, levels=102), schedule)
        >>> model.log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    log_class_prior: Tensor | None
    level_constants: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        transform: DataTransform | None = None,
        gaussian: BaseDensity | None = None,
        class_prior: Tensor | None = None,
    ) -> None:
        super().__init__(schedule, transform)
        self.backbone = backbone
        self.base = StandardNormal(schedule) if gaussian is None else gaussian
        self.register_buffer("level_constants", torch.zeros(schedule.T + 2))
        self.readout: Readout | None = None
        if self.joint:
            prior = torch.ones(self.classes or 1) if class_prior is None else class_prior
            self.register_buffer("log_class_prior", (prior / prior.sum()).log())

    @property
    def classes(self) -> int | None:
        return getattr(self.backbone, "classes", None)

    @property
    def context(self) -> int | None:
        return getattr(self.backbone, "context", None)

    @property
    def joint(self) -> bool:
        """Whether one pass gives the densities of all classes (identity 10)."""
        return getattr(self.backbone, "joint", False)

    # --- densities -------------------------------------------------------------------------------------------

    def log_prob_levels(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """log p_t(x_t) at every level from one forward pass (identity 1).

        Args:
            x_t: Model units, (B, *shape).
            y: Classes, long (B,); None for the unconditional density.

        Returns:
            Nats in model units, float64 (B, T+2): neighbours differ by little, the values are in the thousands.
        """
        return self.log_prob_pair(x_t, y)[0]

    def log_prob_pair(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`log_prob_levels` of ``y``, and of no label where the same pass gives it (joint backbones)."""
        base = self.base.log_prob_levels(x_t)
        chosen, unconditional = self._corrections(x_t, y)
        return base + chosen.double(), base + unconditional.double()

    def class_log_prob_levels(self, x_t: Tensor) -> Tensor:
        """log p_t(x_t | y) for every class and level, float64 (B, classes, T+2) (identity 10).

        Raises:
            UserError: The backbone does not give all classes in one pass.
        """
        if not self.joint:
            raise UserError("class_log_prob_levels needs a backbone with a joint head over (class, level)")
        return self.base.log_prob_levels(x_t)[:, None] + self._class_corrections(x_t).double()

    def log_prior(self, y: Tensor) -> Tensor:
        """log p(y) of a joint model, (B,); 0 for the null label ``classes``, which stands for all of them."""
        return torch.cat([self.log_class_prior, self.log_class_prior.new_zeros(1)])[y]

    def class_posterior(self, x_t: Tensor, t: Level) -> Tensor:
        """p(y | x_t, t), (B, classes): the classifier that the joint logits contain (identity 10)."""
        joint = self.class_log_prob_levels(x_t) + self.log_class_prior[:, None]
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        return joint[torch.arange(len(x_t), device=x_t.device), :, levels].softmax(1)

    def log_prob(
        self, x: Tensor, t: int = 0, y: Tensor | None = None, units: str = "data"
    ) -> Tensor:
        """log p_t(x), one forward pass, differentiable; of a model with a readout the gradient is the denoiser's.

        Not guaranteed to integrate to one: ``torchcdm.likelihood.log_normalizer`` estimates by how much it fails.

        Args:
            x: (B, *shape), a tensor or an array of any number type.
            t: Level of the density; 0 is the data.
            y: Classes, long (B,); None for the unconditional density.
            units: ``data``, or ``model`` for inputs that are already transformed.

        Returns:
            Nats in the units asked for, float64 (B,).

        Raises:
            UserError: Unknown units, a level outside 0 ... T+1, or a shape that is not the model's.
        """
        if units not in ("data", "model"):
            raise UserError(f"units is '{units}'; choose data or model")
        if not 0 <= t <= self.schedule.T + 1:
            raise UserError(f"level {t} does not exist; levels are 0 ... {self.schedule.T + 1}")
        x = torch.as_tensor(x, device=self.schedule.alpha.device)
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise UserError(f"inputs have shape {tuple(x.shape[1:])}; the model takes {self.shape}")
        z = x if units == "model" or self.transform is None else self.transform(x)
        log_p = self.log_prob_levels(z.to(working_dtype(self, z.dtype)), y)[:, t]
        return log_p if z is x else log_p + self.transform.log_det(x)

    def logits(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """Logits of the level classifier, float64 (B, T+2): their softmax is p(t | x_t)."""
        return self.log_prob_levels(x_t, y)

    # --- denoising -------------------------------------------------------------------------------------------

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        """The MMSE denoiser as the gradient of a logit difference (identity 3).

        One forward and one backward pass; keeps no graph. Works under ``torch.no_grad()``.

        Raises:
            UserError: Called under ``torch.inference_mode()``, which forbids the gradient.
        """
        x_t = x_t.detach()
        return Prediction(x_t, *self.schedule.at(t, x_t), self.evaluate(x_t, t, y, readout=False).eps)

    def evaluate(
        self,
        x_t: Tensor,
        t: Level,
        y: Tensor | None = None,
        guidance: float = 0.0,
        graph: Graph = "none",
        readout: bool = True,
    ) -> Evaluation:
        """The denoiser and the density at every level, from one forward and one backward pass.

        The only place that differentiates logits with respect to the input.

        Args:
            x_t: Model units, (B, *shape).
            t: Level, an int or long (B,).
            y: Classes, long (B,), or None.
            guidance: Weight w of identity 8, for joint backbones: the gradient is taken of
                (1 + w) log p_t(x|y) - w log p_t(x).
            graph: What stays differentiable: nothing, the densities in the weights alone, or the denoiser too, in the
                weights and in ``x_t``, for divergences and for losses that need it.
            readout: Whether densities are those of the readout, where the model has one; it takes time.
        """
        _refuse_inference_mode()
        if graph != "denoiser":
            x_t = x_t.detach()  # a graph of the base alone would give wrong derivatives without a word
        rows = torch.arange(len(x_t), device=x_t.device)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))

        def target(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            chosen, unconditional = self._corrections(x, y, readout)
            value = chosen[rows, levels]
            if guidance:
                value = (1 + guidance) * value - guidance * unconditional[rows, levels]
            return value.sum(), (chosen, unconditional)

        with torch.enable_grad():
            if graph == "denoiser":
                # torch.func rather than autograd.grad: torch.compile can differentiate through it.
                with second_derivatives():
                    gradient, corrections = torch.func.grad(target, has_aux=True)(x_t)
            else:
                x = x_t.detach().requires_grad_()
                value, corrections = target(x)
                (gradient,) = torch.autograd.grad(value, x, retain_graph=graph == "densities")
                if graph == "none":
                    corrections = tuple(correction.detach() for correction in corrections)
        _, sigma_t = self.schedule.at(t, x_t)
        eps = self.base.eps(x_t, t) - sigma_t * gradient
        base = self.base.log_prob_levels(x_t)
        chosen, unconditional = (base + correction.double() for correction in corrections)
        return Evaluation(eps, chosen, unconditional)

    def denoise_blind(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x_0 | x] of an ``x`` known to be some x_t, the level not: identity 9, one pass each way.

        The denoisers of levels 0 ... T, weighted by p(t | x): the gradient of one scalar.

        Args:
            x: Model units, (B, *shape).
            y: Classes, long (B,), or None.

        Returns:
            Shape of ``x``, without a graph.
        """
        _refuse_inference_mode()
        alpha, sigma = self.schedule.alpha[:-1], self.schedule.sigma[:-1]
        with torch.enable_grad():
            z = x.detach().double().requires_grad_()
            levels = self.log_prob_levels(z.to(x.dtype), y)[:, :-1]
            weights = levels.detach().softmax(1)
            (pull,) = torch.autograd.grad((weights * sigma**2 / alpha * levels).sum(), z)
        share = (weights / alpha).sum(1).reshape(-1, *[1] * (x.ndim - 1))
        return (share * x.double() + pull).to(x.dtype)

    def start(self, noise: Tensor) -> Tensor:
        return self.base.start(noise)

    def guided(self, weight: float) -> Denoiser:
        """Classifier-free guidance (identity 8): one pass a step with joint logits, two without."""
        return OnePassGuidance(self, weight) if self.joint else super().guided(weight)

    # --- the network's part ----------------------------------------------------------------------------------

    def _network(self, x_t: Tensor, y: Tensor | None, readout: bool = True) -> Tensor:
        """h - h_{T+1} with the constants of the levels, (B, [classes,] T+2), at least float32."""
        if y is not None and not self.conditional:
            raise UserError("y is given, but the backbone takes no classes")
        inputs = (x_t, y) if self.conditional else (x_t,)
        features = self.backbone.features(*inputs) if readout and self.readout is not None else None
        h = self.backbone(*inputs) if features is None else self.backbone.head(features)
        if h.shape[-1] != self.schedule.T + 2:
            raise UserError(f"the backbone gives {h.shape[-1]} logits; the schedule has {self.schedule.T + 2} levels")
        if h.dtype in (torch.float16, torch.bfloat16):
            h = h.float()
        h = h - h[..., -1:] + self.level_constants.to(h.dtype)
        # The value of the readout, the gradient of h.
        return h if features is None else h + (self.readout(features.detach()).to(h.dtype) - h).detach()

    def _class_corrections(self, x_t: Tensor) -> Tensor:
        """log p_t(x|y) - base_t(x), (B, classes, T+2), of a joint backbone; all classes agree at level T+1."""
        by_class, effects = self._network(x_t, None), self.base.class_effects(x_t)
        return by_class if effects is None else by_class + effects

    def _corrections(self, x_t: Tensor, y: Tensor | None, readout: bool = True) -> tuple[Tensor, Tensor]:
        """log p_t(x|y) - base_t(x), and that of no label where the same pass gives it; each (B, T+2)."""
        if not self.joint:
            correction = self._network(x_t, y, readout)
            return correction, correction
        by_class = self._class_corrections(x_t)
        unconditional = (by_class + self.log_class_prior[:, None].to(by_class.dtype)).logsumexp(1)
        if y is None:
            return unconditional, unconditional
        # Label `classes` is the null label, as in every conditional backbone.
        candidates = torch.cat([by_class, unconditional[:, None]], 1)
        return candidates[torch.arange(len(y), device=y.device), y], unconditional


def _refuse_inference_mode() -> None:
    # The compiler cannot trace the question; the gradient fails under inference mode all the same.
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise UserError("a CDM denoises by a gradient: use torch.no_grad(), not torch.inference_mode()")


@final
class OnePassGuidance(Denoiser):
    """Guidance as the gradient of one scalar, (1 + w) log p_t(x|y) - w log p_t(x) (identity 8).

    Args:
        model: A model with joint logits.
        weight: w; 0 is the plain conditional model.
    """

    def __init__(self, model: ClassificationDiffusion, weight: float) -> None:
        super().__init__(model.schedule, model.transform)
        self.model = model
        self.weight = weight

    @property
    def classes(self) -> int | None:
        return self.model.classes

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        if y is None:
            raise UserError("guidance needs labels: give y")
        eps = self.model.evaluate(x_t, t, y, guidance=self.weight).eps
        return Prediction(x_t, *self.schedule.at(t, x_t), eps)

    def start(self, noise: Tensor) -> Tensor:
        return self.model.start(noise)
