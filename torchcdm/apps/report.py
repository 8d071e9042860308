"""What a run reports of itself at the end: likelihoods beside baselines, errors by level, figures."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm import __version__
from torchcdm.apps import plots
from torchcdm.data import DataSource
from torchcdm.diffusion.gaussian import SHRINKAGES
from torchcdm.diffusion.mixture import maximised
from torchcdm.likelihood import NLLReport, Scoring, methods_of
from torchcdm.likelihood import report as likelihood_report
from torchcdm.likelihood.log_z import TRAINING, weights_of, write_log_z
from torchcdm.likelihood.scoring import dithered
from torchcdm.random import stream
from torchcdm.runtime.artefact import read_json
from torchcdm.runtime.files import write_json
from torchcdm.training.checkpoint import load
from torchcdm.training.config_files import file_fields, make_config
from torchcdm.training.evaluation import evaluate
from torchcdm.training.run_folder import RunFolder, read_metrics
from torchcdm.units import DataTransform, GaussianizedTransform, LogLikelihood

LARGEST_DIM, LARGEST_COUNT = 256, 5000
"""More dimensions or training samples would take longer than the network."""

COMPONENTS = {"full": (2, 5, 10, 15), "diag": (10, 20, 40, 80)}
BANDWIDTHS = np.geomspace(0.02, 2.0, 16)
"""Model units: grey levels fill [-1, 1], continuous columns have unit deviation."""

Candidates = Iterator[tuple[str, Any]]
"""Names with settings, and fitted models of scikit-learn; ``score_samples`` gives their log densities."""


class Baseline(NamedTuple):
    """Mean NLL of one density model on the test split and its standard error; the unit is ``bits/dim`` or ``nats``."""

    name: str
    value: float
    se: float
    unit: str


def write_report(
    run: str | Path, source: DataSource, device: str | torch.device = "cpu", progress: bool = True
) -> str:
    """Measures the run in a folder on the test split of its data; leaves ``report.json`` and ``plots/`` there. Gives
    the report for the terminal."""
    folder = RunFolder(run)
    config, weights, model = make_config(file_fields(folder.config)), weights_of(folder.root), load(run, device)
    split_name = next(name for name in ("test", "validation", "train") if getattr(source, name))
    split, limit = getattr(source, split_name), config.report.limit
    evaluation = evaluate(model, split, limit)
    nll, beside = None, []
    methods = [method for method in config.report.methods if method in methods_of(model)]
    if methods:
        x, _ = split.tensors(limit)
        scoring = Scoring(draws=config.report.draws, steps=config.report.flow_steps)
        # The unconditional density, also of models that saw classes: the baselines know none.
        said = {"name": source.name, "split": split_name, "progress": progress}
        usual = source.train.tensors(TRAINING)[0]
        nll = likelihood_report(model, x, None, scoring, methods, config.report.sweeps, training=usual, **said)
        if nll.log_z is not None and nll.log_z.usable:
            write_log_z(folder.root, nll.log_z, weights)
        beside = _beside(source, x) if config.report.baselines else []
        if nll.gaps is not None:
            plots.gaps_to_flow(nll.gaps, folder.plots / "gaps.png")
    lines = read_metrics(folder.metrics)
    plots.training_curves(lines, folder.plots / "training.png")
    plots.level_errors(evaluation["per_level"], folder.plots / "levels.png")
    last = {"step": 0, "seconds": 0.0} | (lines[-1] if lines else {})
    versions = {"torchcdm": __version__, "torch": torch.__version__, "numpy": np.__version__}
    numbers = {
        "preset": config.preset,
        "data": {"name": source.name, "split": split_name, "count": evaluation["count"], "dim": source.transform.dim},
        "steps": last["step"],
        "seconds": last["seconds"],
        "versions": versions | {"python": platform.python_version()},
        "baselines": [baseline._asdict() for baseline in beside],
        "levels": evaluation["mean"],
        # What the training found of its model and of what it has to beat.
        "outcome": read_json(folder.report).get("outcome") if folder.report.exists() else None,
        "nll": nll and nll.to_json(),
        "gap_to_flow_by_level": nll and nll.gaps,
    }
    write_json(folder.report, numbers)
    return _text(nll, beside, evaluation)


def _beside(source: DataSource, x: Tensor) -> list[Baseline]:
    """Baselines on the dequantised samples that one pass was scored on, of Gaussianised data in plain units too."""
    transform = source.transform
    if transform.dim > LARGEST_DIM or not source.validation:
        return []
    noisy = dithered(transform, x, seed=0)
    found = baselines(source, noisy)
    if transform.gaussianized:
        found = [baseline._replace(name=f"{baseline.name}, Gaussianised") for baseline in found]
    if isinstance(transform, GaussianizedTransform):
        found += baselines(replace(source, transform=transform.affine), noisy)
    return found


def _text(nll: NLLReport | None, beside: list[Baseline], evaluation: dict[str, Any]) -> str:
    lines = [] if nll is None else [nll.table(), ""]
    if nll is not None and beside:
        ours = [row for row in nll.rows if row.name != "published-convention" and row.value is not None]
        rows = [(f"this model, {row.name}, level {row.level}", row.value, row.se) for row in ours]
        rows += [(baseline.name, baseline.value, baseline.se) for baseline in beside]
        lines.append(f"{'density model, same test samples':52}{nll.unit:>9}{'s.e.':>9}")
        lines += [f"{name:52}{value:9.3f}{se:9.3f}" for name, value, se in sorted(rows, key=lambda row: row[1])]
        lines.append("")
    means = ", ".join(f"{name} {value:.4f}" for name, value in evaluation["mean"].items())
    return "\n".join([*lines, f"over all levels of {evaluation['count']} samples: {means}"])


def baselines(source: DataSource, test: Tensor) -> list[Baseline]:
    """Full-covariance Gaussian, kernel density and Gaussian mixture, chosen on the validation split.

    ``test`` samples (N, *shape) are dequantised, in data units.
    """
    transform, seed = source.transform, 0
    train, validation = training_arrays(source, seed)
    points = transform(test.double()).flatten(1).numpy()
    found = []
    for candidates in (gaussians, kernels, mixtures):
        fitted = candidates(train, smallest_variance(transform), seed)
        name, best = max(fitted, key=lambda candidate: candidate[1].score_samples(validation).mean())
        nats = torch.from_numpy(best.score_samples(points)) + transform.log_det(test.double())
        result = LogLikelihood(nats, transform.dim, 0, transform.log_bin, 0)
        found.append(Baseline(name, *result.mean_and_error(), result.unit))
    return found


def training_arrays(source: DataSource, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation samples, at most :data:`LARGEST_COUNT` each: dequantised, model units, (N, d)."""
    parts = (split.tensors(LARGEST_COUNT)[0].double() for split in (source.train, source.validation))
    encoded = (source.transform.encode(x, stream(seed, "dequantise", i)) for i, x in enumerate(parts))
    train, validation = (z.flatten(1).numpy() for z in encoded)
    return train, validation


