"""Figure 3: log p(t|x) over all levels, by cross-entropy only and by both losses."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.reproduce.models import SETTINGS, Models
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.workspace import Workspace
from torchcdm.apps import plots
from torchcdm.models.density import DensityModel
from torchcdm.training.evaluation import noisy_batches

__all__ = ["SETTINGS", "run"]

VARIANTS = {"ce": "CE only", "both": "both losses"}


def run(work: Workspace) -> Result:
    """Curves of both models for the same noisy test images."""
    models = Models(work)
    setting = models.setting
    x, _ = models.source.split("test").tensors(min(setting.test, 256))
    curves: dict[str, dict[int, Tensor]] = {}
    for variant in VARIANTS:
        found = log_posteriors(models.classifier(variant), x)
        curves[variant] = {t: log_p.mean(0) for t, log_p in found.items()}
    rows = []
    for t in curves["both"]:
        cells: list[float | None] = []
        for curve in (of_variant[t] for of_variant in curves.values()):
            away = len(curve) // 4
            cells += [float(curve[level]) if 0 <= level < len(curve) else None for level in (t, t - away, t + away)]
        rows.append((t, *cells))
    names = ("at t", "a quarter below", "a quarter above")
    columns = ("true level t", *(f"{name}, {title}" for title in VARIANTS.values() for name in names))
    table = Table(f"{setting.data}, mean of log p(t|x) in nats over {len(x)} test images", columns, tuple(rows))

    path = work.figure("fig3")
    with plots.panels(path, len(VARIANTS)) as axes:
        for ax, (variant, title) in zip(axes, VARIANTS.items(), strict=True):
            for t, curve in curves[variant].items():
                (line,) = ax.plot(curve.numpy(), label=f"t = {t}")
                ax.axvline(t, color=line.get_color(), linestyle="--", linewidth=0.8)
            ax.set_title(title)
            ax.set_xlabel("level t")
            ax.set_ylabel("log p(t | x)")
            ax.legend(fontsize=7)

    figure = Figure(path, "log p(t|x), mean over images noised to the level of the dashed line.")
    notes = (
        "The cross-entropy sees only the neighbourhood of the true level; far from it the curve is right only where "
        "the squared error of the gradient shapes it.",
    )
    return Result((table,), (figure,), setting.scaled_down, notes)


@torch.no_grad()
def log_posteriors(model: DensityModel, x: Tensor, seed: int = 0) -> dict[int, Tensor]:
    """What the level classifier of a model in eval mode says of ``x`` (N, *shape), data units, at six true levels.

    By level, log p(t | x_t) at every t, (N, T+2).
    """
    true = sorted({round(share * (model.schedule.T + 1)) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)})
    batches = {t: noisy_batches(model, x, t, seed) for t in true}
    return {
        t: torch.cat([model.log_prob_levels(batch.x_t).log_softmax(1).cpu() for batch in each])
        for t, each in batches.items()
    }
