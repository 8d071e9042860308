"""Names of the reproductions, and the one function that runs them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path

from studies.reproduce.result import write_result
from studies.reproduce.workspace import SCALES, Unfinished, Workspace
from torchcdm.errors import UserError, nearest


@dataclass(frozen=True)
class Reproduction:
    """One table or figure.

    Attributes:
        title: What it shows.
        module: Has ``run(workspace) -> Result``; imported when it is asked for.
    """

    title: str
    module: str


REPRODUCTIONS = {
    "table1": Reproduction("Table 1: what the two losses do", "studies.reproduce.table1"),
    "table2": Reproduction("Table 2: DDM against CDM under three samplers", "studies.reproduce.table2"),
    "table3": Reproduction("Table 3: likelihoods of all systems", "studies.reproduce.table3"),
    "fig3": Reproduction("Figure 3: log p(t|x), cross-entropy only against both losses", "studies.reproduce.fig3"),
    "fig4": Reproduction("Figure 4: denoising error by level, DDM against CDM", "studies.reproduce.fig4"),
    "fig5": Reproduction("Figure 5: images denoised at high noise, and the mean image", "studies.reproduce.fig5"),
    "fig6": Reproduction("Figure 6: guided samples of each class", "studies.reproduce.fig6"),
    "fig7": Reproduction(
        "Figure 7: predicted against analytic log-likelihood, uniform pixels and Gaussian images",
        "studies.reproduce.fig7",
    ),
    "fig8": Reproduction("Figure 8: denoising, cross-entropy only against both losses", "studies.reproduce.fig8"),
    "fig9": Reproduction("Figure 9: confusion matrices of the level classifier", "studies.reproduce.fig9"),
    "known-truth": Reproduction(
        "Known truth: Gaussian mixtures in 2, 16 and 128 dimensions at every noise level",
        "studies.reproduce.known_truth",
    ),
}
"""By the name on the command line; ``fig`` and ``table`` are numbered as in arXiv 2402.10095."""


def reproduce(
    name: str,
    scale: str,
    out: str | Path,
    device: str | None = None,
    progress: bool = False,
    steps: int | None = None,
    samples: int | None = None,
    finished_only: bool = False,
    seed: int = 0,
) -> Path:
    """Runs one reproduction, or what is left of it.

    Args:
        name: Of :data:`REPRODUCTIONS`.
        scale: Of :data:`studies.reproduce.SCALES`.
        out: Folder for models, numbers, figures and the report.
        device: As in :func:`torchcdm.training.loop.train`.
        progress: Shows progress bars and messages.
        steps: Of every training, instead of the scale's; the report says so.
        samples: Of every sample set, instead of the scale's; the report says so.
        finished_only: Reports what is finished so far, and makes nothing; the report says what is left out.
        seed: Of trainings and samples; each wants a folder of its own.

    Returns:
        The Markdown report; a JSON of the same name lies beside it.

    Raises:
        UserError: Unknown name or scale, a folder that was made with other settings, or ``finished_only`` and a
            part is missing without which there is no report.
    """
    if name not in REPRODUCTIONS:
        raise UserError(f"unknown reproduction '{name}'; {nearest(name, REPRODUCTIONS)}")
    if scale not in SCALES:
        raise UserError(f"unknown scale '{scale}'; {nearest(scale, SCALES)}")
    changed = {"--steps": (steps, "training steps"), "--samples": (samples, "samples")}
    changed = {option: pair for option, pair in changed.items() if pair[0] is not None}
    for option, (number, _) in changed.items():
        if number < 1:
            raise UserError(f"{option} is {number}; it must be positive")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must not be negative")
    entry = REPRODUCTIONS[name]
    workspace = Workspace(Path(out), scale, device, progress, steps, samples, finished_only, seed)
    result = importlib.import_module(entry.module).run(workspace)
    lines = (f"{number} {what} for every model, whatever stands above" for number, what in changed.values())
    result = replace(result, scaled_down=(*result.scaled_down, *lines))
    options = "".join(f" {option} {number}" for option, (number, _) in changed.items())
    if seed:
        options += f" --seed {seed}"
    if workspace.left_out:
        if not any(table.rows for table in result.tables):
            raise Unfinished(f"{out}: nothing of {name} is finished at scale {scale}; leave out --finished to make it")
        result = replace(result, notes=(*result.notes, f"Left out, not finished: {'; '.join(workspace.left_out)}."))
        options += " --finished"
    return write_result(result, workspace.root, name, entry.title, scale, options)
