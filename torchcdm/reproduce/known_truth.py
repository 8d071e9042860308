"""Gaussian mixtures in 2, 16 and 128 dimensions: a trained model against the exact density at every noise level.

Mode weights of the model's density q are the integrals of the exact responsibilities under it,
``E_p[(q/p) r_k] / E_p[q/p]`` over test samples of the exact density p. The same samples give the mass ``E_p[q/p]``
that q has where the data are. Both need q/p to vary little; the effective sample size says whether it does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.codec import encode, merge
from torchcdm.config import make_config, preset_fields
from torchcdm.plots import save_panels
from torchcdm.reproduce.result import Figure, Result, Table
from torchcdm.reproduce.truth import exact_source, level_errors, spread_levels
from torchcdm.reproduce.workspace import Workspace
from torchcdm.toy import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIXTURES = ((2, 2), (2, 8), (2, 40), (16, 2), (16, 8), (16, 40), (128, 2), (128, 8), (128, 40))
"""Dimensions and modes."""

SPREAD = {2: 2.0, 16: 1.0, 128: 0.5}
"""Deviation of the modes' centres in each coordinate: from overlapping modes in the plane to centres that lie more
than twenty deviations of a mode apart in 128 dimensions."""

TARGET_ERROR, TARGET_WEIGHT = 0.01, 0.02
"""Largest mean |error|, nats per dimension, and largest error of a mode's weight."""


@dataclass(frozen=True)
class Setting:
    """One scale.

    Attributes:
        mixtures: Dimensions and modes.
        train: Training samples.
        test: Test samples.
        levels: Levels at which the error is measured.
        layer: Fields of the configuration, on top of the preset for vectors.
        by_dimension: More of them.
        scaled_down: How it is smaller than the largest scale.
    """

    mixtures: tuple[tuple[int, int], ...]
    train: int
    test: int
    levels: int
    layer: dict[str, Any]
    by_dimension: dict[int, dict[str, Any]]
    scaled_down: tuple[str, ...] = ()


