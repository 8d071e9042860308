"""Table 1: what the two losses do. Cross-entropy only, squared error only, both; and the earlier ratio estimator."""

from __future__ import annotations

from functools import partial
from typing import Any

from studies.quality.frechet import Reference
from studies.reproduce.models import SETTINGS, Models
from studies.reproduce.result import Result, Table
from studies.reproduce.workspace import Workspace
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.runtime.validation import encode
from torchcdm.training.evaluation import evaluate

__all__ = ["SETTINGS", "run"]

ROWS = {"ce": "CE only", "mse": "MSE only", "both": "both", "tre": "TRE, logistic losses of adjacent pairs"}

PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "ce": (6.97, 4.49, 0.225, 329.0, 8.27),
    "mse": (0.0, 1659.0, 0.028, 7.65, 9.32),
    "both": (8.34, 4.37, 0.028, 7.56, 3.38),
    "tre": (None, None, None, None, None),
}
"""arXiv 2402.10095, Table 1, CIFAR-10: accuracy in percent, CE, MSE, FID (DDIM, 50 steps), NLL in bits/dim."""

KEYS = ("accuracy", "ce", "mse", "frechet", "nll")


def run(work: Workspace) -> Result:
    """Trains, samples and scores what is missing."""
    models = Models(work)
    setting, reference = models.setting, Reference(models.source, work.device, work.features)
    sampler = f"DDIM, {setting.steps['ddim']} steps"
    rows, figures, count = [], [], setting.samples
    for variant, title in ROWS.items():
        x = work.finished(title, partial(models.samples, variant))
        if x is None:
            continue
        count = len(x)
        _, facts = models.denoiser(variant)
        values = _scores(models, variant) | {"frechet": reference.printable(x)}
        cells = [cell for key, known in zip(KEYS, PUBLISHED[variant], strict=True) for cell in (values[key], known)]
        rows.append((title, *cells, facts["steps"], round(facts["seconds"], 1)))
        figures.append(models.figure(f"table1-{variant}", x, f"{title} ({sampler})"))
    names = ("accuracy of the level, %", "CE, nats", "MSE", f"Fréchet distance ({sampler})", "NLL, bits/dim")
    columns = ("loss", *(cell for name in names for cell in (name, "published")), "steps", "seconds")
    title = (
        f"{setting.data}, {setting.test} test images; {reference.header(count)}; published: CIFAR-10, Inception"
    )
    notes = (
        "NLL is the published convention, undithered grey levels at level 0: no bound on a code length.",
        "The MSE leaves out the levels 0 and T+1. The paper has no row of numbers for TRE; it shows that TRE fails on "
        "CIFAR-10.",
        *reference.notes(count),
    )
    return Result((Table(title, columns, tuple(rows)),), tuple(figures), setting.scaled_down, notes)


def _scores(models: Models, variant: str) -> dict[str, Any]:
    test = models.setting.test

    def make() -> dict[str, Any]:
        model, split = models.classifier(variant), models.source.split("test")
        mean = evaluate(model, split, test)["mean"]
        nll = single_pass(model, split.tensors(test)[0], None, Scoring(0), dither=False).mean_and_error()[0]
        return {"accuracy": 100 * mean["accuracy"], "ce": mean["ce"], "mse": mean["mse"], "nll": nll}

    facts = {"config": encode(models.config(variant)), "test": test}
    return models.work.numbers(f"table1-{models.name(variant)}", facts, make)
