"""Gaussian mixtures in 2, 16 and 128 dimensions: a trained model against the exact density at every noise level.

Each mixture is learned twice: by a network that corrects one fitted Gaussian, and by one that corrects a fitted
mixture, the number of its Gaussians and the share of the network that is kept chosen by validation samples. The second
has the family of the truth, which data of one's own may not have.

Mode weights of the model's density q at a level are the integrals of the level's exact responsibilities under it,
``E_p[(q/p) r_k] / E_p[q/p]`` over test samples of the exact density p there. The same samples give the mass
``E_p[q/p]`` that q has where the data are. Both need q/p to vary little; the effective sample size says whether it
does.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studies.exact import GaussianMixture
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.shares import best_share
from studies.reproduce.truth import CHUNK, LevelErrors, exact_source, level_errors, noisy_copies, spread_levels
from studies.reproduce.workspace import Workspace
from torchcdm.apps.plots import panels
from torchcdm.data import DataSource
from torchcdm.diffusion.mixture import MixtureMarginals, best_mixture, fit_gaussians
from torchcdm.diffusion.schedules import NoiseSchedule, UniformSigmaSchedule
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.runtime.validation import encode
from torchcdm.training.build import build_loss
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.settings import Config

MIXTURES = ((2, 2), (2, 8), (2, 40), (16, 2), (16, 8), (16, 40), (128, 2), (128, 8), (128, 40))
"""Dimensions and modes."""

SPREAD = {2: 2.0, 16: 1.0, 128: 0.5}
"""Deviation of the modes' centres in each coordinate: from overlapping modes in the plane to centres that lie more
than twenty deviations of a mode apart in 128 dimensions."""

STARTS = ("Gaussian", "mixture")
"""What the network corrects."""

COUNTS = (1, 3, 10, 45)
"""Numbers of Gaussians that are tried for the mixture; not those of the truth."""

SELECTION_ROWS = 50_000
"""Training samples that these are fitted to, at most; the shrinkage of the one that is chosen is then of all."""

SELECTION_TOLERANCE = 1e-4
"""Of EM then. With 1e-3, 10 Gaussians of eight modes in the plane were further from their best than 45."""

VALIDATION = 4000

TARGET_ERROR, TARGET_WEIGHT = 0.01, 0.02
"""Largest mean |error|, nats per dimension, and largest error of a mode's weight."""


@dataclass(frozen=True)
class Setting:
    """One scale.

    Attributes:
        mixtures: Dimensions and modes.
        train: Training samples, by dimensions.
        test: Test samples.
        levels: Levels at which the error is measured.
        layer: Fields of the configuration, on top of the preset for vectors.
        by_dimension: More of them.
        mixture_steps: Steps of the networks that correct a mixture.
        scaled_down: How it is smaller than the largest scale.
    """

    mixtures: tuple[tuple[int, int], ...]
    train: dict[int, int]
    test: int
    levels: int
    layer: dict[str, Any]
    by_dimension: dict[int, dict[str, Any]]
    mixture_steps: int
    scaled_down: tuple[str, ...] = ()


def _layer(steps: int, batch: int, width: int, depth: int, maps: int, T: int) -> dict[str, Any]:
    # One validation, at the end: fresh samples are not overfit, and some hundred of them would choose a step by luck.
    return {
        "train": {"steps": steps, "batch_size": batch, "optimizer": "muon", "lr": 1e-2, "ema_decay": 0.998,
                  "validation_samples": 500, "select": "loss", "patience": None, **_intervals(steps),
                  "validate_every": steps},
        "loss": {"ce_weight": 2.0},
        "model": {"backbone": {"name": "mlp", "width": width, "depth": depth, "energy_maps": maps, "dropout": 0.0},
                  "schedule": {"name": "log-snr", "T": T, "r_min": 0.05, "r_max": 10.0}},
        "sampling": {"n": 0},
    }  # fmt: skip