def _layer(steps: int, batch: int, lr: float, width: int, depth: int, maps: int, T: int) -> dict[str, Any]:
    often = max(1, steps // 3)
    return {
        "train": {"steps": steps, "batch_size": batch, "lr": lr, "ema_decay": 0.998, "warmup": max(1, steps // 15),
                  "validate_every": often, "save_every": often, "validation_samples": 500, "patience": None},
        "loss": {"ce_weight": 10.0},
        "model": {"backbone": {"name": "mlp", "width": width, "depth": depth, "energy_maps": maps, "dropout": 0.0},
                  "schedule": {"name": "log-snr", "T": T, "r_min": 0.05, "r_max": 10.0}},
        "sampling": {"n": 1, "steps": 1},
    }  # fmt: skip


SETTINGS = {
    "smoke": Setting(
        ((2, 2), (16, 8)), 4000, 1000, 8, _layer(150, 128, 4e-3, 32, 1, 8, 30), {},
        ("two of nine mixtures, 150 steps, a network of width 32",),
    ),
    "small": Setting(
        MIXTURES, 50_000, 5000, 16, _layer(1500, 512, 4e-3, 64, 2, 32, 40),
        {128: _layer(1500, 256, 2e-3, 128, 2, 16, 80)},
        ("1500 steps a mixture on one core, where a GPU would take 20 000",),
    ),
    "paper": Setting(MIXTURES, 200_000, 20_000, 24, _layer(20_000, 1024, 2e-3, 256, 3, 64, 100), {}),
}  # fmt: skip


def mixture(dim: int, modes: int, seed: int = 0) -> GaussianMixture:
    """Modes at random places, of deviations 0.2 to 0.5 along random axes, the heaviest eight times the lightest."""
    generator = torch.Generator().manual_seed(1000 * dim + modes + seed)
    share = torch.linspace(0, 1, modes, dtype=torch.float64)
    weights = (-share * math.log(8)).exp()
    means = SPREAD[dim] * torch.randn(modes, dim, generator=generator, dtype=torch.float64)
    deviations = 0.2 + 0.3 * torch.rand(modes, dim, generator=generator, dtype=torch.float64)
    axes, _ = torch.linalg.qr(torch.randn(modes, dim, dim, generator=generator, dtype=torch.float64))
    return GaussianMixture(weights, means, axes @ torch.diag_embed(deviations**2) @ axes.mT)


def run(work: Workspace) -> Result:
    """Trains a model for each mixture and compares it with the truth at every level."""
    setting = SETTINGS[work.scale]
    found = [(dim, modes, _measure(work, setting, dim, modes)) for dim, modes in setting.mixtures]
    columns = (
        "dimensions", "modes", "true log p", "error", "mean \\|error\\|", "mean \\|error\\| / d",
        "largest over levels, / d", "largest error of a weight", "mass", "effective share", "steps", "seconds",
    )  # fmt: skip
    rows = tuple((dim, modes, *(values[key] for key in _KEYS)) for dim, modes, values in found)
    table = Table(
        f"log p at level 0 in nats, {setting.test} test samples; targets: mean |error| / d at most {TARGET_ERROR}, "
        f"weights within {TARGET_WEIGHT}",
        columns,
        rows,
    )
    figure = Figure(_paint(found, work), "Mean and mean absolute error of log p by noise level, nats per dimension.")
    notes = (
        "Mass is the integral of the model's density where the data are, E_p[q/p]; the effective share is the "
        "effective sample size of the weights q/p over the number of test samples.",
    )
    return Result((table,), (figure,), setting.scaled_down, notes)


_KEYS = (
    "exact", "error", "absolute", "absolute_per_dim", "largest_per_dim", "weight_error", "mass", "share", "steps",
    "seconds",
)  # fmt: skip


def _measure(work: Workspace, setting: Setting, dim: int, modes: int) -> dict[str, Any]:
    layer = merge(setting.layer, setting.by_dimension.get(dim, {}))
    config = work.shortened(make_config(preset_fields("mlp"), layer))
    name = f"known-truth-{dim}d-{modes}modes"

    def make() -> dict[str, Any]:
        exact = mixture(dim, modes)
        source = exact_source(exact, f"{modes} modes in {dim} dimensions", setting.train, 1000, setting.test)
        model, trained = work.model(name, config, source)
        assert isinstance(model, ClassificationDiffusion)
        x = source.test.tensors()[0]
        found = level_errors(model, exact, x, spread_levels(model.schedule.T, setting.levels))
        clean = found.error[0]
        return {
            "exact": float(found.exact[0].mean()), "error": float(clean.mean()), "absolute": float(clean.abs().mean()),
            "absolute_per_dim": float(clean.abs().mean()) / dim,
            "largest_per_dim": float(found.error.abs().mean(1).max()) / dim,
            **weights_under(model, exact, x, clean),
            "levels": [level / (model.schedule.T + 1) for level in found.levels],
            "error_by_level": (found.error.mean(1) / dim).tolist(),
            "absolute_by_level": (found.error.abs().mean(1) / dim).tolist(),
            "steps": trained["steps"], "seconds": round(trained["seconds"], 1),
        }  # fmt: skip

    facts = {"settings": encode(config), "train": setting.train, "test": setting.test, "levels": setting.levels}
    return work.numbers(name, facts, make)


def weights_under(
    model: ClassificationDiffusion, exact: GaussianMixture, x: Tensor, error: Tensor
) -> dict[str, float]:
    """Mode weights and mass of the model's density at level 0.

    Args:
        model: The model.
        exact: The exact density p.
        x: Samples of p, (N, d).
        error: log q - log p there, (N,).

    Returns:
        ``weight_error``: largest |difference| to the empirical weights of the same samples, which removes the samples'
        own fluctuation; ``mass``; ``share``: effective sample size over N.
    """
    schedule = copy.deepcopy(model.schedule).cpu()
    responsibilities = (exact.component_log_prob(x, 0, schedule) + exact.log_weights).softmax(1)
    ratio = error.exp()
    weights = (ratio[:, None] * responsibilities).sum(0) / ratio.sum()
    return {
        "weight_error": float((weights - responsibilities.mean(0)).abs().max()),
        "mass": float(ratio.mean()),
        "share": float(ratio.sum().square() / ratio.square().sum() / len(ratio)),
    }


def _paint(found: Sequence[tuple[int, int, dict[str, Any]]], work: Workspace) -> Any:
    dims = sorted({dim for dim, _, _ in found})

    def paint(axes: Sequence[Axes]) -> None:
        for ax, dim in zip(axes, dims, strict=True):
            for _, modes, values in (item for item in found if item[0] == dim):
                (line,) = ax.plot(values["levels"], values["error_by_level"], label=f"{modes} modes, mean")
                ax.plot(values["levels"], values["absolute_by_level"], color=line.get_color(), linestyle=":")
            ax.axhspan(-TARGET_ERROR, TARGET_ERROR, color="0.9")
            ax.set_title(f"{dim} dimensions (dotted: mean |error|)")
            ax.set_xlabel("level, from data to noise")
            ax.set_ylabel("error of log p, nats per dimension")
            ax.legend(fontsize=7)

    return save_panels(work.figure("known-truth"), len(dims), paint)
