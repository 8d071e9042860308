"""What a run reports of itself at the end: likelihoods beside baselines, errors by level, figures."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from torchcdm import __version__
from torchcdm.apps import plots
from torchcdm.apps.baselines import LARGEST_DIM, Baseline, baselines
from torchcdm.compose import sample
from torchcdm.data import DataSource
from torchcdm.likelihood import NLLReport, Scoring, consistency, gap_by_level, methods_of
from torchcdm.likelihood import report as likelihood_report
from torchcdm.likelihood.scoring import dithered
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.artefact import read_json
from torchcdm.runtime.files import write_json
from torchcdm.training.checkpoint import load
from torchcdm.training.config_files import file_fields, make_config
from torchcdm.training.evaluation import evaluate, log_posteriors
from torchcdm.training.run_folder import RunFolder, read_metrics
from torchcdm.training.samples import balanced_labels, sampling_options
from torchcdm.training.settings import Config
from torchcdm.units import GaussianizedTransform

DIAGNOSED = 32
"""Samples on which levels are compared with each other and with the flow: T passes each."""

FIGURE_SAMPLES = 256
NEIGHBOUR_POOL = 10_000

ROW_NAMES = {
    "one-pass": "one forward pass, level {}",
    "one-pass-level": "one forward pass, level {}",
    "one-pass-normalized": "one forward pass, level {}, normalised",
    "elbo": "ELBO, level {}",
    "flow": "probability flow, level {}",
}
"""Rows of a likelihood report in the table of baselines."""


class RunReport(NamedTuple):
    """The report of a run: ``content`` as in ``report.json``, ``text`` for the terminal."""

    content: dict[str, Any]
    text: str


def write_report(
    run: str | Path, source: DataSource, device: str | torch.device = "cpu", progress: bool = True
) -> RunReport:
    """Measures the run in a folder on the test split of its data; leaves ``report.json`` and ``plots/`` there."""
    folder = RunFolder(run)
    config = make_config(file_fields(folder.config))
    model = load(run, device)
    split = source.test or source.validation or source.train
    split_name = "test" if source.test else "validation" if source.validation else "train"
    evaluation = evaluate(model, split, config.report.limit)
    nll, beside, ratios, gaps = None, [], None, None
    methods = [method for method in config.report.methods if method in methods_of(model)]
    if methods:
        x, _ = split.tensors(config.report.limit)
        scoring = Scoring(draws=config.report.draws, steps=config.report.flow_steps)
        # The unconditional density, also of models that saw classes: the baselines know none.
        nll = likelihood_report(
            model, x, None, scoring, methods, config.report.sweeps, name=source.name, split=split_name,
            progress=progress,
        )  # fmt: skip
        beside = _baselines(config, source, x)
        few, _ = split.tensors(min(DIAGNOSED, max(2, config.report.limit // 4)))
        if model.density is not None and len(few) >= 2:
            ratios = consistency(model.density, few)
            gaps = gap_by_level(model.density, few, None, scoring) if "flow" in methods else None
            plots.consistency(ratios, gaps, folder.plots / "consistency.png")
    lines = read_metrics(folder.metrics)
    _figures(folder, model, source, config, evaluation, lines)
    last = {"step": 0, "seconds": 0.0} | (lines[-1] if lines else {})
    found = {"nll": nll, "consistency": ratios, "gap_to_flow_by_level": gaps}
    content = {
        "preset": config.preset,
        "data": {"name": source.name, "split": split_name, "count": evaluation["count"], "dim": source.transform.dim},
        "steps": last["step"],
        "seconds": last["seconds"],
        "versions": {"torchcdm": __version__, "torch": torch.__version__, "numpy": np.__version__,
                     "python": platform.python_version()},
        "baselines": [baseline._asdict() for baseline in beside],
        "levels": evaluation["mean"],
        # What the training found of its model and of what it has to beat.
        "outcome": read_json(folder.report).get("outcome") if folder.report.exists() else None,
        **{name: None if value is None else value.to_json() for name, value in found.items()},
    }  # fmt: skip
    write_json(folder.report, content)
    return RunReport(content, _text(nll, beside, evaluation))


def _baselines(config: Config, source: DataSource, x: torch.Tensor) -> list[Baseline]:
    """Baselines on the very dequantised samples that one pass was scored on; none of data with many dimensions.

    Where the model sees Gaussianised grey levels, in the plain units too: what is the network's, and what the map's.
    """
    if not config.report.baselines or source.transform.dim > LARGEST_DIM or not source.validation:
        return []
    transform = source.transform
    noisy = dithered(transform, x, seed=0)
    found = baselines(source, noisy)
    if not transform.gaussianized:
        return found
    same = [baseline._replace(name=f"{baseline.name}, Gaussianised") for baseline in found]
    if not isinstance(transform, GaussianizedTransform):
        return same
    return same + baselines(replace(source, transform=transform.affine), noisy)


def _figures(
    folder: RunFolder,
    model: Denoiser,
    source: DataSource,
    config: Config,
    evaluation: dict[str, Any],
    lines: list[dict[str, Any]],
) -> None:
    plots.training_curves(lines, folder.plots / "training.png")
    plots.level_errors(evaluation["per_level"], folder.plots / "levels.png")
    x, _ = (source.test or source.train).tensors(FIGURE_SAMPLES)
    if model.density is not None:
        plots.level_posteriors(log_posteriors(model.density, x), folder.plots / "posteriors.png")
    images, plane = len(source.shape) == 3, source.shape == (2,)
    if not images and not plane:
        return
    n = min(32, config.sampling.n or 32) if images else 2000
    y = None if model.classes is None else balanced_labels(n, model.classes)
    options = sampling_options(model, config.sampling)
    drawn = sample(model, n, y=y, seed=config.train.seed, units="codes", **options)
    train, _ = source.train.tensors(NEIGHBOUR_POOL)
    if plane:
        plots.scatter(drawn, source.train.tensors(n)[0], folder.plots / "samples.png")
    elif source.shape[0] in (1, 3):
        plots.neighbours(drawn, train, folder.plots / "neighbours.png", model.transform)


def _text(nll: NLLReport | None, beside: list[Baseline], evaluation: dict[str, Any]) -> str:
    lines = [] if nll is None else [nll.table(), ""]
    if nll is not None and beside:
        ours = [row for row in nll.rows if row.name in ROW_NAMES and row.value is not None]
        rows = [("this model, " + ROW_NAMES[row.name].format(row.level), row.value, row.se) for row in ours]
        rows += [(b.name, b.value, b.se) for b in beside]
        lines.append(f"{'density model, same test samples':52}{nll.unit:>9}{'s.e.':>9}")
        lines += [f"{name:52}{value:9.3f}{se:9.3f}" for name, value, se in sorted(rows, key=lambda row: row[1])]
        lines.append("")
    means = ", ".join(f"{name} {value:.4f}" for name, value in evaluation["mean"].items())
    lines.append(f"over all levels of {evaluation['count']} samples: {means}")
    return "\n".join(lines)
