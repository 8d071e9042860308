r"""What happens at the end of a training: constants of the levels, the comparison with the start, and samples.

A level classifier is calibrated where the mean of p(t | x) over noisy copies of all levels is the level's share,

.. math:: \frac{1}{T+2} \sum_s E_{x \sim p_s}[p(t \mid x)] = \frac{1}{T+2} \quad \text{for every } t,

as it is for the true densities. Constants added to the logits that minimise the cross-entropy make it so, and no
gradient in x, and so no sample, changes. The errors of all levels add up in log p_0.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchcdm.annealing.ratios import best_constants
from torchcdm.annealing.target import in_batches
from torchcdm.compose.sampling import STEPS, Draws, sample
from torchcdm.data import DataSource
from torchcdm.data.outputs import in_words, save_manifest, save_sheet
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.networks.heads import from_zero
from torchcdm.runtime.processes import labels_of, progress_bar
from torchcdm.training.build import choose_base, fit_gaussian
from torchcdm.training.checkpoint import save_curvatures
from torchcdm.training.evaluation import at_all_levels, labels_for
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.settings import Config, SamplingConfig
from torchcdm.units import standard_error

FEWEST_COPIES = 20  # noisy copies at each level, of all samples together
COMPARED = 1000  # samples of a split that models are compared on
TIME = 0.05  # of the training's, that samples take where their number is open; and so does the flow of the report
FLOW_COST = 70  # passes of training that the flow of one sample takes as long as
FAR = 0.1  # nats a number by which validation may be worse than training, if more than three standard errors


def affordable(config: Config, steps: int, cost: int, least: int, most: int) -> int:
    """So many samples as take ``TIME`` of that of the ``steps``, where each takes as long as ``cost`` passes of it."""
    return min(max(least, int(TIME * steps * config.train.batch_size / cost)), most)


def samples_to_draw(config: Config, steps: int) -> int:
    """The number of samples that a run draws of itself after so many steps."""
    sampling = config.sampling
    return affordable(config, steps, sampling.steps or STEPS, 9, 64) if sampling.n is None else sampling.n


def save_samples(
    model: Denoiser, run: RunFolder, config: Config, source: DataSource, name: str, n: int, progress: bool = False
) -> Path:
    """Draws ``n`` samples; gives the path of their sheet, called ``name``, and writes the manifest beside it."""
    seed = config.train.seed
    named = model.classes is not None and config.data.clusters is None
    y = balanced_labels(n, model.classes) if named else None
    guidance = 0.0 if y is None else config.sampling.guidance
    options = sampling_options(model, config.sampling)
    found, log_p = draw(model, n, y, seed, guidance=guidance, progress=progress, **options)
    save_curvatures(run, model)
    classes = in_words(y, source.class_names)
    save_manifest(run.samples / "manifest.csv", seed, classes, log_p, n)
    return save_sheet(found.x, run.samples / name, model.transform, config.data.label, classes)


@torch.no_grad()
def calibrate_levels(
    model: ClassificationDiffusion, x: Tensor, y: Tensor | None = None, copies: int = 20_000, seed: int = 0
) -> tuple[float, float, float]:
    """Sets ``model.level_constants`` to those that minimise the cross-entropy of the level on noisy copies of ``x``.

    Each half of the samples, (N, *shape) in data units, which the model was not trained on, is scored with the
    constants of the other half first: where that does not lower the cross-entropy, the samples are too few to tell,
    and the model stays as it is. The ``copies`` are spread over samples and levels; at least one of each sample, and
    ``FEWEST_COPIES`` of each level. UserError for log probabilities that are not finite. Gives the cross-entropy
    on the halves, before and with the constants of the other half, and what log p_0 has gained at every input, nats.
    """
    draws = -(-max(copies, FEWEST_COPIES * (model.schedule.T + 2)) // len(x))
    marginal = lambda one: model.conditional_and_marginal(one.x_t, one.y)[1]  # noqa: E731
    parts = [
        (batch.by_parts(model, marginal), batch.t.cpu(), batch.rows % 2)
        for batch in at_all_levels(model, x, draws, seed, y)
    ]
    log_p, t, half = (torch.cat(column) for column in zip(*parts, strict=True))
    if not bool(log_p.isfinite().all()):
        raise UserError("calibration: the model's log probabilities of the levels are not finite")
    before, after = float(cross_entropy(log_p, t)), 0.0
    for k in (0, 1):
        scored = half == k
        others = best_constants(log_p[~scored], t[~scored])
        after += float(scored.sum() * cross_entropy(log_p[scored] + others, t[scored])) / len(t)
    if not after < before:
        return before, after, 0.0
    constants = best_constants(log_p, t)
    model.level_constants += constants.to(model.level_constants)
    return before, after, float(constants[0])


@torch.no_grad()
def compare(
    model: ClassificationDiffusion, config: Config, source: DataSource, start: Mapping[str, Tensor],
    progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A trained model beside what it has to beat, by one pass on validation data.

    The ``unit``; ``values``, lower is better: of the trained ``model``, and of it in ``training``, of its ``start``,
    the weights that it began with, of one fitted ``gaussian``, of a ``uniform`` density on the data's range; what is
    ``kept``: ``model``, or ``start`` where the trained one was worse; and ``problems``, each with a ``name``, what it
    ``says`` with the likely cause, and the ``mend``. Shows a bar of the models for ``progress``.
    """
    limit = min(COMPARED, config.train.validation_samples)
    splits = {name: source.split(name).tensors(limit) for name in ("validation", "train")}
    labelled = labels_for(model, splits["validation"][1]) is not None

    def scored(one: ClassificationDiffusion, split: str) -> Tensor:
        x, labels = splits[split]
        # Clusters are known of training samples alone: with them these would seem learned by heart.
        y = labels_for(one, labels) if labelled else None
        return single_pass(one, x, y, Scoring(level=0)).values()

    begun = deepcopy(model)
    begun.load_state_dict(start)
    compared = {"model": (model, "validation"), "training": (model, "train"), "start": (begun, "validation")}
    if not config.model.class_gaussians:
        free = replace(config.model, gaussian=True, components=1, shrinkage=None, form=None)
        base = fit_gaussian(choose_base(free, source, config.data.flip), source, config.data.flip)
        nothing = nn.Sequential(nn.Flatten(), from_zero(nn.Linear(source.transform.dim, model.schedule.T + 2)))
        gaussian = ClassificationDiffusion(nothing.requires_grad_(False), base.schedule, model.transform, base)
        compared["gaussian"] = (gaussian.to(model.schedule.alpha.device), "validation")
    values = {name: scored(*pair) for name, pair in progress_bar(compared.items(), "comparing models", progress)}
    means = {name: float(value.mean()) for name, value in values.items()}
    means["uniform"] = _uniform(source, splits["train"][0], splits["validation"][0])
    unit = "nats" if source.transform.bin is None else "bits/dim"
    far = FAR * (source.transform.dim if unit == "nats" else 1 / math.log(2))
    noise = 3 * math.hypot(standard_error(values["model"]), standard_error(values["training"]))
    kept = "start" if config.train.fallback and not means["model"] <= means["start"] else "model"
    return {"unit": unit, "values": means, "kept": kept, "problems": problems(means, unit, max(far, noise), config)}


