r"""Denoising when the strength of the noise is not known (identity 9 of ``docs/method.md``).

For y = x_0 + s n with unknown s, level t with r_t = s explains y with the log-density

.. math:: \log p(y | s) = \log p_t(\alpha_t y) + d \log \alpha_t,

and the classifier gives it without any model of the noise beside the one it was trained on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchcdm.data.source import places_of
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_numbers
from torchcdm.runtime.processes import progress_bar
from torchcdm.runtime.validation import Count, Positive, checked
from torchcdm.units import DataTransform

COARSE = 12  # levels of the first search, evenly spaced in log r
BATCH = 256  # samples, or tiles of an image, at a time
ESTIMATED = 64  # tiles of an image, about, in which its noise is estimated


def nearest_level(schedule: NoiseSchedule, ratio: Tensor) -> Tensor:
    """The level among 1 ... T whose r_t is nearest to ``ratio`` (B,) in the logarithm: long (B,)."""
    ladder = schedule.ratio[1:-1].log()
    return 1 + (ratio.double().log()[:, None] - ladder).abs().argmin(1)


@torch.no_grad()
def estimate_noise(model: DensityModel, z: Tensor) -> tuple[Tensor, Tensor]:
    """The noise standard deviation of each sample by maximum likelihood over the levels 1 ... T.

    A coarse search evenly spaced in log r, then halved steps around the best level, then a parabola through the
    best three. Each sample searches for itself: 12 forward passes and about two for each halving.

    Of ``z``, clean data plus white noise, model units, (B, *shape), in the precision of the network: s, model units,
    and log p(y | s) at the best level, nats, float64 (B,) each. UserError where the density is not finite.
    """
    schedule, T, log_r, d = model.schedule, model.schedule.T, model.schedule.ratio.log(), z[0].numel()
    # What is known of log p(y | r_t): one row a sample, one column a level.
    scores = torch.full((len(z), T + 2), -torch.inf, dtype=torch.float64, device=z.device)

    def look(levels: Tensor) -> None:
        """One forward pass for each column of ``levels``, long (B, k)."""
        for t in levels.unbind(1):
            alpha_t, _ = schedule.at(t, z)
            with evaluation_mode(model):
                log_p = model.log_prob_levels(alpha_t * z).gather(1, t[:, None])
            scores.scatter_(1, t[:, None], log_p + d * schedule.alpha[t, None].log())

    even = torch.linspace(float(log_r[1]), float(log_r[T]), min(COARSE, T), dtype=torch.float64)
    coarse = nearest_level(schedule, even.to(log_r.device).exp()).unique()
    look(coarse.expand(len(z), -1))
    step = int(torch.diff(torch.cat([coarse.new_tensor([1]), coarse, coarse.new_tensor([T])])).max())
    before = None
    while step > 1 or before is None or not torch.equal(before, scores.argmax(1)):
        step, before = max(1, (step + 1) // 2), scores.argmax(1)
        look(torch.stack([before - step, before + step], 1).clamp(1, T))
    highest, best = scores.max(1)
    if not bool(highest.isfinite().all()):
        raise UserError("log p of the data is not finite: their values are far beyond those of the training data")
    return _vertex(log_r, scores, best).exp(), highest


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


@checked
def denoise(
    model: Denoiser, noisy: Tensor, level: Count | None = None, noise_std: Positive | None = None
) -> tuple[Tensor, Tensor]:
    """Removes white noise: E[x_0 | alpha_t y] at the level of the noise, the nearest in log r.

    Gives clean data, data units in the precision of the network, not rounded, (B, *shape); and the deviation of the
    noise, found or given, model units, float64 (B,). UserError for a level and a deviation, a deviation of columns
    that differ in scale, or a model of Gaussianised data.

    Args:
        model: A trained model; one with a density where the noise is to be estimated.
        noisy: Clean data plus noise that is white in model units, data units, (B, *shape).
        level: Level 1 ... T whose noise the data have.
        noise_std: Standard deviation of the noise, data units. Neither given: the noise of each sample is estimated.
    """
    x = as_numbers(noisy, model.schedule.alpha.device, model.transform)
    model.check_inputs(x, data=True)
    transform = DataTransform(x.shape[1:]) if model.transform is None else model.transform
    require_additive_noise(transform)
    z = transform(x).to(working_dtype(model, x.dtype))
    if level is not None and noise_std is not None:
        raise UserError("a level and a standard deviation of the noise are given; give one of them")
    if level is not None:
        if level > model.schedule.T:
            raise UserError(f"level is {level}; it must be at most {model.schedule.T}")
        ratio = model.schedule.ratio[level].expand(len(z))
    elif noise_std is not None:
        scale = common_scale(transform)
        if scale is None:
            raise UserError("one noise deviation in data units, but the columns differ in scale; give a level instead")
        ratio = torch.full((len(z),), noise_std / scale, dtype=torch.float64, device=z.device)
    else:
        ratio, _ = estimate_noise(require_density(model, "estimating the noise"), z)
    t = nearest_level(model.schedule, ratio)
    with evaluation_mode(model), torch.no_grad():
        clean = model.denoise(model.schedule.at(t, z)[0] * z, t).x0
    if not bool(clean.isfinite().all()):
        raise UserError("denoised values are not finite: those of the data are far beyond the training data's")
    return transform.inverse(clean), ratio


@torch.no_grad()
def denoise_all(
    model: Denoiser, x: Sequence[Tensor], level: int | None = None, noise_std: float | None = None,
    progress: bool = False,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Removes white noise from many samples, or from images of any size, by tiles that overlap by a half and more.

    All tiles of an image are denoised at one level: that of the median of the noise found in them where none is given.
    They are averaged with weights that fall to the edges of each, sin² of the place, so that no seam is left.

    Arguments, units and errors as of :func:`denoise`; ``x`` holds samples (*shape), or images (C, H, W) at least as
    large. Returns clean ones on the CPU, and the noise of each, (N,).
    """
    if not len(x):
        raise UserError("nothing to denoise: there are no samples")
    small = {part.shape for part in x} == {model.shape}
    parts, clean = (torch.stack(list(x)).split(BATCH), denoise) if small else (x, _by_tiles)
    found = [clean(model, part, level, noise_std) for part in progress_bar(parts, "denoising", progress, delay=1)]
    return [one for part, _ in found for one in part.cpu()], torch.cat([ratio for _, ratio in found])


