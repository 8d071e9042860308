"""Table 3: likelihoods of all systems and what they cost: those of the paper in its own form, and all that can be
trained here, in the same time, under one protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from studies.budget import Budget
from studies.compare.comparison import compare
from studies.compare.denoising import FittedDenoiser
from studies.compare.own import preset_of
from studies.compare.peer import Training
from studies.compare.peers import PEERS
from studies.compare.results import PUBLISHED as WITHOUT_LIBRARY, Comparison
from studies.reproduce.models import Models
from studies.reproduce.result import Cell, Result, Table
from studies.reproduce.workspace import Workspace
from torchcdm.data import DataOptions, DataSource
from torchcdm.runtime.validation import encode
from torchcdm.training.build import load_source

SYSTEMS = ("cdm", "cdm-linear", "cdm-uniform", "cdm-ot", "ddm", "realnvp", "glow", "residual-flow", "i-resnet", "nsf",
           "maf", "ffjord", "flow-matching")  # fmt: skip
"""Ours, and those of the paper's table with the autoregressive flows beside them."""


@dataclass(frozen=True)
class Number:
    """NLL on the CIFAR-10 test set, bits/dim, and network evaluations, in arXiv 2402.10095, Table 3."""

    value: float
    nfe: int


PUBLISHED_OWN = {
    ("both", "one-pass"): Number(3.38, 1),
    ("uniform", "one-pass"): Number(2.98, 1),
    ("ot", "one-pass"): Number(2.89, 1),
    ("ddm-bound", "elbo"): Number(3.70, 1000),
    ("ddm", "elbo"): Number(3.75, 1000),
    ("ddm", "flow"): Number(3.28, 200),
}
"""Of the models of the paper's form, by model and likelihood; ELBOs are upper bounds."""

PUBLISHED_PEERS = {
    "realnvp": Number(3.49, 1),
    "glow": Number(3.35, 1),
    "residual-flow": Number(3.28, 1),
    "i-resnet": Number(3.45, 100),
    "ffjord": Number(3.40, 3000),
    "flow-matching": Number(2.99, 142),
}

PUBLISHED_ONLY = (
    *((entry.title, Number(entry.value, entry.nfe)) for entry in WITHOUT_LIBRARY),
    ("DDM, learned schedule (VDM)", Number(2.65, 10_000)),
    ("DDPM++ cont.", Number(2.99, 200)),
)
"""Systems that are not measured here."""

OWN_ROWS = {
    "both": "CDM",
    "uniform": "CDM, uniform sigma",
    "ot": "CDM, optimal transport",
    "ddm-bound": "DDM, trained on L",
    "ddm": "DDM, trained on L_simple",
}

LIKELIHOODS = {
    "one-pass": "one pass, level 0",
    "one-pass-level": "one pass, noisy level",
    "one-pass-normalized": "one pass, normalised",
    "elbo": "ELBO",
    "flow": "probability flow",
    "density": "density",
    "importance": "density, mean of 16 draws",
}
"""What the rows of a comparison are called here."""


@dataclass(frozen=True)
class Setting:
    """One scale.

    Attributes:
        test: Test images that are scored.
        budget: Seconds of training for each system under one protocol.
        clock: What a second is, see :data:`studies.budget.CLOCKS`.
        log_z: Sweeps of the estimate of log Z.
        systems: Of :mod:`studies.compare`.
        normalised: Those of them whose log Z is estimated.
        scaled_down: How it is smaller than the published setting, beyond the models' own.
    """

    test: int
    budget: float
    clock: str
    log_z: int
    systems: tuple[str, ...] = SYSTEMS
    normalised: tuple[str, ...] = ("cdm", "cdm-linear", "cdm-uniform", "cdm-ot")
    scaled_down: tuple[str, ...] = ()


SETTINGS = {
    "smoke": Setting(
        16, 4.0, "processor", 64, normalised=("cdm",),
        scaled_down=("16 test images, 4 s of training under one protocol; log Z of one system alone",),
    ),
    "small": Setting(
        300, 300.0, "processor", 256, normalised=("cdm",),
        scaled_down=(
            "300 test images; 300 s of processor time to train each system under one protocol",
            "log Z of the default CDM alone",
        ),
    ),
    "paper": Setting(
        2000, 8 * 3600.0, "wall", 1024,
        scaled_down=("2000 test images; 8 h to train each system under one protocol",),
    ),
}  # fmt: skip


