r"""What happens at the end of a training: constants of the levels, the comparison with the start, and samples.

A level classifier is calibrated as a whole where the mean of p(t | x) over noisy copies of all levels is the share of
the level,

.. math:: \frac{1}{T+2} \sum_s E_{x \sim p_s}[p(t \mid x)] = \frac{1}{T+2} \quad \text{for every } t,

as it is for the true densities. Constants added to the logits that minimise the cross-entropy make it so, and no
gradient in x, and so no sample, changes. The errors of all levels add up in log p_0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchcdm.annealing.ratios import best_constants
from torchcdm.data import DataSource
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.training.build import choose_base, fit_gaussian
from torchcdm.training.checkpoint import load_weights
from torchcdm.training.evaluation import Best, at_all_levels, labels_for
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.samples import balanced_labels, draw, sampling_options, save_manifest, save_sheet
from torchcdm.training.settings import Config
from torchcdm.units import standard_error

if TYPE_CHECKING:
    from torchcdm.training.loop import Trainer

FEWEST_COPIES, COMPARED = 20, 1000
"""Noisy copies at each level, of all samples together; samples of a split that models are compared on."""

FAR = 0.1
"""Nats a number by which validation may be worse than training, if that is more than three standard errors."""


def finish(trainer: Trainer) -> tuple[Path, dict[str, Any] | None]:
    """Calibrates the kept model of a training, compares it with its start, keeps the better one and draws samples.

    Gives the sheet of samples, or their folder; and what :func:`compare` says, of a cdm with validation data.
    """
    model, run, config, source = trainer.ema.model, trainer.run, trainer.config, trainer.source
    load_weights(model, run.root)
    outcome, cdm = None, config.model.kind == "cdm" and len(source.validation) >= 2
    if cdm and config.train.calibration:
        x, labels = source.validation.tensors()
        y, copies = labels_for(model, labels), config.train.calibration
        before, after, change = calibrate_levels(model, x, y, copies, config.train.seed)
        if change:
            trainer.save_model()
        said = f"log p_0 {change:+.3f} nats" if change else "left as they were"
        trainer.say(f"constants of the levels: cross-entropy of held-out halves {before:.4f} -> {after:.4f}, {said}")
    if cdm:
        outcome = compare(model, config, source, trainer.start)
        if outcome["kept"] == "start":
            model.load_state_dict(trainer.start)
            trainer.selection.best = Best("nll", outcome["unit"], outcome["values"]["start"], 0)
            trainer.save_model()
        trainer.say(told(outcome))
    return save_samples(model, run, config, source, "final") if config.sampling.n else run.samples, outcome


def save_samples(model: Denoiser, run: RunFolder, config: Config, source: DataSource, name: str) -> Path:
    """Draws samples; gives the path of their sheet, called ``name``, and writes the manifest beside it."""
    sampling = config.sampling
    y = None if model.classes is None else balanced_labels(sampling.n, model.classes)
    guidance = 0.0 if y is None else sampling.guidance
    drawn = draw(model, sampling.n, y, config.train.seed, guidance=guidance, **sampling_options(model, sampling))
    save_manifest(drawn, run.samples / "manifest.csv", class_names=source.class_names)
    return save_sheet(drawn, model, run.samples / name)


# --- constants of the levels -------------------------------------------------------------------------------------


@torch.no_grad()
def calibrate_levels(
    model: ClassificationDiffusion, x: Tensor, y: Tensor | None = None, copies: int = 20_000, seed: int = 0
) -> tuple[float, float, float]:
    """Sets ``model.level_constants`` to those that minimise the cross-entropy of the level on noisy copies of ``x``.

    Each half of the samples, (N, *shape) in data units, which the model was not trained on, is scored with the
    constants of the other half first: where that does not lower the cross-entropy, the samples are too few to tell,
    and the model stays as it is. The ``copies`` are spread over samples and levels; at least one of each sample, and
    :data:`FEWEST_COPIES` of each level. UserError for log probabilities that are not finite.

    Returns:
        Cross-entropy of the level on the halves, before and with the constants of the other half, nats; and what log
        p_0 has gained at every input, nats: 0 where the constants did not help.
    """
    draws = -(-max(copies, FEWEST_COPIES * (model.schedule.T + 2)) // len(x))
    parts = [
        (batch.by_parts(lambda one: model.conditional_and_marginal(one.x_t, one.y)[1]), batch.t.cpu(), batch.rows % 2)
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


# --- the comparison ----------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(
    model: ClassificationDiffusion, config: Config, source: DataSource, start: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A trained model, which keeps its weights, beside what it has to beat, by one pass on validation data.

    Returns:
        The ``unit``; ``values``, lower is better: of the trained ``model``, and of it in ``training``, of its
        ``start``, the weights that it began with, of one fitted ``gaussian``, of a ``uniform`` density on the data's
        range; what is ``kept``: ``model``, or ``start`` where the trained one was worse; and ``problems``, each with a
        ``name``, what it ``says`` with the likely cause, and the ``mend``.
    """
    limit = min(COMPARED, config.train.validation_samples)
    splits = {name: source.split(name).tensors(limit) for name in ("validation", "train")}

    def scored(one: ClassificationDiffusion, name: str = "validation") -> Tensor:
        x, labels = splits[name]
        return single_pass(one, x, labels_for(one, labels), Scoring(level=0)).values()

    trained = {key: value.clone() for key, value in model.state_dict().items()}
    own, training = scored(model), scored(model, "train")
    model.load_state_dict(start)
    begun = scored(model)
    model.load_state_dict(trained)
    values = {"model": own, "training": training, "start": begun}
    untouched = config.train.init is None and config.model.backbone.name != "custom"
    if config.model.gaussian and config.model.components == 1 and not config.model.class_gaussians and untouched:
        values["gaussian"] = begun
    elif not config.model.class_gaussians:
        values["gaussian"] = scored(_gaussian(model, config, source))
    means = {name: float(value.mean()) for name, value in values.items()}
    means["uniform"] = _uniform(source, splits["train"][0], splits["validation"][0])
    unit = "nats" if source.transform.bin is None else "bits/dim"
    far = FAR * (source.transform.dim if unit == "nats" else 1 / math.log(2))
    noise = 3 * math.hypot(standard_error(own), standard_error(training))
    kept = "start" if config.train.fallback and not means["model"] <= means["start"] else "model"
    return {"unit": unit, "values": means, "kept": kept, "problems": problems(means, unit, max(far, noise), config)}


