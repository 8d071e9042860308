"""What a run reports of itself at the end: likelihoods beside baselines, errors by level, figures."""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcdm import __version__
from torchcdm.apps import plots
from torchcdm.apps.baselines import LARGEST_DIM, Baseline, baselines
from torchcdm.data import DataSource
from torchcdm.likelihood import NLLReport, Scoring, methods_of, report as likelihood_report
from torchcdm.likelihood.log_z import TRAINING, weights_of, write_log_z
from torchcdm.likelihood.scoring import dithered
from torchcdm.runtime.files import write_json
from torchcdm.training.checkpoint import load
from torchcdm.training.config_files import file_fields, make_config
from torchcdm.training.evaluation import evaluate
from torchcdm.training.finish import FLOW_COST, affordable
from torchcdm.training.run_folder import RunFolder, read_metrics, read_report
from torchcdm.units import DataTransform, GaussianizedTransform


def write_report(
    run: str | Path, source: DataSource, device: str | torch.device = "cpu", progress: bool = True
) -> str:
    """Measures the run in a folder on the test split of its data; leaves ``report.json`` and ``plots/`` there. Gives
    the report for the terminal."""
    folder = RunFolder(run)
    config, weights, model = make_config(file_fields(folder.config)), weights_of(folder.root), load(run, device)
    split_name = next(name for name in ("test", "validation", "train") if getattr(source, name))
    split, limit, lines = getattr(source, split_name), config.report.limit, read_metrics(folder.metrics)
    last = {"step": 0, "seconds": 0.0} | (lines[-1] if lines else {})
    limit = affordable(config, last["step"], FLOW_COST, 8, 500) if limit is None else limit
    evaluation = evaluate(model, split, limit, progress=progress)
    nll, beside = None, []
    methods = [method for method in config.report.methods if method in methods_of(model)]
    if methods:
        x, _ = split.tensors(limit)
        scoring = Scoring(draws=config.report.draws, steps=config.report.flow_steps)
        # The unconditional density, also of models that saw classes: the baselines know none.
        said = {"name": source.name, "split": split_name, "progress": progress}
        usual = source.train.tensors(TRAINING)[0]
        nll = likelihood_report(model, x, None, scoring, methods, config.report.sweeps, training=usual, **said)
        if nll.log_z is not None and not nll.log_z.lacking:
            write_log_z(folder.root, nll.log_z, weights)
        beside = _beside(source, x) if config.report.baselines else []
        if nll.gaps is not None:
            plots.gaps_to_flow(nll.gaps, folder.plots / "gaps.png")
    plots.training_curves(lines, folder.plots / "training.png")
    plots.level_errors(evaluation["per_level"], folder.plots / "levels.png")
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
        "outcome": read_report(folder.report).get("outcome"),
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
        plain = DataTransform.images(transform.shape, round(transform.high - transform.low) + 1, low=transform.low)
        found += baselines(replace(source, transform=plain), noisy)
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
