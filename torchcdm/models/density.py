"""Models with a density: what "has a density" means."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

import torchcdm
from torchcdm.diffusion.base import BaseDensity
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError, nearest
from torchcdm.models.denoiser import Denoiser, DenoisingDiffusion, guided, working_dtype
from torchcdm.models.inputs import LARGEST, as_labels, as_numbers


@dataclass(frozen=True)
class Evaluation:
    """All that one forward and one backward pass tell."""

    eps: Tensor  #: E[eps | x_t], (B, *shape).
    log_prob_levels: Tensor  #: log p_t(x_t | y) at every level, or log p_t(x_t) without labels, float64 (B, T+2).
    unconditional: Tensor  #: log p_t(x_t) where the same pass gives it (joint), else the same.
    levels: Tensor  #: Those of eps, (B,).


class DensityModel(Denoiser):
    """A denoiser with a log density at every level: a ``base`` density in closed form, and corrections to it."""

    base: BaseDensity
    exponent: float = 1.0
    """Power to which densities of data are taken, in all; 1 but for compositions."""

    @property
    def density(self) -> "DensityModel":
        return self

    @property
    def joint(self) -> bool:
        """Whether one pass gives the densities of all classes (identity 10)."""
        return False

    @abstractmethod
    def corrections(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p_t(x_t | y) less the base density at every level, and that of no label where the same pass gives it.

        Each (B, T+2), the first one twice where the pass gives no other. Unchecked; ``y`` may hold the null label.
        """

    def log_prob_levels(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        """log p_t(x_t) at every level from one forward pass (identity 1); arguments as in :meth:`denoise`. Nats in
        model units, float64 (B, T+2): neighbours differ by little, the values are in the thousands."""
        return self.conditional_and_marginal(x_t, self.check_inputs(x_t, y=y))[0]

    def conditional_and_marginal(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`log_prob_levels` of ``y``, unchecked, and of no label where the same pass gives it (joint)."""
        base = self.base.log_prob_levels(x_t)
        chosen, unconditional = (base + correction.double() for correction in self.corrections(x_t, y))
        return chosen, unconditional

    def evaluate(
        self, x_t: Tensor, t: Level, y: Tensor | None = None, guidance: float = 0.0,
        graph: bool = False, check: bool = True, prior: Tensor | None = None,
    ) -> Evaluation:  # fmt: skip
        """The denoiser at level ``t`` and the density at every level, from one pass each way.

        Arguments as in :meth:`denoise`; with a weight w of ``guidance`` (identity 8) all is that of
        (1 + w) log p_t(x|y) - w log p_t(x), from two passes where one does not give both. With a ``graph`` all can be
        differentiated in the weights and ``x_t``. Losses do not ``check``: ``y`` may hold the null label. Given a
        ``prior``, log p(t) (B or 1, T+2), the denoiser is at the most probable level of x_t, not at ``t``.
        UserError under ``torch.inference_mode()``, which forbids the gradient.
        """
        # The compiler cannot trace the question; the gradient fails under inference mode all the same.
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            raise UserError("a CDM denoises by a gradient: use torch.no_grad(), not torch.inference_mode()")
        y = self.check_inputs(x_t, t, y) if check else y
        if guidance and not self.joint:
            given = self.evaluate(x_t, t, y, graph=graph, check=False, prior=prior)
            plain = self.evaluate(x_t, given.levels, graph=graph, check=False)
            log_p = guided(given.log_prob_levels, plain.log_prob_levels, guidance)
            return Evaluation(guided(given.eps, plain.eps, guidance), log_p, plain.log_prob_levels, given.levels)
        # A graph of the base alone would give wrong derivatives without a word.
        x_t = x_t if graph else x_t.detach()
        rows, base = torch.arange(len(x_t), device=x_t.device), self.base.log_prob_levels(x_t)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(rows))

        def of(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            """The scalar whose gradient in x_t is that of log p_t less the base's, guided or not."""
            parts = self.corrections(x, y)
            at = levels if prior is None else (base + parts[0].detach().double() + prior).argmax(1)
            value, plain = (part[rows, at] for part in parts)
            return (guided(value, plain, guidance) if guidance else value).sum(), (*parts, at)

        with torch.enable_grad():
            if graph:
                # torch.func rather than autograd.grad: torch.compile can differentiate through it.
                gradient, (*parts, levels) = torch.func.grad(of, has_aux=True)(x_t)
            else:
                x = x_t.detach().requires_grad_()
                value, (*parts, levels) = of(x)
                (gradient,) = torch.autograd.grad(value, x)
                parts = [part.detach() for part in parts]
        eps = self.eps_of(x_t, t if prior is None else levels, gradient)
        log_p, unconditional = (base + part.double() for part in parts)
        return Evaluation(eps, guided(log_p, unconditional, guidance) if guidance else log_p, unconditional, levels)

    def eps_of(self, x_t: Tensor, t: Level, gradient: Tensor) -> Tensor:
        """E[eps | x_t], (B, *shape), from the ``gradient`` of log p_t(x_t) less the base's (identity 3)."""
        return self.base.eps(x_t, t) - self.schedule.at(t, x_t)[1] * gradient

    def at_level(self, x_t: Tensor, t: Tensor, y: Tensor | None, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
        """What annealing asks of a density, float64; arguments as in :meth:`evaluate`, ``t`` long (B,).

        log p_t(x_t), (B,), E[eps | x_t], (B, *shape), and log p at every level, (B, T+2).
        """
        found = self.evaluate(x_t, t, y, guidance)
        return found.log_prob_levels.gather(1, t[:, None])[:, 0], found.eps.double(), found.log_prob_levels

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        """The MMSE denoiser as the gradient of a logit difference (identity 3): one forward and one backward pass.

        Keeps no graph, and works under ``torch.no_grad()``; errors as in :meth:`evaluate`.
        """
        eps = self.evaluate(x_t, t, y).eps
        return Prediction(x_t.detach(), *self.schedule.at(t, x_t), eps)

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        return self.evaluate(x_t, t, y, graph=True).eps

    def log_prob(self, x: Any, t: Level = 0, y: Tensor | None = None, units: str = "data") -> Tensor:
        """log p_t(x), one forward pass, differentiable: nats in the units asked for, float64 (B,).

        It is -inf where an input is so far away that its square overflows, and not guaranteed to integrate to one:
        ``torchcdm.likelihood.log_normalizer`` estimates by how much it fails. UserError for levels, shapes or labels
        that are none of the model's, or inputs that are not finite.

        Args:
            x: (B, *shape), a tensor or an array of any number type; of a model of a table also a data frame.
            t: Level of the density, an int or long (B,); 0 is the data.
            y: Classes, long (B,); None for the unconditional density.
            units: ``data``, or ``model`` for inputs that are already transformed.
        """
        if units not in ("data", "model"):
            raise UserError(f"units is '{units}'; choose data or model")
        x = as_numbers(x, self.schedule.alpha.device, self.transform)
        self.check_inputs(x, t, data=True)
        z = x if units == "model" or self.transform is None else self.transform(x)
        levels = torch.as_tensor(t, device=z.device).expand(z.shape[:1])
        log_p = self.log_prob_levels(z.to(working_dtype(self, z.dtype)), y).gather(1, levels[:, None])[:, 0]
        far = (z.abs() > LARGEST).flatten(1).any(1)
        log_p = log_p.masked_fill(far & log_p.isnan(), -math.inf)
        return log_p if z is x else log_p + self.transform.log_det(x)

    def distribution(self, y: Any = None, **options: Any) -> "ModelDistribution":
        """The model as a ``torch.distributions.Distribution``, with ``log_prob``, ``sample`` and ``event_shape``.

        Given one class, or one context, ``y``, where it is not None; with ``options`` of :func:`torchcdm.sample`, such
        as ``steps=50``. UserError for a model that does not know the shape of its events, or has no such class.
        """
        return ModelDistribution(self, y, **options)


def require_density(model: Denoiser, what: str) -> DensityModel:
    """``model`` as a density, or UserError; ``what`` needs it, for the message: "a ratio"."""
    density = getattr(model, "density", None)
    if density is None:
        kind = "a plain diffusion model (ddm)" if isinstance(model, DenoisingDiffusion) else type(model).__name__
        raise UserError(f"{what} needs a density in one pass, which {kind} does not have: give a cdm as the model")
    return density


@final
class LevelReader(Denoiser):
    """A density ``model`` that denoises x_t at the level that its classifier reads off it, in the same pass.

    Few steps leave more or less noise than the level that a denoiser is told (arXiv 2305.15583). The level read is the
    most probable under a normal prior of log r about that told, of ``deviation``. ``weight`` as in GuidedDenoiser.
    """

    deviation = 0.3

    def __init__(self, model: DensityModel, weight: float = 0.0) -> None:
        super().__init__(model.schedule, model.transform, base=model.base)
        self.model, self.weight, self.coarse = model, weight, model.coarse

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        scales, log_r = self.schedule.at(t, x_t), self.schedule.ratio.log()
        prior = -((log_r - log_r[t].reshape(-1, 1)) / self.deviation).square() / 2
        found = self.model.evaluate(x_t, t, y, self.weight, prior=prior)
        read = Prediction(x_t, *self.schedule.at(found.levels, x_t), found.eps)
        return Prediction.of_x0(x_t, *scales, read.x0)


@final
class ModelDistribution(Distribution):
    """p_0(x) or p_0(x | y) in data units, not exactly normalised: see :meth:`DensityModel.distribution`."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, model: DensityModel, y: Any = None, **options: Any) -> None:
        if model.shape is None:
            raise UserError("distribution: the model has no transform, and so no shape of its events")
        taken = inspect.signature(torchcdm.sample).parameters.keys() - {"model", "n", "y", "seed", "shape", "details"}
        if unknown := options.keys() - taken:
            raise UserError(f"distribution: no option '{min(unknown)}'; {nearest(min(unknown), taken)}")
        self.model, self.options = model, options
        self.y = as_labels(y, model, 1, one_for_all=True)
        super().__init__(event_shape=torch.Size(model.shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats in data units, float64 (*batch,), from values (*batch, *event_shape): one pass; differentiable."""
        batch = value.shape[: max(0, value.ndim - len(self.event_shape))]
        x = value.reshape(-1, *value.shape[len(batch) :])  # another shape than the events' is refused by name
        y = None if self.y is None else self.y.expand(len(x), *self.y.shape[1:])
        return self.model.log_prob(x, y=y).reshape(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws (*sample_shape, *event_shape) on the CPU; their seed is torch's next random number."""
        n = torch.Size(sample_shape).numel()
        seed = int(torch.randint(2**31, ()))
        y = None if self.y is None else self.y.expand(n, *self.y.shape[1:])
        x = self.model.sample(n, y=y, seed=seed, **{"units": "codes"} | self.options)  # not a table's data frame
        return x.reshape(*sample_shape, *self.event_shape)
