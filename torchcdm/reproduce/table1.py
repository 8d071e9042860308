"""Table 1: what the two losses do. Cross-entropy only, squared error only, both; and the earlier ratio estimator."""

from __future__ import annotations

from typing import Any

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.codec import encode
from torchcdm.data import DataSource, save_grid
from torchcdm.frechet import SMALLEST_COUNT, Extractor, extractor_for, frechet_distance
from torchcdm.likelihood import published_convention
from torchcdm.metrics import evaluate
from torchcdm.reproduce.ablation import SETTINGS, config_of, denoiser, samples_of, setting_of, source_of
from torchcdm.reproduce.result import Figure, Result, Table
from torchcdm.reproduce.workspace import Workspace

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
REAL = 10_000
"""At most so many training images for the Fréchet distance."""


def run(work: Workspace) -> Result:
    """Trains, samples and scores what is missing."""
    source, setting = source_of(work), setting_of(work)
    extractor = extractor_for(source, device=work.device or "cpu")
    real = extractor.features(source.train.tensors(REAL)[0])
    rows, figures = [], []
    for variant, title in ROWS.items():
        model, facts = denoiser(work, variant, source)
        x = samples_of(work, variant, model)
        values = _scores(work, variant, model, source)
        enough = len(x) >= SMALLEST_COUNT
        values["frechet"] = frechet_distance(extractor.features(x), real) if enough else None
        cells = [cell for key, known in zip(KEYS, PUBLISHED[variant], strict=True) for cell in (values[key], known)]
        rows.append((title, *cells, facts["steps"], round(facts["seconds"], 1)))
        path = save_grid(x[:64], work.figure(f"table1-{variant}"), source.transform)
        figures.append(Figure(path, f"Samples, {title} (DDIM, {setting.steps} steps)."))
    frechet = f"Fréchet distance (DDIM, {setting.steps})"
    names = ("accuracy of the level, %", "CE, nats", "MSE", frechet, "NLL, bits/dim")
    columns = ("loss", *(cell for name in names for cell in (name, "published")), "steps", "seconds")
    table = Table(_title(setting.data, setting.test, len(x), extractor), columns, tuple(rows))
    test = extractor.features(source.split("test").tensors(SMALLEST_COUNT)[0])
    distance = frechet_distance(test, real)
    floor = f"The Fréchet distance of {len(test)} test images to the same training images is {distance:.3g}."
    return Result((table,), tuple(figures), setting.scaled_down, (*_notes(len(x)), floor))


def _scores(work: Workspace, variant: str, model: Any, source: DataSource) -> dict[str, Any]:
    setting = setting_of(work)

    def make() -> dict[str, Any]:
        split = source.split("test")
        mean = evaluate(model, split, setting.test)["mean"]
        values = {"accuracy": 100 * mean["accuracy"], "ce": mean["ce"], "mse": mean["mse"]}
        assert isinstance(model, ClassificationDiffusion)
        nll = published_convention(model, split.tensors(setting.test)[0])
        return values | {"nll": nll.mean_and_error()[0]}

    return work.numbers(f"table1-{variant}", {"config": encode(config_of(work, variant)), "test": setting.test}, make)


def _title(data: str, test: int, samples: int, extractor: Extractor) -> str:
    return (
        f"{data}, {test} test images; Fréchet distance of {samples} samples to at most {REAL} training images in "
        f"{extractor.name}; published: CIFAR-10, Inception"
    )


def _notes(samples: int) -> tuple[str, ...]:
    notes = (
        "NLL is the published convention, undithered grey levels at level 0: no bound on a code length.",
        "The MSE leaves out the levels 0 and T+1. The paper has no row of numbers for TRE; it shows that TRE fails on "
        "CIFAR-10.",
    )
    few = f"{samples} samples are too few for a Fréchet distance; {SMALLEST_COUNT} are needed."
    return notes if samples >= SMALLEST_COUNT else (*notes, few)
