"""Table 2: the plain diffusion model (DDM) against the CDM under three samplers, with and without classes; and the
CDMs of the other schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from studies.quality.frechet import COMPARED, Reference
from studies.reproduce.models import CELEBA, SETTINGS, Models, Setting
from studies.reproduce.result import Cell, Figure, Result, Table
from studies.reproduce.workspace import Workspace

__all__ = ["SETTINGS", "run"]

MORE: dict[str, tuple[Setting, ...]] = {"paper": (CELEBA,)}
"""Further data sets of a scale."""

SAMPLERS = {"ddim": "DDIM", "ddpm": "DDPM", "dpm2": "2nd-order DPM-Solver"}

ROWS = {"ddm": "DDM", "both": "CDM"}
CONDITIONAL_ROWS = {"ddm-conditional": "DDM, conditional", "conditional": "CDM, conditional"}
SCHEDULE_ROWS = {"uniform": "CDM, uniform sigma", "ot": "CDM, optimal transport"}


@dataclass(frozen=True)
class Published:
    """FID in the paper.

    Attributes:
        data: Of what.
        table: With DDIM, 50 steps; DDPM, 1000; DPM-Solver, 25. Conditional models are guided.
        schedules: Of the CDMs of other schedules.
    """

    data: str
    table: dict[str, tuple[float, float, float]]
    schedules: dict[str, float]


CIFAR10 = Published(
    "CIFAR-10",
    {
        "ddm": (7.19, 4.77, 6.91),
        "both": (7.56, 4.74, 7.29),
        "ddm-conditional": (5.92, 4.70, 5.87),
        "conditional": (5.08, 3.66, 4.87),
    },
    {"uniform": 10.28, "ot": 7.07},
)
PUBLISHED = {"celeba": Published("CelebA 64x64", {"ddm": (8.47, 4.13, 6.16), "both": (4.78, 2.51, 4.45)}, {})}
"""arXiv 2402.10095, Table 2, by data set; others stand beside CIFAR-10."""


def run(work: Workspace) -> Result:
    """Trains, samples and compares what is missing."""
    tables, figures, notes = [], [], []
    for setting in (SETTINGS[work.scale], *MORE.get(work.scale, ())):
        part = _DataSet(work, setting)
        tables += part.tables()
        figures += part.figures
        notes += part.reference.notes(part.setting.samples)
    notes += [
        "The guidance weight of a conditional model is that of the grid with the least Fréchet distance under DDIM, "
        "for all three samplers.",
        "On the straight path of optimal transport DDIM is Euler's method, the published sampler.",
    ]
    return Result(tuple(tables), tuple(figures), SETTINGS[work.scale].scaled_down, tuple(dict.fromkeys(notes)))


class _DataSet:
    """The models of one data set and their distances; figures and further measures gather as rows are made."""

    def __init__(self, work: Workspace, setting: Setting) -> None:
        self.work, self.models = work, Models(work, setting)
        self.setting, self.source = self.models.setting, self.models.source
        self.reference = Reference(self.source, work.device, work.features)
        self.published = PUBLISHED.get(self.source.name, CIFAR10)
        self.figures: list[Figure] = []
        self.quality: list[tuple[Cell, ...]] = []

    def tables(self) -> list[Table]:
        """The main one, the choice of guidance weights, and the other schedules, where there are such."""
        data, weights = self.source.name, self.setting.weights
        chosen: dict[str, float] = dict.fromkeys(ROWS, 0.0)
        grid = []
        for variant, title in CONDITIONAL_ROWS.items() if self.source.classes else ():
            distances = self.work.finished(f"{title}: guidance weights", partial(self._distances, variant))
            if distances is not None:
                chosen[variant] = min(weights, key=lambda weight: distances[weight][0])
                grid.append((title, *(printed for _, printed in distances.values())))
        rows = self._rows(chosen)
        names = [f"{name}, {self.setting.steps[sampler]} steps" for sampler, name in SAMPLERS.items()]
        title = (
            f"{data}, {self.reference.header(self.setting.samples)}; published: {self.published.data}, Inception, "
            "50 000 samples"
        )
        columns = ("model", "guidance weight", *(cell for name in names for cell in (name, "published")))
        tables = [Table(title, columns, tuple(rows))]
        if grid:
            columns = ("model", *(f"weight {weight:g}" for weight in weights))
            tables.append(Table(f"{data}, the same under DDIM by guidance weight", columns, tuple(grid)))
        if self.published.schedules:
            columns = ("model", "sampler", "Fréchet distance", "published")
            other = [self.work.finished(title, partial(self._schedule_row, variant, title))
                     for variant, title in SCHEDULE_ROWS.items()]  # fmt: skip
            title = f"{data}, the same for other schedules, by their published samplers"
            if finished := tuple(row for row in other if row is not None):
                tables.append(Table(title, columns, finished))
        columns = ("samples", "KID", "precision", "recall")
        title = f"{data}, the same features, at most {COMPARED} images on either side"
        return [*tables, Table(title, columns, tuple(self.quality))]

    def _distances(self, variant: str) -> dict[float, tuple[float, Cell]]:
        """Of the samples of each guidance weight under DDIM: as it is, and as it is printed."""
        sets = {weight: self.models.samples(variant, guidance=weight) for weight in self.setting.weights}
        return {weight: (self.reference.distance(x), self.reference.printable(x)) for weight, x in sets.items()}

    def _rows(self, chosen: Mapping[str, float]) -> list[tuple[Cell, ...]]:
        """Measured and published distance of each model under each sampler, guided by the weights ``chosen``.

        Sampler by sampler, the cheapest first: what is finished when a run is stopped compares the models.
        """
        titles = ROWS | CONDITIONAL_ROWS
        measured: dict[tuple[str, str], Cell] = {}
        for sampler in sorted(SAMPLERS, key=lambda sampler: self.setting.steps[sampler]):
            for variant, weight in chosen.items():
                what = f"{titles[variant]}, {SAMPLERS[sampler]}"
                x = self.work.finished(what, partial(self.models.samples, variant, sampler, guidance=weight))
                if x is None:
                    continue
                measured[variant, sampler] = self.reference.printable(x)
                if sampler == "ddim":
                    guided = f", guidance weight {weight:g}" if weight else ""
                    steps = self.setting.steps[sampler]
                    self._show(variant, x, f"{titles[variant]}{guided} (DDIM, {steps} steps)")
        rows: list[tuple[Cell, ...]] = []
        for variant, weight in chosen.items():
            published = zip(SAMPLERS, self.published.table[variant], strict=True)
            cells = [cell for sampler, known in published for cell in (measured.get((variant, sampler)), known)]
            if any((variant, sampler) in measured for sampler in SAMPLERS):
                rows.append((titles[variant], weight or None, *cells))
        return rows

    def _schedule_row(self, variant: str, title: str) -> tuple[Cell, ...]:
        name, steps = {
            "uniform": ("DDIM", self.setting.steps["ddim"]),
            "ot": ("Euler", min(self.setting.steps["ddpm"], self.models.config(variant).model.schedule.T)),
        }[variant]
        x = self.models.samples(variant, "ddim", steps)
        self._show(variant, x, f"{title} ({name}, {steps} steps)")
        return title, f"{name}, {steps} steps", self.reference.printable(x), self.published.schedules[variant]

    def _show(self, variant: str, x: Tensor, what: str) -> None:
        self.quality.append((what, *self.reference.quality(x)))
        self.figures.append(self.models.figure(f"table2-{self.models.name(variant)}", x, what))