def told(outcome: Mapping[str, Any]) -> str:
    """What :func:`compare` says as a line of numbers, and one for each problem."""
    said = ", ".join(f"{key} {value:.4g}" for key, value in outcome["values"].items())
    lines = [f"{problem['name']}: {problem['says']}; {problem['mend']}" for problem in outcome["problems"]]
    return "\n".join([f"validation, {outcome['unit']}, lower is better: {said}", *lines])


def problems(values: Mapping[str, float], unit: str, far: float, config: Config) -> list[dict[str, str]]:
    """What is wrong by the values, where training may be better by ``far``; the first is what to mend first."""
    found: list[dict[str, str]] = []

    def add(name: str, says: str, mend: str) -> None:
        found.append({"name": name, "says": says, "mend": mend})

    own, best, fallback = values["model"], values["model"], config.train.fallback
    worse, by_heart = not own <= values["start"], own - values["training"] > far
    rate = min(0.5, getattr(config.model.backbone, "dropout", 0.0) + 0.15)
    mend = f"try --model.backbone.dropout {rate:g}, a smaller network, or more data"
    if worse:
        best = values["start"] if fallback else own
        cause = "it learned the training data by heart" if by_heart else "the steps were too few or too large"
        said = f"{own:.4g} {unit} on validation data, {values['start']:.4g} before training: {cause}"
        mend = mend if by_heart else "try more --train.steps, or half the --train.lr"
        add("worse than its start", said + "; the start is kept as the model" * fallback, mend)
    elif by_heart:
        add("overfitting", f"{own:.4g} {unit} on validation data, {values['training']:.4g} on training data", mend)
    if not worse and unit == "bits/dim" and best < 0:
        said = f"{best:.4g} bits/dim say that grey levels are more than certain: one pass is not normalised"
        add("impossible likelihood", said, "see the normalised ones: cdm nll RUN --methods elbo,flow")
    if best > values.get("gaussian", math.inf):
        said = f"{best:.4g} {unit}, a fitted Gaussian has {values['gaussian']:.4g}"
        add("worse than a Gaussian", said, "leave out --model.gaussian and --model.components")
    if best > values["uniform"]:
        said = f"{best:.4g} {unit}, a uniform density on the range of the data has {values['uniform']:.4g}"
        mend = "leave out --model.gaussian and --model.shrinkage, or train longer; look for outliers in the data"
        add("worse than a uniform density", said, mend)
    return found


def _gaussian(model: ClassificationDiffusion, config: Config, source: DataSource) -> ClassificationDiffusion:
    """The best single Gaussian as a model."""
    free = replace(config.model, gaussian=True, components=1, shrinkage=None, form=None)
    chosen = choose_base(free, source, config.data.flip)
    base = fit_gaussian(chosen, source, config.data.flip)
    nothing = nn.Sequential(nn.Flatten(), nn.Linear(source.transform.dim, model.schedule.T + 2)).requires_grad_(False)
    nothing[1].weight.zero_(), nothing[1].bias.zero_()
    gaussian = ClassificationDiffusion(nothing, base.schedule, model.transform, base)
    return gaussian.to(model.schedule.alpha.device)


def _uniform(source: DataSource, *samples: Tensor) -> float:
    """What a uniform density on the data's range has: bits/dim on a grid, nats in the box of the samples else.

    In a column with values that have a probability each is as likely as any other, and as all other numbers together.
    """
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
    low, high = (float(end) if given is None else given for end, given in
                 ((low.min(), transform.low), (high.max(), transform.high)))  # fmt: skip
    return math.log2((high - low) / transform.bin + 1)
