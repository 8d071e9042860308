"""Figure 8: denoising with a classifier trained by cross-entropy only, and by both losses."""

from __future__ import annotations

import torch

from studies.reproduce.denoised import denoised, root_mean_square
from studies.reproduce.models import SETTINGS, Models
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.workspace import Workspace
from torchcdm.data import save_grid

__all__ = ["SETTINGS", "run"]

VARIANTS = {"ce": "CE only", "both": "both losses"}
SHARES = (0.1, 0.25, 0.4, 0.6, 0.8)
SHOWN = 8
MEASURED = 200


def run(work: Workspace) -> Result:
    """Both models on the same noisy test images."""
    models = Models(work)
    source, setting = models.source, models.setting
    x, _ = source.split("test").tensors(min(setting.test, MEASURED))
    errors, figures = {}, []
    for variant, title in VARIANTS.items():
        model, _ = models.denoiser(variant)
        levels = [round(share * model.schedule.T) for share in SHARES]
        noisy, clean = denoised(model, x, levels)
        errors[variant] = [root_mean_square(images - x.float()) for images in clean]
        blank = [root_mean_square(images - x.float()) for images in noisy]
        shown = torch.stack([noisy[:, :SHOWN], clean[:, :SHOWN]], 1).flatten(0, 2)
        path = save_grid(shown, work.figure(f"fig8-{variant}"), source.transform, SHOWN)
        pairs = ", ".join(map(str, levels))
        figures.append(Figure(path, f"{title}: noisy and denoised rows at the levels {pairs}."))
    rows = tuple((t, blank[i], *(errors[variant][i] for variant in VARIANTS)) for i, t in enumerate(levels))
    title = f"{setting.data}, root mean square error of denoised images, grey levels, {len(x)} test images"
    table = Table(title, ("level t", "not denoised", *VARIANTS.values()), rows)
    return Result((table,), tuple(figures), setting.scaled_down)