def _intervals(steps: int) -> dict[str, int]:
    often = max(1, steps // 3)
    return {"warmup": max(1, steps // 15), "validate_every": often, "save_every": often}


SETTINGS = {
    "smoke": Setting(
        ((2, 2), (16, 8)), {2: 4000, 16: 4000}, 1000, 8, _layer(150, 128, 32, 1, 8, 30), {}, 30,
        ("two of nine mixtures, 150 steps, a network of width 32",),
    ),
    "small": Setting(
        MIXTURES, {2: 500_000, 16: 300_000, 128: 300_000}, 5000, 16, _layer(1500, 512, 128, 2, 32, 40),
        {128: _layer(1500, 256, 128, 2, 16, 80)}, 100,
        ("1500 steps a mixture on one core, where a GPU would take 20 000",),
    ),
    "paper": Setting(
        MIXTURES, {2: 1_000_000, 16: 1_000_000, 128: 500_000}, 20_000, 24, _layer(20_000, 1024, 256, 3, 64, 100),
        {}, 2000,
    ),
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
    """Trains two models for each mixture and compares them with the truth at every level."""
    setting = SETTINGS[work.scale]
    found, tables = [], []
    for start, (dim, modes) in itertools.product(STARTS, setting.mixtures):
        measure = functools.partial(_measure, work, setting, dim, modes, start)
        values = work.finished(f"{dim} dimensions, {modes} modes, from a {start}", measure)
        if values is not None:
            found.append((dim, modes, start, values))
    for start in STARTS:
        rows = tuple(
            (dim, modes, *(values[key] for key in _KEYS)) for dim, modes, kind, values in found if kind == start
        )
        title = (
            f"the network corrects a fitted {start}: log p at level 0 in nats, {setting.test} test samples; targets: "
            f"mean |error| / d at most {TARGET_ERROR}, weights within {TARGET_WEIGHT}"
        )
        tables += [Table(title, _COLUMNS, rows)] if rows else []
    figure = Figure(_paint(found, work), "Mean absolute error of log p by noise level, nats per dimension.")
    notes = (
        "Known modes is the mean |error| / d of the Gaussians and weights that have the most likelihood when the mode "
        "of each training sample is told: what the training samples allow.",
        "Mass is the integral of the model's density where the data are, E_p[q/p]; the effective share is the "
        "effective sample size of the weights q/p over the number of test samples. All three are of level 0.",
        "Over levels the weights are those of each measured level, by its own responsibilities. These go to the true "
        "weights as noise covers the modes, whatever the model: the low levels decide.",
        "Seconds are of the processor on a CPU; the mixture's include its fits.",
    )
    return Result(tuple(tables), (figure,), setting.scaled_down, notes)


_COLUMNS = (
    "dimensions", "modes", "true log p", "error", "mean \\|error\\|", "mean \\|error\\| / d", "known modes",
    "largest over levels, / d", "largest error of a weight", "the same over levels", "mass",
    "effective share", "Gaussians", "network kept", "steps", "seconds",
)  # fmt: skip

_KEYS = (
    "exact", "error", "absolute", "absolute_per_dim", "known_modes", "largest_per_dim", "weight_error",
    "largest_weight_error", "mass", "share", "components", "kept", "steps", "seconds",
)  # fmt: skip


def _measure(work: Workspace, setting: Setting, dim: int, modes: int, start: str) -> dict[str, Any]:
    count, name = setting.train[dim], f"known-truth-{dim}d-{modes}modes"
    exact = mixture(dim, modes)
    layers = [preset_fields("mlp"), setting.layer, setting.by_dimension.get(dim, {})]

    @functools.cache
    def source() -> DataSource:
        return exact_source(exact, f"{modes} modes in {dim} dimensions", count, VALIDATION, setting.test)

    chosen: dict[str, Any] = {"components": 1, "seconds": 0.0}
    if start == "mixture":
        name += "-mixture"
        facts = {"train": count, "counts": COUNTS, "rows": SELECTION_ROWS, "tolerance": SELECTION_TOLERANCE}
        chosen = work.numbers(f"{name}-components", facts, lambda: _choose(source(), COUNTS, SELECTION_ROWS))
        # Few samples need more shrinkage than all of them, to which the mixture is fitted.
        facts = facts | {"counts": [chosen["components"]], "rows": count}
        on_all = work.numbers(
            f"{name}-shrinkage", facts, lambda: _choose(source(), (chosen["components"],), count)
        )
        chosen = on_all | {"seconds": chosen["seconds"] + on_all["seconds"]}
        model = {key: chosen[key] for key in ("components", "shrinkage")}
        steps = setting.mixture_steps
        layers.append({"model": model, "train": {"steps": steps, **_intervals(steps)}})
    config = work.adjusted(make_config(*layers))

    def make() -> dict[str, Any]:
        clock = time.process_time if work.device == "cpu" else time.monotonic
        began = clock()
        loss = None if start == "Gaussian" else functools.partial(_on_all_samples, source(), config)
        model, trained = work.model(name, config, source(), loss, clock)
        seconds = chosen["seconds"] + max(clock() - began, trained["seconds"])
        assert isinstance(model, ClassificationDiffusion)
        kept = best_share(model, source().validation.tensors()[0])
        for parameter in model.backbone.head.parameters():
            parameter.data *= kept
        x = source().test.tensors()[0]
        found = level_errors(model, exact, x, spread_levels(model.schedule.T, setting.levels))
        schedule, clean = model.schedule.cpu(), found.error[0]  # the exact densities are computed on the CPU
        return {
            "exact": float(found.exact[0].mean()), "error": float(clean.mean()), "absolute": float(clean.abs().mean()),
            "absolute_per_dim": float(clean.abs().mean()) / dim,
            "known_modes": known_modes_error(exact, count, x, found.exact[0]) / dim,
            "largest_per_dim": float(found.error.abs().mean(1).max()) / dim,
            **weights_by_level(exact, x, schedule, found),
            "components": chosen["components"], "kept": kept,
            "levels": [level / (schedule.T + 1) for level in found.levels],
            "error_by_level": (found.error.mean(1) / dim).tolist(),
            "absolute_by_level": (found.error.abs().mean(1) / dim).tolist(),
            "steps": trained["steps"], "seconds": round(seconds, 1),
        }  # fmt: skip

    facts = {
        "settings": encode(config), "train": count, "test": setting.test, "levels": setting.levels,
        "measured": list(_KEYS),
    }  # fmt: skip
    return work.numbers(name, facts, make)


def _on_all_samples(source: DataSource, config: Config, model: ClassificationDiffusion) -> nn.Module:
    """The loss of a model whose mixture is first fitted to all training samples: training reads fewer of them."""
    x, options = source.train.tensors()[0], config.model
    if options.components > 1:
        fitted = fit_gaussians(x, options.components, shrinkage=options.shrinkage, rows=len(x))
        model.base = MixtureMarginals(model.schedule, *fitted, model.base.common)
    return build_loss(config.loss, model)


def _choose(source: DataSource, counts: Sequence[int], rows: int) -> dict[str, Any]:
    """The mixture that validation samples choose when it is fitted to so many samples, and processor seconds."""
    began = time.process_time()
    train, validation = (split.tensors()[0] for split in (source.train, source.validation))
    components, shrinkage, _ = best_mixture(
        train, validation, counts, rows=min(rows, len(train)), tolerance=SELECTION_TOLERANCE
    )
    return {"components": components, "shrinkage": shrinkage, "seconds": time.process_time() - began}


def known_modes_error(exact: GaussianMixture, count: int, x: Tensor, truth: Tensor) -> float:
    """Mean |error| of log p of the mixture of most likelihood, when each sample comes with its mode.

    Args:
        exact: The truth.
        count: Training samples; drawn anew.
        x: Test samples (N, d).
        truth: Their exact log p, (N,).
    """
    modes, dim = exact.means.shape
    generator = torch.Generator().manual_seed(1)
    sizes = torch.zeros(modes, dtype=torch.float64)
    sums, squares = exact.means.new_zeros(modes, dim), exact.means.new_zeros(modes, dim, dim)
    for first in range(0, count, CHUNK):
        samples, components = exact.sample_components(min(CHUNK, count - first), generator)
        for k in components.unique():
            # About the true mean: no square of a large number is lost.
            part = samples[components == k] - exact.means[k]
            sizes[k] += len(part)
            sums[k] += part.sum(0)
            squares[k] += part.T @ part
    means = sums / sizes[:, None]
    covariances = squares / sizes[:, None, None] - means[:, :, None] * means[:, None]
    fitted = GaussianMixture(sizes, exact.means + means, covariances)
    schedule = UniformSigmaSchedule(2)  # level 0 of every schedule is the data
    log_p = torch.cat([fitted.log_prob(part, 0, schedule) for part in x.split(CHUNK)])
    return float((log_p - truth).abs().mean())


def weights_under(
    exact: GaussianMixture, x_t: Tensor, t: int, schedule: NoiseSchedule, error: Tensor
) -> dict[str, float]:
    """Mode weights and mass of a model's density q at one level.

    Args:
        exact: The exact density p.
        x_t: Samples of p at the level, (N, d).
        t: The level.
        schedule: Of the level.
        error: log q - log p there, (N,).

    Returns:
        ``weight_error``: largest |difference| to the empirical weights of the same samples, which removes the samples'
        own fluctuation; ``mass``; ``share``: effective sample size over N.
    """
    parts = [exact.component_log_prob(part, t, schedule) for part in x_t.split(CHUNK)]
    responsibilities = (torch.cat(parts) + exact.log_weights).softmax(1)
    ratio = error.exp()
    weights = (ratio[:, None] * responsibilities).sum(0) / ratio.sum()
    return {
        "weight_error": float((weights - responsibilities.mean(0)).abs().max()),
        "mass": float(ratio.mean()),
        "share": float(ratio.sum().square() / ratio.square().sum() / len(ratio)),
    }


def weights_by_level(
    exact: GaussianMixture, x: Tensor, schedule: NoiseSchedule, found: LevelErrors
) -> dict[str, Any]:
    """:func:`weights_under` at each of the levels of :func:`studies.reproduce.truth.level_errors`.

    Args:
        exact: The exact density.
        x: The samples that were scored, (N, d).
        schedule: Of the model.
        found: The model's errors.

    Returns:
        Those of the first level; ``largest_weight_error`` over all; of each ``weight_error_by_level`` and
        ``share_by_level``.
    """
    copies = zip(noisy_copies(x, schedule, found.levels), found.error, strict=True)
    values = [weights_under(exact, x_t, t, schedule, error) for (t, x_t), error in copies]
    errors, shares = ([value[key] for value in values] for key in ("weight_error", "share"))
    over_levels = {"largest_weight_error": max(errors), "weight_error_by_level": errors, "share_by_level": shares}
    return values[0] | over_levels


def _paint(found: Sequence[tuple[int, int, str, dict[str, Any]]], work: Workspace) -> Any:
    dims, counts = (sorted({item[k] for item in found}) for k in range(2))
    styles = dict(zip(STARTS, ("-", ":"), strict=True))

    path = work.figure("known-truth")
    with panels(path, len(dims)) as axes:
        for ax, dim in zip(axes, dims, strict=True):
            for _, modes, start, values in (item for item in found if item[0] == dim):
                color, label = f"C{counts.index(modes)}", f"{modes} modes, {start}"
                ax.plot(values["levels"], values["absolute_by_level"], styles[start], color=color, label=label)
            ax.axhspan(0, TARGET_ERROR, color="0.9")
            ax.set_title(f"{dim} dimensions")
            ax.set_xlabel("level, from data to noise")
            ax.set_ylabel("mean |error| of log p, nats per dimension")
            ax.legend(fontsize=7)

    return path