def run(work: Workspace) -> Result:
    """Trains and scores what is missing."""
    setting, models = SETTINGS[work.scale], Models(work)
    data, source = _dequantised(models)
    names = [name for name in setting.systems if PEERS[name].unsuited(source.shape) is None]
    missing = [name for name in names if PEERS[name].library and find_spec(PEERS[name].library) is None]
    folder = work.root / "compared" / f"{source.name}-{work.scale}"
    comparison = compare(
        source, setting.budget, folder, [name for name in names if name not in missing], setting.clock,
        limit=setting.test, device=torch.device(work.device), data=data, progress=work.progress, log_z=setting.log_z,
        normalised=setting.normalised, seed=work.seed,
    )  # fmt: skip
    tables = _own_table(models, setting), _compared_table(comparison)
    notes = [
        "Published: CIFAR-10, bits/dim; those of CDMs are one pass over undithered grey levels at level 0, no bound "
        "on a code length. ELBOs use at most 100 of the levels, drawn at random, which leaves the bound unbiased.",
        "One pass is normalised by an estimate of log Z; there is no such row where the estimate has too small an "
        "effective sample size, or two estimators disagree.",
    ]
    notes += [f"{result.title}: {result.note}." for result in comparison.results if result.note]
    if missing:
        notes.append(f"Not installed: {', '.join(missing)}; pip install 'torchcdm[studies]'.")
    return Result(tables, (), (*models.setting.scaled_down, *setting.scaled_down), tuple(notes))


def _dequantised(models: Models) -> tuple[DataOptions, DataSource]:
    """The same data as a comparison sees them: dequantised, with a validation split, in the preset's units."""
    own = models.config("both").data
    data = DataOptions(spec=own.spec, size=own.size)
    data = replace(data, gaussianize=preset_of(load_source(data)).data.gaussianize)
    return data, load_source(data)


def _own_table(models: Models, setting: Setting) -> Table:
    """The models of the Tables 1 and 2."""
    x, _ = models.source.split("test").tensors(setting.test)
    rows: list[tuple[Cell, ...]] = []
    for variant, title in OWN_ROWS.items():

        def make(variant: str = variant) -> dict[str, Any]:
            model, facts = models.denoiser(variant)
            training = Training(facts["steps"], facts["seconds"], None, facts["steps"], "")
            scores = FittedDenoiser(model, training).scores(x, Budget(setting.budget, setting.clock))
            found = {s.name: (*s.likelihood.mean_and_error(), s.likelihood.nfe) for s in scores}
            return found | {"steps": facts["steps"], "seconds": facts["seconds"]}

        facts = {"config": encode(models.config(variant)), "test": setting.test}
        values = models.work.numbers(f"table3-{models.name(variant)}", facts, make)
        for name, likelihood in LIKELIHOODS.items():
            if name in values:
                published = _published(PUBLISHED_OWN.get((variant, name)))
                rows.append((title, likelihood, *values[name], *published, values["steps"], values["seconds"]))
    rows += [(title, None, None, None, None, *_published(number), None, None) for title, number in PUBLISHED_ONLY]
    return Table(
        f"{models.source.name}, the paper's form (no Gaussian residual, no dequantisation), NLL in bits/dim of "
        f"{len(x)} test images",
        ("system", "likelihood", "NLL", "s.e.", "NFE", "published", "published NFE", "steps", "seconds"),
        tuple(rows),
    )


def _compared_table(comparison: Comparison) -> Table:
    """Systems under one protocol, the best first; those that need not be normalised below the others."""
    protocol, rows = comparison.protocol, []
    for normalised in (True, False):
        for result, row in comparison.ranked(normalised):
            published = _published(PUBLISHED_PEERS.get(result.name))
            cells = row.value, row.se, row.nfe, *published, result.steps, result.seconds, result.parameters
            rows.append((result.title, LIKELIHOODS[row.name], "yes" if normalised else "no", *cells))
    for result in comparison.results:
        if result.status != "measured":
            published = _published(PUBLISHED_PEERS.get(result.name))
            rows.append((result.title, "diverged", "–", None, None, None, *published, None, result.seconds, None))
    units = ", grey levels Gaussianised" if protocol.gaussianized else ""
    clock = {"wall": "s", "processor": "s of processor time"}[protocol.clock]
    return Table(
        f"{protocol.data}, one protocol: dequantised{units}, {protocol.budget:g} {clock} to train, NLL in "
        f"{protocol.unit} of {protocol.test} test images",
        ("system", "likelihood", "normalised", "NLL", "s.e.", "NFE", "published", "published NFE", "steps", "seconds",
         "parameters"),
        tuple(rows),
    )  # fmt: skip


def _published(number: Number | None) -> tuple[Cell, Cell]:
    return (None, None) if number is None else (number.value, number.nfe)
