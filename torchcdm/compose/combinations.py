r"""Densities made of densities: products, mixtures, complements and powers, at every level at once.

.. math:: \log\gamma_t = \sum_i w_i \log p_t^{(i)} \qquad\text{or}\qquad \log\gamma_t = \log\sum_i \pi_i p_t^{(i)}

Mixtures are exact at every level. A product or a power at level t is not the noised product or power of level 0; it is
a path that ends there, and :mod:`torchcdm.compose.sampling` corrects for the rest. A path whose exponents add up to W
is N(0, I / W) at the noise end, so that its noise is scaled by W^-1/2: its denoiser then is the weighted mean of the
parts' denoisers, and a Gaussian's path is exact.

What the parts integrate to does not matter for products and powers; in a mixture it acts as a prior weight.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from numbers import Integral
from typing import Annotated, final

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from torchcdm.annealing.target import reference_gaussian
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.prediction import Prediction
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, Unnormalised
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_labels, as_tensor
from torchcdm.runtime.validation import Float, checked

Experts = Sequence[tuple[DensityModel, int | None]]  # densities: a model, and one of its classes or None
Exponent = Annotated[Float, Ge(1e-4), Le(1e4)]


@final
class Combination(DensityModel):
    """A weighted product, or a mixture, of densities: ``experts`` of one schedule and data transform.

    The ``weights`` are w_i of a product, or pi_i of a mixture, (n,). UserError for different schedules, transforms or
    shapes, or exponents whose sum is not positive: no density then.
    """

    def __init__(self, experts: Experts, weights: Tensor, mixture: bool = False) -> None:
        models = list(dict.fromkeys(model for model, _ in experts))
        first = models[0]
        exponents = [model.exponent for model, _ in experts]
        total = min(exponents) if mixture else sum(w * e for w, e in zip(weights.tolist(), exponents, strict=True))
        if not 1e-4 <= total <= 1e4:
            raise UserError(f"compose: the exponents add up to {total:g}; a density needs a sum above 0")
        for model in models[1:]:
            _require_same(first, model)
        share = exponents[0] / total
        base = first.base if math.isclose(share, 1) else _narrowed(first, share)
        super().__init__(base.schedule, first.transform, base=base)
        self.models, self.mixture, self.exponent = nn.ModuleList(models), mixture, float(total)
        # A mixture of noised densities is the noised mixture.
        self.composed = not mixture or any(model.composed for model in models)
        self.experts = [(models.index(model), y) for model, y in experts]
        weights = weights.double().to(base.schedule.alpha.device)
        self.weights = nn.Buffer(weights[:, None], persistent=False)

    def corrections(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_p = torch.stack(self._log_densities(x_t), 1)
        joined = (log_p + self.weights.log()).logsumexp(1) if self.mixture else (log_p * self.weights).sum(1)
        found = joined - self.base.log_prob_levels(x_t)
        return found, found

    def _log_densities(self, x_t: Tensor) -> list[Tensor]:
        """log p_t of each expert at every level, (B, T+2) each; one pass of each model that gives all its classes."""
        asked = {k for k, y in self.experts if y is not None and self.models[k].joint}
        by_class, found = {k: self.models[k].class_log_prob_levels(x_t) for k in sorted(asked)}, []
        for k, y in self.experts:
            if k not in by_class:
                label = None if y is None else torch.full((len(x_t),), y, device=x_t.device)
                found.append(self.models[k].log_prob_levels(x_t, label))
            elif y is None:
                found.append((by_class[k] + self.models[k].log_class_prior[:, None]).logsumexp(1))
            else:
                found.append(by_class[k][:, y])
        return found


@final
class AllGiven(Unnormalised):
    """A density given several contexts at once: prod_i p_t(x - alpha_t move_i | context_i) exp(known(x_0, t)).

    A plain product in model units, on the path of a :class:`Combination`. x_0 is the mean that its Gaussian has given
    x_t: x itself at level 0, and moderate at all levels, as known may have bounds.

    Of a ``model`` with a context, given each of the ``contexts``, (n, context), and then moved so far, data units
    (n, *shape). ``known`` are nats (B,) of x_0, data units (B, *shape), and levels (B,), such as a power of a prior.
    """

    def __init__(self, model: DensityModel, contexts: Tensor, moves: Tensor, known: Callable) -> None:
        base = _narrowed(model, 1 / len(contexts))
        super().__init__(base.schedule, model.transform, base=base)
        self.model, self.contexts, self.moves, self.known = model, contexts, moves, known

    def at_level(self, x_t: Tensor, t: Tensor, y: None = None, guidance: float = 0.0) -> tuple[Tensor, Tensor]:
        """log gamma_t(x_t), (B,), and -sigma_t times its gradient, (B, *shape), float64; one pass of n B rows."""
        n, transform, given = len(self.contexts), self.transform, self.contexts.repeat_interleave(len(x_t), 0)
        with torch.enable_grad():
            x = x_t.detach().double().requires_grad_()
            alpha, sigma = self.schedule.at(t, x)
            rows = transform.inverse(x)
            moved = (rows - alpha * self.moves[:, None]).flatten(0, 1)
            z = transform(moved)
            added = (transform.log_det(moved).view(n, -1) - transform.log_det(rows)).sum(0)
            added = added + self.known(transform.inverse(Prediction(x, alpha, sigma, self.base.eps(x, t)).x0), t)
            levels, z_t = t.repeat(n), z.detach()
            log_p, eps, _ = self.model.at_level(z_t.to(x_t.dtype), levels, given, 0.0)
            score = Prediction(z_t, *self.model.schedule.at(levels, eps), eps).score
            (gradient,) = torch.autograd.grad(added.sum() + (z * score).sum(), x)
        log_gamma = (log_p.view(n, -1).sum(0) + added.detach()).nan_to_num(-math.inf, math.inf, -math.inf)
        return log_gamma, Prediction.of_score(x_t, alpha, sigma, gradient.nan_to_num(0, 0, 0)).eps


Model = Denoiser | Sequence[Denoiser]  # a model, of whose classes something is made, or several models


def all_of(model: Model, classes: Sequence[int] | None = None) -> Combination:
    """What is all of these at once: a product.

    Of classes over what they have in common, :math:`p(x)^{1-n} \\prod_i p(x|y_i)`, which is p(x | all y_i) where the
    classes are independent given x; of models their plain product, in model units.

    Args:
        model: A model with classes, or a list of models of one schedule and transform; UserError for others.
        classes: Classes of a single model.

    Example:
        >>> both = torchcdm.compose.all_of(model, [3, 8])
        >>> x = torchcdm.sample(both, 64, particles=256)
    """
    experts = _experts(model, classes)
    weights = torch.ones(len(experts), dtype=torch.float64)
    if classes is not None and len(experts) > 1:
        weights = torch.cat([weights, weights.new_tensor([1 - len(experts)])])
        experts = [*experts, (experts[0][0], None)]
    return Combination(experts, weights)


def any_of(model: Model, classes: Sequence[int] | None = None, weights: Sequence[float] | None = None) -> Combination:
    """What is one of these: a mixture, exact at every level. Errors are those of :func:`all_of`.

    Args:
        model: A model with classes, or a list of models.
        classes: Classes of a single model.
        weights: pi_i of any sum, or pi_i / Z_i where Z_i are known; the prior of a joint model, else equal, when None.
    """
    experts = _experts(model, classes)
    first, pi = experts[0][0], torch.ones(len(experts), dtype=torch.float64)
    if weights is not None:
        pi = as_tensor(weights, "compose: weights", torch.device("cpu")).double()
    elif classes is not None and first.joint:
        pi = first.log_class_prior.exp().cpu().double()[[y for _, y in experts]]
    if pi.shape != (len(experts),) or not (pi >= 0).all() or not 0 < float(pi.sum()) < math.inf:
        raise UserError(f"compose: weights are {weights}; give {len(experts)} numbers, none below 0")
    return Combination(experts, pi / pi.sum(), mixture=True)


@checked
def none_of(model: Denoiser, what: Sequence[int] | Sequence[Denoiser], kappa: Exponent | None = None) -> Combination:
    """What is none of these.

    Of a model's classes the mixture of all others. With ``kappa``, or of other models, the repulsion
    :math:`p^{1 + n\\kappa} \\prod_i p_i^{-\\kappa}`, whose mass between and beyond the modes is checked by nothing but
    the weights of its samples. UserError as :func:`all_of`, or for classes of which none is left.

    Args:
        model: The density to take from; with classes where ``what`` holds classes.
        what: Classes of the model, or models, to keep away from.
        kappa: Strength of the repulsion, above 0; 1 for models when None.
    """
    of_models = not isinstance(what, Integral | nn.Module) and any(isinstance(one, nn.Module) for one in what)
    away = _experts(what, None) if of_models else _experts(model, what)
    if kappa is None and not of_models:
        taken = [y for _, y in away]  # by number, where names were given
        left = [y for y in range(away[0][0].classes or 0) if y not in taken]
        if not left:
            raise UserError(f"compose: none of the classes {taken} leaves nothing; leave one of them out")
        return any_of(model, left)
    kappa = 1.0 if kappa is None else kappa
    weights = torch.tensor([1 + len(away) * kappa, *[-kappa] * len(away)], dtype=torch.float64)
    return Combination([(require_density(model, "compose"), None), *away], weights)


@checked
def tempered(model: Denoiser, beta: Exponent) -> Combination:
    """p^beta of a density, beta above 0: above 1 what is typical of it, below 1 what is rare too.

    p is the density in model units: of Gaussianised grey levels and bent columns it is not that of the data.
    """
    return Combination([(require_density(model, "compose"), None)], torch.tensor([beta], dtype=torch.float64))


def _narrowed(model: DensityModel, share: float) -> GaussianMarginals:
    """The model's Gaussian at every level with so much of its variances, those of the noise too."""
    schedule, g = deepcopy(model.schedule), reference_gaussian(model)
    schedule.sigma *= share**0.5
    return GaussianMarginals(schedule, g.mean, g.variances * share, g.rotation)