def problems(values: Mapping[str, float], unit: str, far: float, config: Config) -> list[dict[str, str]]:
    """What is wrong by the values, where training may be better by ``far``; the first is what to mend first."""
    own, begun, uniform, fallback = values["model"], values["start"], values["uniform"], config.train.fallback
    gaussian = values.get("gaussian", math.inf)
    worse, by_heart = not own <= begun, own - values["training"] > far
    best = begun if worse and fallback else own
    rate = min(0.5, getattr(config.model.backbone, "dropout", 0.0) + 0.15)
    less = f"try --model.backbone.dropout {rate:g}, a smaller network, or more data"
    found: list[tuple[str, str, str]] = []
    if worse:
        cause = "it learned the training data by heart" if by_heart else "the steps were too few or too large"
        says = f"{own:.4g} {unit} on validation data, {begun:.4g} before training: {cause}"
        says += "; the start is kept as the model" if fallback else ""
        found.append(("worse than its start", says, less if by_heart else "try more steps, or half the lr"))
    elif by_heart:
        says = f"{own:.4g} {unit} on validation data, {values['training']:.4g} on training data"
        found.append(("overfitting", says, less))
    if best < 0 and unit == "bits/dim" and not worse:
        says = f"{best:.4g} bits/dim say that grey levels are more than certain: one pass is not normalised"
        found.append(("impossible likelihood", says, "see the normalised ones: cdm nll RUN --methods elbo,flow"))
    if best > gaussian:
        says = f"{best:.4g} {unit}, a fitted Gaussian has {gaussian:.4g}"
        given = config.model.gaussian is not False
        mend = "leave out --model.gaussian and --model.components" if given else "train longer"
        found.append(("worse than a Gaussian", says, f"{mend}, or give --model.gaussian true"))
    if best > uniform:
        says = f"{best:.4g} {unit}, a uniform density on the range of the data has {uniform:.4g}"
        mend = "look for outliers in the data; train longer; leave out --model.gaussian and --model.shrinkage"
        found.append(("worse than a uniform density", says, mend))
    return [dict(zip(("name", "says", "mend"), problem, strict=True)) for problem in found]


