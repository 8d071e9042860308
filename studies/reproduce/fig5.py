"""Figure 5: images denoised at high noise, by the plain diffusion model and by the CDM, and the mean image.

The more noise, the less is left of the image: E[x_0 | x_t] goes to the mean of the data, and a denoiser can be held
against it.
"""

from __future__ import annotations

import torch

from studies.reproduce.denoised import denoised, root_mean_square
from studies.reproduce.models import SETTINGS, Models
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.workspace import Workspace
from torchcdm.data import save_grid

__all__ = ["SETTINGS", "run"]

VARIANTS = {"ddm": "DDM", "both": "CDM"}
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""Of T: the paper's levels 600 ... 1000."""

SHOWN = 8
MEASURED = 200


def run(work: Workspace) -> Result:
    """Both models on the same noisy test images."""
    models = Models(work)
    source, setting = models.source, models.setting
    x, _ = source.split("test").tensors(min(setting.test, MEASURED))
    mean = source.train.tensors()[0].double().mean(0).float()
    distances, figures = {}, []
    for variant, title in VARIANTS.items():
        model, _ = models.denoiser(variant)
        levels = [round(share * model.schedule.T) for share in SHARES]
        noisy, clean = denoised(model, x, levels)
        distances[variant] = [root_mean_square(images - mean) for images in clean]
        shown = torch.cat([clean[:, :SHOWN], mean.expand(len(levels), 1, *mean.shape)], 1).flatten(0, 1)
        path = save_grid(shown, work.figure(f"fig5-{variant}"), source.transform, SHOWN + 1)
        names = ", ".join(map(str, levels))
        figures.append(Figure(path, f"{title}: denoised at the levels {names}, top to bottom; last column: the mean."))
    ratio = model.schedule.ratio[levels].tolist()
    rows = tuple((t, ratio[i], *(distances[variant][i] for variant in VARIANTS)) for i, t in enumerate(levels))
    title = f"{setting.data}, root mean square distance of denoised images to the mean training image, grey levels"
    table = Table(title, ("level t", "noise / signal", *VARIANTS.values()), rows)
    notes = (
        f"At the last level the noise is {ratio[-1]:.3g} times the signal: next to nothing is left of the image, and "
        "the right answer is the mean but for little.",
    )
    return Result((table,), tuple(figures), setting.scaled_down, notes)