def smallest_variance(transform: DataTransform) -> float:
    """That of a grey level's cell, model units."""
    return 1e-6 if transform.model_bin is None else float(transform.model_bin.min()) ** 2 / 12


def gaussians(train: np.ndarray, floor: float, seed: int) -> Candidates:
    """The Gaussian of the data, moved by several shares to a round one; arguments as in :func:`mixtures`."""
    fitted = maximised(train, 1, covariance_type="full", reg_covar=floor, random_state=seed)
    covariance, identity = fitted.covariances_[0], np.eye(train.shape[1])
    for share in SHRINKAGES:
        model = deepcopy(fitted)
        moved = (1 - share) * covariance + share * covariance.trace() / len(covariance) * identity
        model.covariances_, model.precisions_cholesky_ = moved[None], np.linalg.inv(np.linalg.cholesky(moved)).T[None]
        yield "Gaussian, full covariance", model


def kernels(train: np.ndarray, floor: float, seed: int) -> Candidates:
    """Kernel density estimates of several bandwidths; arguments as in :func:`mixtures`."""
    from sklearn.neighbors import KernelDensity

    for bandwidth in BANDWIDTHS:
        yield f"kernel density, bandwidth {bandwidth:.3f}", KernelDensity(bandwidth=float(bandwidth)).fit(train)


def mixtures(train: np.ndarray, floor: float, seed: int) -> Candidates:
    """Gaussian mixtures of several sizes, of ``train`` (N, d), model units; ``floor`` is added to all variances.

    The components begin by ``seed``. Sizes that have fewer than two samples each are left out.
    """
    for form, counts in COMPONENTS.items():
        for count in (count for count in counts if count < len(train) // 2):
            model = maximised(train, count, covariance_type=form, reg_covar=floor, random_state=seed)
            yield f"Gaussian mixture, {count} {form}", model