def _uniform(source: DataSource, *samples: Tensor) -> float:
    """What a uniform density on the data's range has: bits/dim on a grid, nats in the box of the samples else. In a
    column with values that have a probability each is as likely as any other, and as all other numbers together."""
    transform, x = source.transform, torch.cat([part.flatten(1) for part in samples]).double()
    low, high = x.amin(0), x.amax(0)
    if transform.bin is None:
        nats = (high - low).clamp_min(1e-300).log()
        for k, (values, width, _) in transform.cells.items():
            distances = (x[:, k, None] - torch.tensor(values).double()).abs().amin(1)
            others = x[distances > width / 2, k]
            nats[k] = math.log(len(values) + bool(len(others)))
            if len(others) > 1:
                nats[k] += len(others) / len(x) * (others.max() - others.min()).clamp_min(1e-300).log()
        return float(nats.sum())
    low = float(low.min()) if transform.low is None else transform.low
    high = float(high.max()) if transform.high is None else transform.high
    return math.log2((high - low) / transform.bin + 1)


def draw(model: Denoiser, n: int, y: Tensor | None, seed: int, **options: Any) -> tuple[Draws, Tensor | None]:
    """Samples, data units, not rounded, and their one-pass log p, nats, None of a ddm; as :func:`torchcdm.sample`."""
    given = y
    if y is not None and options.get("particles"):
        if bool((y != y[0]).any()):
            raise UserError("particles are of one class: give its label, not balanced")
        given = y[:1]
    found = sample(model, n, y=given, seed=seed, units="codes", details=True, **options)
    density, device = model.density, model.schedule.alpha.device
    if density is None:
        return found, None

    def scored(rows: slice) -> Tensor:
        return density.log_prob(found.x[rows].to(device), y=labels_of(y, rows, device)).cpu()

    return found, in_batches(density, found.x, scored)


def sampling_options(model: Denoiser, sampling: SamplingConfig) -> dict[str, Any]:
    """What the settings of a run say to :func:`draw`."""
    return {"sampler": sampling.sampler, "steps": sampling.steps and min(sampling.steps, model.schedule.T)}


def balanced_labels(n: int, classes: int) -> Tensor:
    """Each class equally often, in turn: long (n,)."""
    return torch.arange(n) % classes
