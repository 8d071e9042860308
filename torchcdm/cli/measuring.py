"""``cdm nll`` and ``cdm evaluate``."""

from __future__ import annotations

import argparse

from torchcdm.cli.arguments import given, tell
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, methods_of, report
from torchcdm.runtime.processes import sharing
from torchcdm.training.checkpoint import load, read_info
from torchcdm.training.evaluation import evaluate as evaluated
from torchcdm.training.evaluation import labels_for


def nll(options: argparse.Namespace) -> None:
    """Likelihood of a split."""
    scoring = Scoring(**given(
        level=options.level, draws=options.draws, seed=options.seed, steps=options.flow_steps,
        probes=options.flow_probes,
    ))  # fmt: skip
    info = read_info(options.model)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        # log Z takes longer than all others.
        methods = [method for method in methods_of(model) if method != "logz"]
        if options.methods is not None:
            methods = [method for method in map(str.strip, options.methods.split(",")) if method]
        source = info.read_source(model, options.data, labelled=options.conditional)
        x, labels = source.split(options.split).tensors(options.limit)
        y = labels_for(model, labels) if options.conditional else None
        if options.conditional and y is None:
            raise UserError("--conditional: the model or the data have no classes")
        result = report(
            model, x, y, scoring, methods, name=source.name, split=options.split,
            progress=main and not options.quiet, **given(sweeps=options.sweeps),
        )  # fmt: skip
    if main:
        tell(options.json, result.table(), result.to_json())


def evaluate(options: argparse.Namespace) -> None:
    """Classifier and denoiser by level."""
    info = read_info(options.model)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        source = info.read_source(model, options.data, labelled=True)
        values = evaluated(model, source.split(options.split), options.limit, options.draws)
    if main:
        text = "\n".join(f"{name:10} {value:.4f}" for name, value in values["mean"].items())
        tell(options.json, text, {"data": {"name": source.name, "split": options.split}} | values)
