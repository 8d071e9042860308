"""Training losses: modules that return named terms for each sample, and that a distributed wrapper can wrap."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import Function

from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import Evaluation
from torchcdm.models.inputs import as_labels
from torchcdm.runtime.precision import reduced_precision
from torchcdm.runtime.validation import NotNegative, Share, SharePair, checked

LARGEST_TIME_STEP = 0.75  # in log r: the difference of neighbours further apart is no slope for the time term
# Of the finite difference in the squared error's gradient, in units of sqrt(machine epsilon) times the error of x_t:
# 0.02 of it in float32, between a network's rounding and its curvature.
DISPLACEMENT = 60.0

Terms = dict[str, Tensor]  # of a loss by name, each (B,); ``loss`` is the one to average and to differentiate


def stratified_levels(n: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``n`` levels, each uniform on 0 ... ``count`` - 1, one draw from each n-th part of the range: long (n,).

    In random order: the same expectation as independent draws, with less variance between batches.
    """
    device = torch.device("cpu") if generator is None else generator.device
    order = torch.randperm(n, generator=generator, device=device)
    offset = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    return ((order + offset) * (count / n)).long().clamp_max(count - 1)


class Loss(nn.Module, ABC):
    """What the training loop asks of a loss, which replaces a share ``label_dropout`` of labels by the null label."""

    @checked
    def __init__(self, model: Denoiser, label_dropout: Share = 0.1) -> None:
        super().__init__()
        self.model, self.label_dropout = model, label_dropout

    def advance(self, share: float) -> None:
        """Sets what depends on how much of the training, 0 ... 1, is done."""

    @property
    def settled(self) -> bool:
        """Whether all terms count in full; before, a validation says nothing of them."""
        return True

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Levels of a batch, here of 0 ... T+1, on the generator's device: long (n,)."""
        return stratified_levels(n, self.model.schedule.T + 2, generator)

    def forward(
        self, x_0: Tensor, y: Tensor | None = None, t: Tensor | None = None, eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Terms:  # fmt: skip
        """The terms on one noisy copy of each of the dequantised samples ``x_0`` (B, *shape), model units.

        A share of the classes ``y``, long (B,), is dropped. Levels ``t``, whole numbers (B,), are stratified over the
        batch when None, and the noise ``eps`` is drawn, both by the ``generator``, on the device of ``x_0``. UserError
        for labels, levels or noise of another shape, or labels and levels that do not exist.
        """
        y = as_labels(y, self.model, len(x_0), training=True)
        if t is None:
            t = self.draw_levels(len(x_0), generator).to(x_0.device)
        if eps is None:
            eps = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        if not isinstance(eps, Tensor) or eps.shape != x_0.shape or eps.dtype != x_0.dtype:
            raise UserError("loss: eps must be a tensor of the shape and type of x_0")
        if not isinstance(t, Tensor) or t.shape != x_0.shape[:1]:
            raise UserError("loss: levels t must be a tensor with a whole number for each sample")
        if y is not None and self.model.classes is not None and self.label_dropout:
            dropped = torch.rand(len(y), generator=generator, device=y.device) < self.label_dropout
            y = y.masked_fill(dropped, self.model.classes)
        return self.terms(self.model.schedule.perturb(x_0, t, eps), t.long(), y, eps)

    @abstractmethod
    def terms(self, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor) -> Terms:
        """The terms on x_t, (B, *shape), at levels ``t``, with the noise ``eps`` in it; ``y`` may be the null label.

        At least ``loss``, ``mse`` (mean over d of the squared error of the noise) and ``t``.
        """


@final
class CDMLoss(Loss):
    """Cross-entropy of the level plus squared error of the noise (Algorithm 1 of arXiv 2402.10095).

    ``loss = mse_weight * mean_d (eps - eps_hat)² + ce_weight / d * CE``: ``ce_weight`` is in nats of cross-entropy
    per nat of squared error; the paper's 0.001 is about 3 on CIFAR-10. Either weight may be 0.

    With a joint backbone the cross-entropy is that of (class, level), all classes one outcome at level T+1
    (identity 10); the reported ``ce`` of levels is the marginal's.

    Args:
        ce_weight: Weight of the cross-entropy.
        mse_weight: Weight of the squared error.
        label_dropout: Share of labels replaced by the null label.
        time_weight: Weight of the error in the change of log p over neighbouring levels (identity 11), which ties the
            logits to the denoiser; 0 leaves it out.
        logits_from: Shares of the training (start, end) between which all weights but ``mse_weight`` rise from 0:
            the squared error alone first, as the cross-entropy costs it at high learning rates and needs few steps
            once the denoiser is there. (0, 0): both from the first step.
    """

    @checked
    def __init__(
        self, model: ClassificationDiffusion, ce_weight: NotNegative = 3.0, mse_weight: NotNegative = 1.0,
        label_dropout: Share = 0.1, time_weight: NotNegative = 0.0, logits_from: SharePair = (0.0, 0.0),
    ) -> None:  # fmt: skip
        super().__init__(model, label_dropout)
        if not mse_weight and (not ce_weight or time_weight or logits_from[0]):
            raise UserError("loss: with mse_weight 0, give ce_weight above 0, time_weight 0, and logits_from [0, ...]")
        if logits_from[0] > logits_from[1]:
            raise UserError("loss: logits_from is two shares of the training, 0 <= start <= end <= 1")
        self.ce_weight, self.mse_weight = ce_weight, mse_weight
        self.time_weight, self.logits_from = time_weight, logits_from
        # The share of these weights that counts now. A tensor, not a number: torch.compile would compile anew for it.
        self.logits_share = nn.Buffer(torch.ones(()), persistent=False)
        # Whether it is above 0: to ask the tensor would wait for the GPU, and breaks the compiler's graph.
        self.logits_count = True

    def advance(self, share: float) -> None:
        start, end = self.logits_from
        risen = float(share >= end) if start == end else (share - start) / (end - start)
        self.logits_share.fill_(min(max(risen, 0.0), 1.0))
        self.logits_count = risen > 0

    @property
    def settled(self) -> bool:
        return bool(self.logits_share == 1)

    def terms(self, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor) -> Terms:
        """As :meth:`Loss.terms`, with ``ce`` (nats) and ``correct``, whether the most probable level is the true one.

        Joint models add ``ce_joint``; ``time`` where it has a weight. The ``mse`` is a constant at level 0, 0 at T+1.
        """
        if not self.mse_weight:
            log_p, unconditional = self.model.conditional_and_marginal(x_t, y)
            found = Evaluation(eps, log_p, unconditional, t)
        elif differences_suffice(x_t):
            return self._terms_by_differences(x_t, t, y, eps)
        else:
            found = self.model.evaluate(x_t, t, y, graph=True, check=False)
        logits, terms = self._terms_of_logits(found, x_t, t, y, eps)
        return {"loss": self.mse_weight * terms["mse"] + logits, **terms}

    def _terms_by_differences(self, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor) -> Terms:
        """The same from first derivatives alone, with the gradient in ``loss``.

        eps_hat = -sigma grad log p_t is a derivative itself. The gradient of the mean square of its error e is that of
        -2 sigma / d times the derivative of log p_t along e, held fixed, and so of a difference of two values of
        log p_t. As x_t is moved by a share of sigma e, this has one factor for all samples: while logits do not count,
        the pass back that gives eps_hat gives the first value's gradient in the weights, too. The first pass is over
        before the second begins, and its memory is free.
        """
        model, counts = self.model, self.logits_count and bool(self.ce_weight or self.time_weight)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Every other sample goes the other way: what is left of the curvature is of second order. Level 0 stays.
        sigma = model.schedule.at(t, x_t)[1]
        way, random_state = (sigma > 0).to(x_t.dtype), torch.get_rng_state()
        way[1::2] *= -1
        share = DISPLACEMENT * torch.finfo(x_t.dtype).eps ** 0.5
        factor = self.mse_weight * 2 / (x_t[0].numel() * share)
        with torch.enable_grad():
            x, base = x_t.detach().requires_grad_(), model.base.log_prob_levels(x_t)
            parts = model.corrections(x, y)
            value = way.flatten() @ parts[0].gather(1, t[:, None])[:, 0].to(way)
            inputs = [x] if counts else [x, *weights]
            gradient, *here = torch.autograd.grad(value, inputs, retain_graph=counts, allow_unused=True)
            eps_hat = model.eps_of(x_t, t, gradient * way)
            found = Evaluation(eps_hat, *(base + part.double() for part in parts), t)
            logits, terms = self._terms_of_logits(found, x_t, t, y, eps)
            if counts and weights:
                here = torch.autograd.grad(value + logits.sum() / factor, weights, allow_unused=True)
            del parts, value, found  # and with them the graph of the first pass
            moved = x_t + share * way * sigma * (eps_hat - eps).to(x_t.dtype)
            with torch.random.fork_rng(devices=[]):  # the second pass has the dropout of the first
                torch.set_rng_state(random_state)
                value = way.flatten() @ model.corrections(moved, y)[0].gather(1, t[:, None])[:, 0].to(way)
            there = torch.autograd.grad(value, weights, allow_unused=True) if weights else []
        # What both have alike, such as that of a bias, is gone to the last bit: Adam would make steps of what is left.
        here, there, known = list(here), list(there), []
        while here:  # the difference takes the place of the two
            one, other = here.pop(0), there.pop(0)
            known.append(one if other is None else one - other)
        terms = {key: term.detach() for key, term in terms.items()}
        zeros = _Known.apply(way.flatten(), factor, known, *weights)
        return {"loss": self.mse_weight * terms["mse"] + logits.detach() + zeros.to(x_t.dtype), **terms}

    def _terms_of_logits(
        self, found: Evaluation, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor
    ) -> tuple[Tensor, Terms]:
        """What the logits add to the loss, (B,), and all terms but that."""
        schedule, dtype, unconditional = self.model.schedule, x_t.dtype, found.unconditional
        mse = (found.eps - eps).square().flatten(1).mean(1)
        # The outcomes of a joint model are (class, level), their normaliser the sum of p_t(x) over the levels;
        # at level T+1 the classes are one outcome, so that its probability carries no class prior.
        ce = unconditional.logsumexp(1) - found.log_prob_levels.gather(1, t[:, None])[:, 0]
        if self.model.joint and y is not None:
            # Nothing for the null label, which stands for all classes.
            prior = nn.functional.pad(self.model.log_class_prior, (0, 1))[y]
            ce = ce - prior.masked_fill(t == schedule.T + 1, 0)
        d = x_t[0].numel()
        logits = self.ce_weight / d * ce.to(dtype)
        ce_of_level = nn.functional.cross_entropy(unconditional, t, reduction="none").to(dtype)
        terms = {"ce": ce_of_level, "mse": mse, "t": t, "correct": (unconditional.argmax(1) == t).to(dtype)}
        if self.model.joint:
            terms["ce_joint"] = ce.to(dtype)
        if self.time_weight and self.logits_count:
            log_p = found.log_prob_levels
            terms["time"] = self._time_error(x_t, t, found.eps.detach(), mse.detach(), log_p).to(dtype)
            logits = logits + self.time_weight / d * terms["time"]
        return self.logits_share.to(dtype) * logits, terms

    def _time_error(self, x_t: Tensor, t: Tensor, eps_hat: Tensor, mse: Tensor, log_p: Tensor) -> Tensor:
        """Squared error of d log p / d log r at a fixed point, over 2 d (identity 11): float64 (B,).

        The target is |eps_hat|² + |eps - eps_hat|² with one draw of eps: unbiased for E[|eps|² | x_t], and the
        closer the denoiser the less noisy. What the base density knows in closed form is left out of both sides,
        so that the finite difference only has to resolve the network's part.
        """
        schedule, base = self.model.schedule, self.model.base
        d = x_t[0].numel()
        inner = t.clamp(2, schedule.T - 1)
        above, below = (log_p.gather(1, (inner + step)[:, None])[:, 0] for step in (1, -1))
        base_levels = base.log_prob_levels(x_t)
        base_change = (base_levels.gather(1, inner[:, None] + 1) - base_levels.gather(1, inner[:, None] - 1))[:, 0]
        energy = eps_hat.double().square().flatten(1).sum(1) + d * mse.double()
        target = schedule.log_prob_change(x_t, inner, eps_hat, energy) - base.log_prob_change(x_t, inner)
        log_r = schedule.ratio.log()
        step = log_r[inner + 1] - log_r[inner - 1]
        used = (inner == t) & (step < LARGEST_TIME_STEP)
        error = ((above - below - base_change) - target) / step
        return error.where(used, 0).square() / (2 * d)  # not the square: of two levels it is nan, and so its gradient


class _Known(Function):
    """Zeros, like (B,), whose sum has a ``factor`` times ``known`` gradients in the ``weights``."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, factor: float, known: Sequence[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.factor, ctx.known = factor, known
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if gradient.max() > gradient.min():
            raise UserError("loss: on a CPU its gradient is that of the batch: weigh all samples alike")
        return None, None, None, *(None if one is None else gradient[0] * ctx.factor * one for one in ctx.known)


def differences_suffice(x: Tensor) -> bool:
    """Whether a difference of two log densities at ``x`` stands for a derivative, which on a CPU saves memory.

    Half precision and the shortened float32 of GPUs are too coarse for it; the compiler wants ``torch.func``.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float64 or (x.dtype == torch.float32 and not reduced_precision("cpu"))


@final
class DDMLoss(Loss):
    """Squared error of the noise at a random level: L_simple of arXiv 2006.11239; arguments as in :class:`Loss`."""

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Levels of a batch, 1 ... T, on the generator's device: long (n,)."""
        return 1 + stratified_levels(n, self.model.schedule.T, generator)

    def terms(self, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor) -> Terms:
        """As :meth:`Loss.terms`: ``loss`` and ``mse``, which are the same, and ``t``."""
        mse = (eps - self.model.eps(x_t, t, y)).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse, "t": t}