def _experts(model: Model, classes: Sequence[int] | None) -> Experts:
    several = not isinstance(model, nn.Module)
    if isinstance(classes, Integral | nn.Module) or (several and (not model or classes is not None)):
        raise UserError("compose: give one model and a list of classes, or a list of models alone")
    if several:
        return [(require_density(one, "compose"), None) for one in model]
    density, classes = require_density(model, "compose"), [] if classes is None else list(classes)
    if not classes:
        raise UserError("compose: no classes are given; name at least one, such as [3, 8]")
    if density.classes is None:
        raise UserError("compose: the model was trained without classes; give one that has some, or a list of models")
    chosen = as_labels(classes, density, len(classes)).tolist()
    if len(set(chosen)) < len(chosen):
        raise UserError(f"compose: classes {chosen} name one twice")
    return [(density, y) for y in chosen]


def _require_same(one: DensityModel, other: DensityModel) -> None:
    """Refuses models of different levels, shapes or units."""
    a, b = one.schedule, other.schedule
    scale = (one.exponent / other.exponent) ** 0.5
    if a.T != b.T or not (torch.allclose(a.alpha, b.alpha) and torch.allclose(a.sigma * scale, b.sigma)):
        named = " and ".join(f"{type(schedule).__name__}, T = {schedule.T}" for schedule in (a, b))
        raise UserError(f"compose: the models' schedules differ ({named}); densities meet level by level")
    if one.shape != other.shape:
        raise UserError(f"compose: the models' samples have shapes {one.shape} and {other.shape}")
    if one.shape is not None:
        # Two points of each dimension: at one of them lines of different slopes may meet.
        z = torch.linspace(-1, 1, 2 * math.prod(one.shape), dtype=torch.float64).reshape(2, *one.shape)
        x, y = (model.transform.inverse(z.to(model.schedule.alpha.device)).cpu() for model in (one, other))
        if not torch.allclose(x, y, rtol=1e-6):
            raise UserError("compose: the models' data transforms differ; train them on the same scale of the data")
