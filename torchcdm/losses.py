"""Training losses: modules that return named terms for each sample, and that a distributed wrapper can wrap."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.ddm import DenoisingDiffusion
from torchcdm.models.density import Evaluation
from torchcdm.runtime.validation import NotNegative, Share, SharePair, checked

LARGEST_TIME_STEP = 0.75
"""Levels whose neighbours lie further apart in log r are left out of the time term: their difference is no slope."""

DISPLACEMENT = 7.0
"""Of the finite difference in the squared error's gradient, in units of sqrt(machine epsilon * sigma): between the
rounding of x + displacement and the curvature, which are 0.01 of a trained network's gradient there."""

LEVELS_AVERAGED = 0.02
"""Few samples of a batch fall on one level: errors of it are means about it, with this share of T as deviation."""

Terms = dict[str, Tensor]
"""Loss terms by name, each (B,); ``loss`` is the one to average and minimise."""


def stratified_levels(
    n: int, count: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """``n`` levels, each uniform on 0 ... ``count`` - 1, spread evenly over the batch: long (n,).

    One draw from each n-th part of the range, in random order: the same expectation as independent draws, with
    less variance between batches.
    """
    order = torch.randperm(n, generator=generator, device=device)
    offset = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
    return ((order + offset) * (count / n)).long().clamp_max(count - 1)


def all_levels(schedule: NoiseSchedule, n: int, generator: torch.Generator | None = None) -> Tensor:
    """:func:`stratified_levels` of 0 ... T+1, on the generator's device: long (n,)."""
    device = torch.device("cpu") if generator is None else generator.device
    return stratified_levels(n, schedule.T + 2, device, generator)


def drop_labels(
    y: Tensor | None, null: int | None, rate: float, generator: torch.Generator | None = None
) -> Tensor | None:
    """Labels (B,) with a share of ``rate`` replaced by the null label."""
    if y is None or null is None or rate == 0:
        return y
    dropped = torch.rand(len(y), generator=generator, device=y.device) < rate
    return y.masked_fill(dropped, null)


def _noised(
    loss: CDMLoss | DDMLoss,
    x_0: Tensor,
    y: Tensor | None,
    t: Tensor | None,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x_t, levels, noise and labels of one step: what is None is drawn, some labels are dropped."""
    if t is None:
        t = loss.draw_levels(len(x_0), generator).to(x_0.device)
    if eps is None:
        eps = _noise_like(x_0, generator)
    y = drop_labels(y, loss.model.classes, loss.label_dropout, generator)
    return loss.model.schedule.perturb(x_0, t, eps), t, eps, y


@final
class CDMLoss(nn.Module):
    """Cross-entropy of the level plus squared error of the noise (Algorithm 1 of arXiv 2402.10095).

    ``loss = mse_weight * mean_d (eps - eps_hat)² + ce_weight / d * CE``: ``ce_weight`` is in nats of cross-entropy
    per nat of squared error; the paper's 0.001 is about 3 on CIFAR-10. Either weight may be 0.

    With a joint backbone the cross-entropy is that of (class, level), all classes one outcome at level T+1
    (identity 10); the reported ``ce`` of levels is the marginal's.

    Args:
        model: The model to train.
        ce_weight: Weight of the cross-entropy.
        mse_weight: Weight of the squared error.
        label_dropout: Share of labels replaced by the null label.
        time_weight: Weight of the error in the change of log p over neighbouring levels (identity 11), which ties the
            logits to the denoiser; 0 leaves it out.
        kernel_weight: Weight of the mismatch of neighbouring levels under the forward kernel, which makes one pass and
            the flow agree; 0 leaves it out. It takes a second forward pass a step, from where the logits count.
        logits_from: Shares of the training (start, end) between which all weights but ``mse_weight`` rise from 0:
            the squared error alone first, as the cross-entropy costs it at high learning rates and needs few steps
            once the denoiser is there. (0, 0): both from the first step.

    Attributes:
        logits_share: Share of these weights that counts now, a scalar; 1 until :meth:`advance` sets it.
        logits_count: Whether it is above 0; the ties of neighbouring levels are left out, and not computed, before.
    """

    logits_share: Tensor

    @checked
    def __init__(
        self,
        model: ClassificationDiffusion,
        ce_weight: NotNegative = 3.0,
        mse_weight: NotNegative = 1.0,
        label_dropout: Share = 0.1,
        time_weight: NotNegative = 0.0,
        kernel_weight: NotNegative = 0.0,
        logits_from: SharePair = (0.0, 0.0),
    ) -> None:
        super().__init__()
        if ce_weight + mse_weight == 0:
            raise UserError("loss: ce_weight and mse_weight must not both be 0")
        for name, weight in (("time_weight", time_weight), ("kernel_weight", kernel_weight)):
            if weight < 0 or (weight and not mse_weight):
                raise UserError(f"loss: {name} must not be negative, and needs an mse_weight above 0")
        if kernel_weight and model.schedule.T < 2:
            raise UserError("loss: kernel_weight needs a schedule with at least 2 noise levels")
        if model.uncalibrated is not model:
            raise UserError("loss: the model was calibrated on paths; train `.model`, the model without calibration")
        if len(logits_from) != 2 or not 0 <= logits_from[0] <= logits_from[1] <= 1:
            raise UserError("loss: logits_from is two shares of the training, 0 <= start <= end <= 1")
        if logits_from[0] and not mse_weight:
            raise UserError("loss: logits_from starts without the cross-entropy, and needs an mse_weight above 0")
        self.model = model
        self.ce_weight, self.mse_weight = ce_weight, mse_weight
        self.time_weight, self.kernel_weight = time_weight, kernel_weight
        self.label_dropout, self.logits_from = label_dropout, logits_from
        # A tensor, not a number: torch.compile would compile anew for every value.
        self.register_buffer("logits_share", torch.ones(()), persistent=False)
        # A bool beside it: to ask the tensor would wait for the GPU, and breaks the compiler's graph.
        self.logits_count = True

    def advance(self, share: float) -> None:
        """Sets the weights for a step at which so much of the training, 0 ... 1, is done."""
        start, end = self.logits_from
        risen = float(share >= end) if start == end else (share - start) / (end - start)
        self.logits_share.fill_(min(max(risen, 0.0), 1.0))
        self.logits_count = risen > 0

    @property
    def settled(self) -> bool:
        """Whether the logits count in full; before, a validation says nothing of them."""
        return bool(self.logits_share == 1)

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Levels of a batch, 0 ... T+1, on the generator's device: long (n,)."""
        return all_levels(self.model.schedule, n, generator)

    def forward(
        self,
        x_0: Tensor,
        y: Tensor | None = None,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Terms:
        """One noisy copy of each sample.

        Args:
            x_0: Dequantised data, model units, (B, *shape).
            y: Classes, long (B,), or None.
            t: Levels, long (B,); stratified over the batch when None.
            eps: Noise, shape of ``x_0``; drawn when None.
            generator: Source of the draws, on the device of ``x_0``.

        Returns:
            ``loss``, ``ce`` (nats), ``mse`` (mean over d; constant at level 0, 0 at level T+1), ``t``,
            ``correct`` (whether the most probable level is the true one); joint models add ``ce_joint``; ``time`` and
            ``kernel`` where they have a weight.
        """
        schedule = self.model.schedule
        x_t, t, eps, y = _noised(self, x_0, y, t, eps, generator)

        if self.mse_weight:
            result, mse = self._squared_error(x_t, t, y, eps)
            log_p, unconditional = result.log_prob_levels, result.unconditional
        else:
            log_p, unconditional = self.model.conditional_and_marginal(x_t, y)
            mse = x_0.new_zeros(len(x_0))
        # The outcomes of a joint model are (class, level), their normaliser the sum of p_t(x) over the levels;
        # at level T+1 the classes are one outcome, so that its probability carries no class prior.
        ce = unconditional.logsumexp(1) - log_p.gather(1, t[:, None])[:, 0]
        if self.model.joint and y is not None:
            ce = ce - self.model.log_prior(y).masked_fill(t == schedule.T + 1, 0)
        d = x_0[0].numel()
        logits = self.ce_weight / d * ce.to(x_0.dtype)
        if self.time_weight and self.logits_count:
            time = self._time_error(x_t, t, result.eps.detach(), mse.detach(), log_p).to(x_0.dtype)
            logits = logits + self.time_weight / d * time
        if self.kernel_weight and self.logits_count:
            estimate = Prediction(x_t, *schedule.at(t.clamp(1, schedule.T), x_t), result.eps.detach())
            kernel = self._kernel_error(x_0, y, t, estimate, mse.detach(), log_p, generator).to(x_0.dtype)
            logits = logits + self.kernel_weight / d * kernel
        loss = self.mse_weight * mse + self.logits_share.to(x_0.dtype) * logits
        terms = {
            "loss": loss,
            "ce": nn.functional.cross_entropy(unconditional, t, reduction="none").to(x_0.dtype),
            "mse": mse,
            "t": t,
            "correct": (unconditional.argmax(1) == t).to(x_0.dtype),
        }
        if self.time_weight and self.logits_count:
            terms["time"] = time
        if self.kernel_weight and self.logits_count:
            terms["kernel"] = kernel
        return terms | {"ce_joint": ce.to(x_0.dtype)} if self.model.joint else terms

    def _squared_error(
        self, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor
    ) -> tuple[Evaluation, Tensor]:
        """The model at ``x_t`` and the mean square of eps_hat - eps, (B,), with its gradient in the weights."""
        if not differences_suffice(x_t):
            result = self.model.evaluate_twice_differentiable(x_t, t, y)
            return result, (result.eps - eps).square().flatten(1).mean(1)
        random_state = torch.get_rng_state()
        result = self.model.evaluate_with_densities(x_t, t, y)
        error = result.eps - eps
        gradient = self._gradient_of_square(x_t, t, y, error, result.log_prob_levels, random_state)
        return result, error.square().flatten(1).mean(1) + gradient

    def _gradient_of_square(
        self, x_t: Tensor, t: Tensor, y: Tensor | None, error: Tensor, log_p: Tensor, random_state: Tensor
    ) -> Tensor:
        """Zeros (B,) whose gradient in the weights is that of the squared error, by first derivatives alone.

        With eps_hat = -sigma grad log p_t the gradient of the mean square of the error e is that of
        -2 sigma / d times the derivative of log p_t along e, held fixed: a difference of two values of log p_t.

        Args:
            x_t: Noisy input, (B, *shape).
            t: Levels, (B,).
            y: Classes, (B,), or None.
            error: eps_hat - eps without a graph, (B, *shape).
            log_p: At ``x_t``, with its graph, (B, T+2).
            random_state: Of torch before that pass: the second one has the same dropout.
        """
        sigma, rounding = self.model.schedule.sigma[t], torch.finfo(x_t.dtype).eps
        # Every other sample goes the other way: what is left of the curvature is of second order.
        way = torch.ones_like(sigma)
        way[1::2] = -1
        distance = way * DISPLACEMENT * (rounding * sigma).sqrt()
        size = error.double().square().flatten(1).mean(1).sqrt().clamp_min(1e-12)
        moved = x_t + (distance / size).reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype) * error
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random_state)
            there = self.model.conditional_and_marginal(moved, y)[0]
        change = (there - log_p).gather(1, t[:, None])[:, 0]
        # sigma / distance, which is finite where sigma is 0.
        scale = way * (sigma / rounding).sqrt() / DISPLACEMENT
        slope = -2 / error[0].numel() * size * scale * change
        return (slope - slope.detach()).to(x_t.dtype)

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
        return (error.square() / (2 * d)).where(used, torch.zeros_like(error))

    def _kernel_error(
        self,
        x_0: Tensor,
        y: Tensor | None,
        t: Tensor,
        estimate: Prediction,
        mse: Tensor,
        log_p: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Half the squared mismatch of the levels s = t - 1 and t under the forward kernel, nats² (B,), float64.

        log p_s(x_s) + log q(x_t | x_s) - log p_t(x_t) - log p(x_s | x_t) is 0 by Bayes (identity 12), here at an x_s
        between x_t and x_0. p(x_s | x_t) is a Gaussian about the denoiser's mean, whose variance has the denoiser's
        error in it: to first order the mismatch does not depend on how well that is known.
        """
        schedule, x_t = self.model.schedule, estimate.x_t
        upper = t.clamp(2, schedule.T)
        lower = upper - 1
        to_t, to_0, spread = schedule.reverse_kernel(upper, lower, x_t)
        x_s = to_t * x_t + to_0 * x_0 + spread * _noise_like(x_0, generator)
        keep, added = schedule.forward_kernel(lower, upper, x_t)
        error = schedule.ratio[upper].square() * _mean_by_level(mse, t, schedule.T)[upper]
        variance = (spread.double().square() + to_0.double().square() * error.reshape(to_0.shape)).flatten()
        forward = _log_gaussian(x_t - keep * x_s, added.double().square().flatten())
        backward = _log_gaussian(x_s - to_t * x_t - to_0 * estimate.x0, variance)
        log_p_s = self.model.conditional_and_marginal(x_s, y)[0].gather(1, lower[:, None])[:, 0]
        mismatch = log_p_s + forward - log_p.gather(1, upper[:, None])[:, 0] - backward
        log_r = schedule.ratio.log()
        used = (upper == t) & (log_r[upper] - log_r[lower] < LARGEST_TIME_STEP)
        return (mismatch.square() / 2).where(used, torch.zeros_like(mismatch))


def differences_suffice(x: Tensor) -> bool:
    """Whether a difference of two log densities at ``x`` stands for a derivative.

    It saves a sixth of a step on a CPU. Half precision, and the shortened float32 of GPUs, are too coarse for it; the
    compiler wants ``torch.func``.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    # Below "highest" products of float32 may be taken in bfloat16.
    return x.dtype == torch.float64 or (
        x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    )


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _mean_by_level(mse: Tensor, t: Tensor, T: int) -> Tensor:
    """Mean of ``mse`` (B,) about each level 0 ... T+1, from the samples at the levels 1 ... T: float64 (T+2,)."""
    values = torch.stack([torch.ones_like(mse), mse]).double() * ((t >= 1) & (t <= T))
    levels = torch.arange(T + 2, dtype=torch.float64, device=t.device)
    near = (-0.5 * ((levels - t[:, None]) / (LEVELS_AVERAGED * T)).square()).exp()
    count, total = values @ near.clamp_min(1e-9)
    return total / count


def _log_gaussian(offset: Tensor, variance: Tensor) -> Tensor:
    """log N(offset; 0, variance I) but for the powers of 2 pi, (B,), from (B, ...) and (B,)."""
    return -0.5 * (offset.double().square().flatten(1).sum(1) / variance + offset[0].numel() * variance.log())


@final
class DDMLoss(nn.Module):
    """Squared error of the noise at a random level: L_simple of arXiv 2006.11239.

    Args:
        model: The denoising diffusion model to train.
        label_dropout: Share of labels replaced by the null label.
    """

    @checked
    def __init__(self, model: DenoisingDiffusion, label_dropout: Share = 0.1) -> None:
        super().__init__()
        self.model, self.label_dropout = model, label_dropout

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Levels of a batch, 1 ... T, on the generator's device: long (n,)."""
        device = torch.device("cpu") if generator is None else generator.device
        return 1 + stratified_levels(n, self.model.schedule.T, device, generator)

    def forward(
        self,
        x_0: Tensor,
        y: Tensor | None = None,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Terms:
        """As :meth:`CDMLoss.forward`, levels 1 ... T; returns ``loss`` and ``mse``, which are the same, and ``t``."""
        x_t, t, eps, y = _noised(self, x_0, y, t, eps, generator)
        eps_hat = self.model.eps(x_t, t, y)
        mse = (eps - eps_hat).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse, "t": t}