def _by_tiles(model: Denoiser, noisy: Tensor, level: int | None, noise_std: float | None) -> tuple[Tensor, Tensor]:
    """As :func:`denoise` of one image (C, H, W), as a batch of one."""
    shape = model.shape
    if shape is None or len(shape) != 3 or tuple(noisy[: shape[0] + 1, : shape[1], : shape[2]].shape) != shape:
        raise UserError(f"an image of shape {tuple(noisy.shape)}; the model takes {shape} or larger")
    height, width = shape[1:]
    places = places_of(noisy.shape[1:], shape[1:], 0.5)
    tiles = torch.stack([noisy[:, top : top + height, left : left + width] for top, left in places])
    chosen = tiles[:: max(1, len(tiles) // ESTIMATED)] if level is None and noise_std is None else tiles[:1]
    ratio = denoise(model, chosen, level, noise_std)[1].median()[None]
    level = int(nearest_level(model.schedule, ratio))
    clean = torch.cat([denoise(model, part, level)[0].cpu() for part in tiles.split(BATCH)])
    rise, fall = (torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square() for side in (height, width))
    weight = rise[:, None] * fall
    total, weights = torch.zeros(noisy.shape, dtype=clean.dtype), torch.zeros(noisy.shape[1:])
    for (top, left), tile in zip(places, clean, strict=True):
        total[:, top : top + height, left : left + width] += weight * tile
        weights[top : top + height, left : left + width] += weight
    return (total / weights)[None], ratio


def common_scale(transform: DataTransform) -> float | None:
    """Data units in a model unit where all values share it, images for one; None where columns have their own."""
    scales = transform.scale.unique()
    return float(scales[0]) if len(scales) == 1 else None


def require_additive_noise(transform: DataTransform) -> None:
    """Refuses models for which noise on the data is none in model units, whose transform is not affine: UserError."""
    if transform.gaussianized:
        what = "this model sees Gaussianised data, where noise on grey levels or columns is not additive"
        mend = "--data.gaussianize false (and, for columns of few values, --data.dequantize false)"
        raise UserError(f"{what}; to denoise data train with {mend}")
