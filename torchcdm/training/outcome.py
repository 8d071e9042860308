"""A trained model beside what it has to beat: its start, a fitted Gaussian, a uniform density."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcdm.data import DataSource
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.training.build import base_floor, base_samples, choose_base
from torchcdm.training.evaluation import labels_for
from torchcdm.training.settings import Config
from torchcdm.units import ColumnTransform, standard_error

COMPARED = 1000
"""Samples of a split that models are compared on."""

FAR = 0.1
"""Nats a number by which validation may be worse than training, if that is more than three standard errors."""


class Problem(NamedTuple):
    """What is wrong with a model: a name, what was seen with its likely cause, and the next thing to try."""

    name: str
    says: str
    mend: str


class Outcome(NamedTuple):
    """A trained model beside what it has to beat, by one pass on validation data.

    The ``values`` are of the trained ``model``, and of it in ``training``; of its ``start``, the weights that it began
    with; of one fitted ``gaussian``; of a ``uniform`` density on the data's range. Lower is better. ``kept`` is
    ``model``, or ``start`` where the trained one was worse.
    """

    unit: str
    values: dict[str, float]
    kept: str
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return self._asdict() | {"problems": [problem._asdict() for problem in self.problems]}

    def text(self) -> str:
        """A line of numbers, and one for each problem."""
        names = {"model": "this model", "training": "on training data", "start": "its start",
                 "gaussian": "a fitted Gaussian", "uniform": "a uniform density"}  # fmt: skip
        said = ", ".join(f"{names[key]} {value:.4g}" for key, value in self.values.items())
        return "\n".join([
            f"validation, {self.unit}, lower is better: {said}",
            *(f"{problem.name}: {problem.says}; {problem.mend}" for problem in self.problems),
        ])  # fmt: skip


@torch.no_grad()
def compare(
    model: ClassificationDiffusion, config: Config, source: DataSource, start: Mapping[str, Tensor]
) -> Outcome:
    """A trained model, which keeps its weights, beside its start, a fitted Gaussian and a uniform density."""
    transform, limit = model.transform, min(COMPARED, config.train.validation_samples)
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
    if config.model.gaussian and config.model.components == 1 and config.train.init is None:
        values["gaussian"] = begun
    elif not config.model.class_gaussians:
        values["gaussian"] = scored(_gaussian(model, config, source))
    means = {name: float(value.mean()) for name, value in values.items()}
    means["uniform"] = _uniform(source, splits["train"][0], splits["validation"][0])
    unit = "nats" if transform.bin is None else "bits/dim"
    worse = not means["model"] <= means["start"]
    problems = _problems(means, unit, own, training, transform.dim, config, worse)
    return Outcome(unit, means, "start" if worse and config.train.fallback else "model", tuple(problems))


def _problems(
    values: Mapping[str, float], unit: str, own: Tensor, training: Tensor, dim: int, config: Config, worse: bool
) -> list[Problem]:
    """What is wrong by the values; the first of them is what to mend first."""
    found = []
    gap, per_nat = values["model"] - values["training"], 1.0 if unit == "nats" else 1 / (dim * math.log(2))
    noise = math.hypot(standard_error(own), standard_error(training))
    learned_by_heart = gap > max(FAR * dim * per_nat, 3 * noise)
    kept = "; the start is kept as the model" if config.train.fallback else ""
    if worse:
        cause = "it learned the training data by heart" if learned_by_heart else "the steps were too few or too large"
        mend = _against_heart(config) if learned_by_heart else "try more --train.steps, or half the --train.lr"
        said = f"{values['model']:.4g} {unit} on validation data, {values['start']:.4g} before training: {cause}"
        found.append(Problem("worse than its start", said + kept, mend))
    elif learned_by_heart:
        said = f"{values['model']:.4g} {unit} on validation data, {values['training']:.4g} on training data"
        found.append(Problem("overfitting", said, _against_heart(config)))
    best = values["start"] if worse and config.train.fallback else values["model"]
    if not worse and unit == "bits/dim" and best < 0:
        said = f"{best:.4g} bits/dim say that grey levels are more than certain: one pass is not normalised"
        mend = "see the normalised ones: cdm nll RUN --methods elbo,flow"
        found.append(Problem("impossible likelihood", said, mend))
    if best > values.get("gaussian", math.inf):
        said = f"{best:.4g} {unit}, a fitted Gaussian has {values['gaussian']:.4g}"
        found.append(Problem("worse than a Gaussian", said, "leave out --model.gaussian and --model.components"))
    if best > values["uniform"]:
        said = f"{best:.4g} {unit}, a uniform density on the range of the data has {values['uniform']:.4g}"
        mend = "leave out --model.gaussian and --model.shrinkage, or train longer; look for outliers in the data"
        found.append(Problem("worse than a uniform density", said, mend))
    return found


def _against_heart(config: Config) -> str:
    rate = getattr(config.model.backbone, "dropout", 0.0)
    return f"try --model.backbone.dropout {min(0.5, rate + 0.15):g}, a smaller network, or more data"


def _gaussian(model: ClassificationDiffusion, config: Config, source: DataSource) -> ClassificationDiffusion:
    """The best single Gaussian as a model."""
    free = replace(config.model, gaussian=True, components=1, shrinkage=None, form=None)
    chosen, _ = choose_base(free, source, config.data.flip)
    z, _ = base_samples(source, config.data.flip)
    base = GaussianMarginals.fit(z, model.schedule, base_floor(source.transform), chosen.form, chosen.shrinkage)
    nothing = nn.Sequential(nn.Flatten(), nn.Linear(source.transform.dim, model.schedule.T + 2))
    nn.init.zeros_(nothing[1].weight), nn.init.zeros_(nothing[1].bias)
    return ClassificationDiffusion(nothing.to(model.schedule.alpha.device), model.schedule, model.transform, base)


def _uniform(source: DataSource, *samples: Tensor) -> float:
    """What a uniform density on the data's range has: bits/dim on a grid, nats in the box of the samples else.

    In a column with values that have a probability each is as likely as any other, and as all other numbers together.
    """
    transform, x = source.transform, torch.cat([part.flatten(1) for part in samples]).double()
    low, high = x.amin(0), x.amax(0)
    if transform.bin is None:
        nats = (high - low).clamp_min(1e-300).log()
        for k, values in transform.values.items() if isinstance(transform, ColumnTransform) else ():
            distances = (x[:, k, None] - torch.tensor(values).double()).abs().amin(1)
            others = x[distances > transform.cells[k] / 2, k]
            nats[k] = math.log(len(values) + bool(len(others)))
            if len(others) > 1:
                nats[k] += len(others) / len(x) * (others.max() - others.min()).clamp_min(1e-300).log()
        return float(nats.sum())
    low, high = (float(end) if given is None else given for end, given in
                 ((low.min(), transform.low), (high.max(), transform.high)))  # fmt: skip
    return math.log2((high - low) / transform.bin + 1)
