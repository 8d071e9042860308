"""Makes the models that ship with the package: trains by a preset, measures, writes weights and card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchcdm.apps.report import write_report
from torchcdm.bridges.hub import model_card
from torchcdm.errors import UserError
from torchcdm.likelihood.log_z import read_log_z, weights_of, write_log_z
from torchcdm.runtime.files import write_file
from torchcdm.training.checkpoint import load, read_info, save_curvatures, save_model
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.loop import train
from torchcdm.training.run_folder import RunFolder
from torchcdm.zoo import CARD

REPORT = {"methods": ["single", "elbo", "flow", "logz"], "draws": 4, "baselines": True}
"""What is measured of a small model; the card has it, ..."""

LARGER_REPORT = {"methods": ["single", "elbo", "flow"], "limit": 200}
"""... and of one of larger images, whose log Z takes hours."""


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Attributes:
        preset: What it is trained by.
        data: SPEC; that of the preset when None.
        description: One line for ``cdm zoo`` and the card.
        origin: The data and their licence.
        limits: What it is not for, one sentence each.
        report: What is measured of it.
    """

    preset: str
    data: str | None
    description: str
    origin: str
    limits: tuple[str, ...]
    report: Mapping[str, Any] = field(default_factory=lambda: REPORT)


DIGITS = (
    "scikit-learn's handwritten digits: 1797 images of 8x8 pixels, grey levels 0 ... 16; 1300 for training, 200 for "
    "validation, 297 for test (SPEC `digits`). From the UCI repository, Optical Recognition of Handwritten Digits "
    "(Alpaydin and Kaynak, 1998), licence CC BY 4.0."
)
TINY = "8x8 images of digits, normalised and written by 43 people: nothing else looks likely to it, nor should it."

MODELS = {
    "digits": ZooModel("digits", None, "Handwritten digits, 8x8 grey levels", DIGITS, (TINY,)),
    "digits-conditional": ZooModel(
        "digits-conditional", None, "Handwritten digits, 8x8 grey levels, with the ten classes in one pass", DIGITS,
        (TINY, "The class posterior was trained for densities; a classifier of its own is more accurate."),
    ),
    "fashion-mnist-conditional": ZooModel(
        "fashion-mnist-conditional", None, "Clothes, 28x28 grey levels, with the ten classes in one pass",
        "Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), licence MIT: 60 000 images of 28x28 pixels for training, of "
        "which 5000 are for validation, and 10 000 for test (SPEC `fashion-mnist`).",
        ("Trained for an hour of one core, for pictures: a longer training and Gaussianised grey levels have more "
         "likelihood.",
         "Its log Z was measured at level 64 only, class by class, and plain grey levels are a lattice for its flow, "
         "whose 50 steps leave an error of 0.19 bits/dim: the ELBO and the restricted rows of `cdm nll` are the "
         "numbers to trust."),
        LARGER_REPORT,
    ),
    "two-moons": ZooModel(
        "two-moons", None, "Two interleaved half circles in the plane",
        "10 000 draws of a distribution whose density is known (SPEC `toy:two-moons`); synthetic, without a licence.",
        ("An example for documentation and tests.",),
    ),
    "table-example": ZooModel(
        "table", "wine", "A table: 13 measured columns of 178 wines",
        "scikit-learn's wine data: 178 rows, 13 columns; 142 for training, 18 for validation, 18 for test (SPEC "
        "`wine`). From the UCI repository, Wine (Aeberhard and Forina, 1992), licence CC BY 4.0.",
        ("178 rows of three cultivars of one region in 1991: an example of a small table, no judge of wines.",
         "18 test rows: the standard errors are large."),
    ),
}  # fmt: skip
"""What ships, by its name."""


def make(name: str, run: Path, home: Path) -> str:
    """Trains a model, unless ``run`` holds it, and writes its weights, ``config.json`` and its card to ``home``.

    Returns:
        One line about it.

    Raises:
        UserError: ``run`` holds another model.
    """
    entry, folder = MODELS[name], RunFolder(run)
    given = {"data": {"spec": entry.data}} if entry.data else {}
    config = make_config(preset_fields(entry.preset), given, {"report": dict(entry.report)})
    if not folder.report.exists():
        result = train(config, run)
        write_report(run, result.source)
    info = read_info(run)
    if info.preset != entry.preset:
        raise UserError(f"{run}: holds a model of preset {info.preset}, not of {entry.preset}; give another --out")
    report = json.loads(folder.report.read_text(encoding="utf-8"))
    model = load(run)
    save_model(RunFolder(home), model, info)
    model.sample(1)  # finds where steps lie
    save_curvatures(RunFolder(home), model)
    log_z = read_log_z(run)
    if log_z is not None:  # of a larger model: cdm nll RUN --methods logz, then this once more
        write_log_z(home, log_z, weights_of(home))
    parameters = sum(weights.numel() for weights in model.parameters())
    card = model_card(
        f"zoo:{name}", info, parameters, entry.description,
        f"{entry.origin}\n\n## Made by\n\n    python -m studies zoo {name}", report, entry.limits, f"zoo:{name}",
    )  # fmt: skip
    write_file(home / CARD, card)
    size = (home / "model.safetensors").stat().st_size / 2**20
    return f"{home}: {parameters} weights, {size:.2f} MiB"
