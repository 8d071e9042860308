"""Models with a density: what "has a density" means."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from torchcdm.diffusion.base import BaseDensity
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, guided, working_dtype
from torchcdm.models.inputs import LARGEST, as_labels, as_numbers, check_count, codes_of


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


class DensityModel(Denoiser):
    """A denoiser with a log density at every level: a ``base`` density in closed form, and corrections to it."""

    base: BaseDensity

    @property
    def density(self) -> DensityModel:
        return self

    @property
    def joint(self) -> bool:
        """Whether one pass gives the densities of all classes (identity 10)."""
        return False

    @abstractmethod
    def corrections(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p_t(x_t | y) less the base density at every level, and that of no label where the same pass gives it.

        Unchecked; ``y`` may hold the null label ``classes``.

        Returns:
            Each (B, T+2), the first one twice where the pass gives no other.
        """

    def log_prob_levels(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """log p_t(x_t) at every level from one forward pass (identity 1); arguments as in :meth:`denoise`.

        Returns:
            Nats in model units, float64 (B, T+2): neighbours differ by little, the values are in the thousands.
        """
        return self.conditional_and_marginal(x_t, self.checked(x_t, y=y))[0]

    def conditional_and_marginal(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`log_prob_levels` of ``y``, unchecked, and of no label where the same pass gives it (joint)."""
        base = self.base.log_prob_levels(x_t)
        chosen, unconditional = (base + correction.double() for correction in self.corrections(x_t, y))
        return chosen, unconditional

    def evaluate(self, x_t: Tensor, t: Level, y: Tensor | None = None, guidance: float = 0.0) -> Evaluation:
        """The denoiser at level ``t`` and the density at every level, from one pass each way; no graph.

        Arguments as in :meth:`denoise`; for joint models ``guidance`` is the weight w of identity 8: the denoiser is
        that of (1 + w) log p_t(x|y) - w log p_t(x).

        Raises:
            UserError: Called under ``torch.inference_mode()``, which forbids the gradient.
        """
        return self.evaluate_unchecked(x_t, t, self.checked(x_t, t, y), guidance)

    def at_level(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What annealing asks of a density, guided or not, float64; arguments as in :meth:`evaluate`, ``t`` long (B,).

        Returns:
            log p_t(x_t), (B,), E[eps | x_t], (B, *shape), and log p at every level, (B, T+2).
        """
        found = self.evaluate(x_t, t, y, guidance if self.joint else 0.0)
        log_p, eps, other = found.log_prob_levels, found.eps.double(), found.unconditional
        if guidance:
            if not self.joint:
                plain = self.evaluate(x_t, t)
                eps, other = guided(eps, plain.eps, guidance), plain.log_prob_levels
            log_p = guided(log_p, other, guidance)
        return log_p.gather(1, t[:, None])[:, 0], eps, log_p

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        """The MMSE denoiser as the gradient of a logit difference (identity 3).

        One forward and one backward pass; keeps no graph. Works under ``torch.no_grad()``, and raises UserError under
        ``torch.inference_mode()``, which forbids the gradient.
        """
        return Prediction(x_t.detach(), *self.schedule.at(t, x_t), self.evaluate(x_t, t, y).eps)

    def evaluate_unchecked(
        self,
        x_t: Tensor,
        t: Level,
        y: Tensor | None,
        guidance: float = 0.0,
        graph: Literal["none", "densities", "all"] = "none",
    ) -> Evaluation:
        """:meth:`evaluate` for losses; the ``densities`` keep a graph in the weights, or ``all`` in ``x_t`` too."""
        refuse_inference_mode()
        rows = torch.arange(len(x_t), device=x_t.device)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(rows))

        def of(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            """The scalar whose gradient in x_t is that of log p_t less the base's, guided or not."""
            parts = self.corrections(x, y)
            value, plain = (part[rows, levels] for part in parts)
            return (guided(value, plain, guidance) if guidance else value).sum(), parts

        with torch.enable_grad():
            if graph == "all":
                # torch.func rather than autograd.grad: torch.compile can differentiate through it.
                gradient, parts = torch.func.grad(of, has_aux=True)(x_t)
            else:
                x_t = x_t.detach()  # a graph of the base alone would give wrong derivatives without a word
                x = x_t.detach().requires_grad_()
                value, parts = of(x)
                (gradient,) = torch.autograd.grad(value, x, retain_graph=graph == "densities")
        if graph == "none":
            parts = tuple(part.detach() for part in parts)
        base = self.base.log_prob_levels(x_t)
        eps = self.base.eps(x_t, t) - self.schedule.at(t, x_t)[1] * gradient
        return Evaluation(eps, *(base + part.double() for part in parts))

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        return self.evaluate_unchecked(x_t, t, self.checked(x_t, t, y), graph="all").eps

    def log_prob(self, x: Any, t: int = 0, y: Tensor | None = None, units: str = "data") -> Tensor:
        """log p_t(x), one forward pass, differentiable.

        Not guaranteed to integrate to one: ``torchcdm.likelihood.log_normalizer`` estimates by how much it fails.

        Args:
            x: (B, *shape), a tensor or an array of any number type; of a model of a table also a data frame.
            t: Level of the density; 0 is the data.
            y: Classes, long (B,); None for the unconditional density.
            units: ``data``, or ``model`` for inputs that are already transformed.

        Returns:
            Nats in the units asked for, float64 (B,); -inf where an input is so far away that its square overflows.

        Raises:
            UserError: Unknown units, a level outside 0 ... T+1, a shape that is not the model's, inputs that are not
                finite, or labels that the model does not have.
        """
        if units not in ("data", "model"):
            raise UserError(f"units is '{units}'; choose data or model")
        t = check_count("the level t", t, 0, self.schedule.T + 1)
        x = as_numbers(codes_of(x, self.transform), self.schedule.alpha.device)
        self.checked(x)
        z = x if units == "model" or self.transform is None else self.transform(x)
        log_p = self.log_prob_levels(z.to(working_dtype(self, z.dtype)), y)[:, t]
        far = (z.abs() > LARGEST).flatten(1).any(1)
        log_p = log_p.masked_fill(far & log_p.isnan(), -math.inf)
        return log_p if z is x else log_p + self.transform.log_det(x)

    def distribution(self, y: Any = None, **options: Any) -> ModelDistribution:
        """The model as a ``torch.distributions.Distribution``, with ``log_prob``, ``sample`` and ``event_shape``.

        Args:
            y: One class, or one context, of a model that knows some; None for the unconditional density.
            **options: Of :func:`torchcdm.sample`, such as ``steps=50``.

        Raises:
            UserError: The model does not know the shape of its events, or has no such class.
        """
        return ModelDistribution(self, y, **options)


def refuse_inference_mode() -> None:
    """Refuses ``torch.inference_mode()``, which forbids the gradient that a density denoises by."""
    # The compiler cannot trace the question; the gradient fails under inference mode all the same.
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise UserError("a CDM denoises by a gradient: use torch.no_grad(), not torch.inference_mode()")


def require_density(model: Denoiser, what: str) -> DensityModel:
    """``model`` as a density, or UserError; ``what`` needs it, for the message: "a ratio"."""
    density = getattr(model, "density", None)
    if density is None:
        raise UserError(f"{what} needs a density, which a plain diffusion model (ddm) does not have: use a cdm")
    return density


@final
class ModelDistribution(Distribution):
    """p_0(x) or p_0(x | y) in data units; nothing makes its log_prob integrate to exactly one.

    Arguments and errors as in :meth:`DensityModel.distribution`.
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
