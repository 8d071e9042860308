r"""Denoising when the strength of the noise is not known (identity 9 of ``docs/method.md``).

For y = x_0 + s n with unknown s, level t with r_t = s explains y with the log-density

.. math:: \log p(y | s) = \log p_t(\alpha_t y) + d \log \alpha_t,

and the classifier gives it without any model of the noise beside the one it was trained on. (An input known to be
some x_t is another case: :meth:`ClassificationDiffusion.denoise_blind`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.models.density import DensityModel
from torchcdm.units import DataTransform

COARSE = 12
"""Levels of the first search, evenly spaced in log r."""


@dataclass(frozen=True)
class NoiseEstimate:
    """The noise found in each sample.

    Attributes:
        ratio: Standard deviation s of the noise in model units, between the levels too, float64 (B,).
        std: The same in data units, (B,); (B, *scale) where columns have scales of their own.
        level: The level nearest in log r, which denoises, long (B,).
        log_prob: log p(y | s) at the best level, nats in model units, float64 (B,).
        evaluations: Forward passes of the network for each sample.
    """

    ratio: Tensor
    std: Tensor
    level: Tensor
    log_prob: Tensor
    evaluations: int


def nearest_level(schedule: NoiseSchedule, ratio: Tensor) -> Tensor:
    """The level among 1 ... T whose r_t is nearest to ``ratio`` (B,) in the logarithm: long (B,)."""
    ladder = schedule.ratio[1:-1].log()
    return 1 + (ratio.double().log()[:, None] - ladder).abs().argmin(1)


@torch.no_grad()
def estimate_noise(
    model: DensityModel, noisy: Tensor, y: Tensor | None = None, units: str = "data"
) -> NoiseEstimate:
    """The noise standard deviation of each sample by maximum likelihood over the levels 1 ... T.

    A coarse search evenly spaced in log r, then halved steps around the best level, then a parabola through the
    best three. Each sample searches for itself: 12 forward passes and about two for each halving.

    Args:
        model: A trained model.
        noisy: Clean data plus white noise, (B, *shape). In data units the noise is white in model units: each
            column's in proportion to its scale.
        y: Classes, long (B,), or None.
        units: ``data`` or ``model``.

    Raises:
        UserError: Unknown units, a shape that is not the model's, or data units of a model of Gaussianised data.
    """
    z = _to_model(model, noisy, units)
    search = _Search(model, z, y)
    log_r = model.schedule.ratio.log()
    T = model.schedule.T

    even = torch.linspace(float(log_r[1]), float(log_r[T]), min(COARSE, T), dtype=torch.float64)
    coarse = nearest_level(model.schedule, even.to(log_r.device).exp()).unique()
    search.evaluate(coarse.expand(len(z), -1))
    gaps = torch.diff(torch.cat([coarse.new_tensor([1]), coarse, coarse.new_tensor([T])]))
    step = int(gaps.max())
    while True:
        step = max(1, (step + 1) // 2)
        before = search.best
        search.evaluate(torch.stack([before - step, before + step], 1).clamp(1, T))
        if step == 1 and bool((search.best == before).all()):
            break

    ratio = _vertex(log_r, search.scores, search.best).exp()
    scale = torch.ones((), dtype=torch.float64) if model.transform is None else model.transform.scale
    return NoiseEstimate(
        ratio=ratio,
        std=ratio.reshape(-1, *[1] * scale.ndim) * scale.to(ratio.device),
        level=nearest_level(model.schedule, ratio),
        log_prob=search.scores.gather(1, search.best[:, None])[:, 0],
        evaluations=search.evaluations,
    )


def denoise_unknown(
    model: DensityModel, noisy: Tensor, y: Tensor | None = None, units: str = "data"
) -> tuple[Tensor, NoiseEstimate]:
    """Estimates the noise, then removes it: E[x_0 | alpha_t y] at the level found, and the estimate.

    Arguments and errors as :func:`estimate_noise`; the denoised data come in the same units, not rounded.
    """
    estimate = estimate_noise(model, noisy, y, units)
    return denoise_level(model, noisy, estimate.level, y, units), estimate


def denoise_known(
    model: Denoiser, noisy: Tensor, std: float, y: Tensor | None = None, units: str = "data"
) -> Tensor:
    """Removes white noise of a known standard deviation ``std``, at the level nearest to it.

    Args:
        model: A trained model.
        noisy: Clean data plus noise, (B, *shape).
        std: Standard deviation of the noise in ``units``.
        y: Classes, long (B,), or None.
        units: ``data`` or ``model``.

    Raises:
        UserError: ``std`` is not positive, or in data units of a model whose columns differ in scale.
    """
    if not 0 < std < math.inf:
        raise UserError(f"the noise's standard deviation is {std:g}; it must be positive")
    if units == "data" and model.transform is not None:
        require_additive_noise(model.transform)
        scale = common_scale(model.transform)
        if scale is None:
            raise UserError("one noise deviation in data units, but the columns differ in scale; give model units")
        std = std / scale
    ratio = torch.full((len(noisy),), std, dtype=torch.float64, device=model.schedule.alpha.device)
    return denoise_level(model, noisy, nearest_level(model.schedule, ratio), y, units)


def denoise_level(
    model: Denoiser, noisy: Tensor, level: Level, y: Tensor | None = None, units: str = "data"
) -> Tensor:
    """Removes the noise r_t of a known level t: E[x_0 | alpha_t y].

    Args:
        model: A trained model.
        noisy: Clean data plus noise, (B, *shape).
        level: t, an int or long (B,).
        y: Classes, long (B,), or None.
        units: ``data`` or ``model``.

    Returns:
        In the same units and in the precision of the network, not rounded, (B, *shape).

    Raises:
        UserError: Unknown units, a shape that is not the model's, or data units of a model of Gaussianised data.
    """
    z = _to_model(model, noisy, units)
    alpha_t, _ = model.schedule.at(level, z)
    clean = model.denoise(alpha_t * z, level, y).x0
    return model.transform.inverse(clean) if units == "data" and model.transform is not None else clean


def common_scale(transform: DataTransform) -> float | None:
    """Data units in a model unit where all values share it, images for one; None where columns have their own."""
    scales = transform.scale.unique()
    return float(scales[0]) if len(scales) == 1 else None


class _Search:
    """What is known of log p(y | r_t): one row a sample, one column a level, -inf where not evaluated."""

    def __init__(self, model: DensityModel, z: Tensor, y: Tensor | None) -> None:
        self.model, self.z, self.y = model, z, y
        self.evaluations = 0
        self.scores = torch.full(
            (len(z), model.schedule.T + 2), -torch.inf, dtype=torch.float64, device=z.device
        )

    @property
    def best(self) -> Tensor:
        return self.scores.argmax(1)

    def evaluate(self, levels: Tensor) -> None:
        """One forward pass for each column of ``levels``, long (B, k)."""
        schedule, d = self.model.schedule, self.z[0].numel()
        self.evaluations += levels.shape[1]
        for t in levels.unbind(1):
            alpha_t, _ = schedule.at(t, self.z)
            log_p = self.model.log_prob_levels(alpha_t * self.z, self.y).gather(1, t[:, None])
            self.scores.scatter_(1, t[:, None], log_p + d * schedule.alpha[t, None].log())


def _vertex(log_r: Tensor, scores: Tensor, best: Tensor) -> Tensor:
    """log s at the top of the parabola through the best level and its neighbours; (B,)."""
    T = scores.shape[1] - 2
    middle = best.clamp(2, max(T - 1, 2)).clamp_max(T)
    at = torch.stack([middle - 1, middle, middle + 1], 1).clamp(1, T)
    (a, b, c), (fa, fb, fc) = log_r[at].unbind(1), scores.gather(1, at).unbind(1)
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    top = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
    # At either end of the levels the maximum may lie outside: the end itself, then.
    inside = (best > 1) & (best < T) & top.isfinite()
    return top.where(inside, log_r[best])


def _to_model(model: Denoiser, x: Tensor, units: str) -> Tensor:
    """Model units, in the precision of the network."""
    if units not in ("data", "model"):
        raise UserError(f"units is '{units}'; choose data or model")
    if model.shape is not None and tuple(x.shape[1:]) != model.shape:
        raise UserError(f"inputs have shape {tuple(x.shape[1:])}; the model takes {model.shape}")
    if units == "data" and model.transform is not None:
        require_additive_noise(model.transform)
        x = model.transform(x)
    return x.to(working_dtype(model, x.dtype))


def require_additive_noise(transform: DataTransform) -> None:
    """Refuses models for which noise on the data is no noise in model units.

    Raises:
        UserError: The transform is not affine.
    """
    if transform.gaussianized:
        raise UserError(
            "this model sees Gaussianised data, where noise on grey levels or columns is not additive; "
            "to denoise data train with --data.gaussianize false (and, for columns of few values, "
            "--data.dequantize false)"
        )
