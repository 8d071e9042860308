"""What a comparison measured: plain values, as they are kept, and their table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from torchcdm.runtime.files import without_nan

NOT_NORMALISED = "~"
"""Marks a density that need not integrate to one."""


@dataclass(frozen=True)
class Protocol:
    """What all systems of a comparison share; results of two protocols do not stand in one table.

    Attributes:
        data: SPEC.
        train: Training samples.
        validation: Validation samples.
        test: Test samples that are scored.
        dim: Dimensions of a sample.
        unit: ``bits/dim`` or ``nats``.
        budget: Seconds of training.
        clock: What a second is.
        seed: Of training.
        gaussianized: Whether all systems see grey levels that the histogram of each pixel makes standard normal.
        log_z: Sweeps of the estimates of log Z of classification diffusion models; None for no estimate.
        frechet: Samples of each system for its Fréchet distance; None: no such column.
        fingerprint: Of the data, see :func:`torchcdm.data.fingerprint`.
    """

    data: str
    train: int
    validation: int
    test: int
    dim: int
    unit: str
    budget: float
    clock: str
    seed: int
    gaussianized: bool = False
    log_z: int | None = None
    frechet: int | None = None
    fingerprint: str = field(kw_only=True)


NAME_WIDTH = 54
"""Of the first column of the table."""


@dataclass(frozen=True)
class Row:
    """One likelihood of one system.

    Attributes:
        name: ``density``, ``importance``, ``one-pass`` ...
        value: Mean NLL in the protocol's unit.
        se: Its standard error.
        nfe: Network evaluations for each sample.
        level: Noise level that the data are scored through; 0 for none.
        normalised: Whether the density integrates to one, by construction or by an estimate of log Z.
        per_second: Samples scored in a second of the clock.
        values: NLL of each test sample.
        shared_se: The part of ``se`` that all samples share, that of log Z.
    """

    name: str
    value: float
    se: float
    nfe: int
    level: int
    normalised: bool
    per_second: float
    values: tuple[float, ...] = ()
    shared_se: float = 0.0


@dataclass(frozen=True)
class Sampling:
    """What samples cost.

    Attributes:
        nfe: Network evaluations for each sample; None without a network.
        per_second: Samples in a second of the clock.
        frechet: Their Fréchet distance to the training images; None where it was not asked for.
        features: What that is a distance of.
    """

    nfe: int | None
    per_second: float
    frechet: float | None = None
    features: str = ""


@dataclass(frozen=True)
class Result:
    """One system.

    Attributes:
        name: On the command line.
        title: In the table.
        library: Where it comes from.
        version: Of that.
        status: ``measured``, or ``diverged`` in both attempts.
        attempts: 1, or 2 where the first diverged; the second has a lower learning rate and a budget of its own.
        setting: What was trained and how.
        steps: Optimiser steps, or candidates.
        best_step: The step whose weights were kept.
        seconds: Of training.
        parameters: Numbers that were learned.
        rows: Its likelihoods.
        sampling: None where it diverged.
        note: Why it diverged, and what else to know.
    """

    name: str
    title: str
    library: str
    version: str
    status: str
    attempts: int
    setting: str
    steps: int
    best_step: int
    seconds: float
    parameters: int
    rows: tuple[Row, ...]
    sampling: Sampling | None
    note: str = ""

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Result:
        """The result of these plain values, as :func:`dataclasses.asdict` gives them."""
        rows = tuple(Row(**row | {"values": tuple(row["values"])}) for row in values["rows"])
        sampling = None if values["sampling"] is None else Sampling(**values["sampling"])
        return cls(**values | {"rows": rows, "sampling": sampling})


@dataclass(frozen=True)
class Published:
    """A number that nobody can measure here."""

    title: str
    value: float
    nfe: int
    note: str


PUBLISHED = (Published("MintNet", 3.32, 120, "published for CIFAR-10; no maintained implementation, not measured"),)


@dataclass(frozen=True)
class Comparison:
    """All systems under one protocol.

    Attributes:
        protocol: What they share.
        results: In the order they were asked for.
        machine: Device and threads.
    """

    protocol: Protocol
    results: tuple[Result, ...]
    machine: str

    @property
    def published(self) -> tuple[Published, ...]:
        """Rows that are not measured, where their unit is that of the comparison."""
        return PUBLISHED if self.protocol.unit == "bits/dim" else ()

    def ranked(self, normalised: bool) -> list[tuple[Result, Row]]:
        """The rows that are normalised, or those that are not, the best first."""
        rows = [(result, row) for result in self.results for row in result.rows if row.normalised == normalised]
        return sorted(rows, key=lambda pair: pair[1].value)

    def to_json(self) -> dict[str, Any]:
        """Plain values; each row with its paired difference to the best normalised one."""
        best = next(iter(self.ranked(True)), None)
        systems = []
        for result in self.results:
            system = asdict(replace(result, rows=()))
            system["rows"] = [
                {**asdict(replace(row, values=())), "over_best": None if best is None else paired(row, best[1])}
                for row in result.rows
            ]
            for row in system["rows"]:
                row.pop("values")
                row["se"] = without_nan(row["se"])
            systems.append(system)
        return {
            "protocol": asdict(self.protocol),
            "machine": self.machine,
            "systems": systems,
            "published": [asdict(entry) for entry in self.published],
        }

    def table(self) -> str:
        """For the terminal."""
        p = self.protocol
        clock = {"wall": "wall-clock", "processor": "processor time"}[p.clock]
        lines = [
            f"{p.data}{', Gaussianised' if p.gaussianized else ''}: NLL of {p.test} test samples of {p.dim} "
            f"dimensions in {p.unit}, lower is better",
            f"{p.train} training and {p.validation} validation samples, {p.budget:g} s of {clock} to train, seed "
            f"{p.seed}; {self.machine}",
            "",
            f"{'system':{NAME_WIDTH}}{'NLL':>9}{'s.e.':>8}{'over best':>18}{'NFE':>7}{'scored/s':>10}{'drawn/s':>9}"
            f"{'parameters':>12}",
        ]  # fmt: skip
        ranked = self.ranked(True)
        best = ranked[0][1] if ranked else None
        lines += [self._line(result, row, best) for result, row in ranked]
        loose = self.ranked(False)
        if loose:
            lines += ["", "not normalised: these densities need not integrate to one and are not ranked"]
            lines += [self._line(result, row, best) for result, row in loose]
        features = sorted({r.sampling.features for r in self.results if r.sampling and r.sampling.features})
        if features:
            lines += ["", *features]
            drawn = ((r.sampling.frechet, r.title) for r in self.results if r.sampling and r.sampling.features)
            lines += [f"{title:{NAME_WIDTH}}{distance:9.2f}" for distance, title in sorted(drawn)]
        lines += ["", *(self._failure(result) for result in self.results if not result.rows)]
        lines += [f"{row.title:{NAME_WIDTH}}{row.value:9.2f}  {row.note}" for row in self.published]
        lines += ["", "settings"]
        lines += [f"  {r.title} ({r.library} {r.version}): {r.setting}; best at step {r.best_step} of {r.steps}, "
                  f"{r.seconds:.0f} s"
                  + (f"; {r.note}" if r.note else "") for r in self.results]  # fmt: skip
        return "\n".join(lines)

    def _line(self, result: Result, row: Row, best: Row | None) -> str:
        name = result.title if row.name == "density" else f"{result.title}, {row.name}"
        if row.level:
            name += f" (level {row.level})"
        over = "" if best is None or row is best else paired(row, best)
        gap = f"{over['mean']:+.3f} +- {over['se']:.3f}" if over else ""
        drawn = "-" if result.sampling is None else _rate(result.sampling.per_second)
        mark = "" if row.normalised else NOT_NORMALISED
        return (
            f"{name:{NAME_WIDTH}}{mark + format(row.value, '.3f'):>9}{row.se:8.3f}{gap:>18}{row.nfe:>7}"
            f"{_rate(row.per_second):>10}{drawn:>9}{result.parameters:>12,}"
        )

    def _failure(self, result: Result) -> str:
        return f"{result.title:{NAME_WIDTH}}{'diverged':>9}  {result.note}"


def _rate(per_second: float) -> str:
    """Samples a second in three digits, never as a power of ten."""
    return f"{float(f'{per_second:.2e}'):,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def paired(row: Row, best: Row) -> dict[str, float | None]:
    """Mean difference over the same test samples, and its standard error."""
    difference = torch.tensor(row.values, dtype=torch.float64) - torch.tensor(best.values, dtype=torch.float64)
    own = float(difference.std() / math.sqrt(len(difference)))
    return {"mean": float(difference.mean()), "se": without_nan(math.hypot(own, row.shared_se, best.shared_se))}


