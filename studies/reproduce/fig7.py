"""Figure 7: log-likelihood by one pass against the analytic one, where that is known.

Pixels drawn independently and uniformly, and Gaussian images with covariance (1-g)^½ Sigma + g^½ I, Sigma that of a
data set. Each with the Gaussian residual off (the paper's form) and on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from studies.exact import BoxMixture, ExactMixture, GaussianMixture
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.truth import exact_source, level_errors, spread_levels
from studies.reproduce.workspace import Workspace
from torchcdm.apps.plots import panels
from torchcdm.data import load_data
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.runtime.validation import encode
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.settings import Config

WIDTHS = (0.25, 0.5, 1.0, 2.0, 3.0)
SHARES = (0.0, 1e-5, 1e-3, 1e-1)
"""g, the share of white noise in the covariance."""

TARGET = 0.01
"""Largest mean |error| that counts as right, nats per dimension."""


@dataclass(frozen=True)
class Setting:
    """One scale.

    Attributes:
        pixels: Shape of the uniform images.
        covariance: SPEC of the data whose covariance the Gaussian images have.
        train: Training samples.
        test: Test samples.
        levels: Levels at which the error is measured.
        uniform: Fields of the configuration for uniform pixels.
        gaussian: Fields for Gaussian images.
        scaled_down: How it is smaller than the published setting.
    """

    pixels: tuple[int, ...]
    covariance: str
    train: int
    test: int
    levels: int
    uniform: dict[str, Any]
    gaussian: dict[str, Any]
    scaled_down: tuple[str, ...] = ()


def _layer(steps: int, batch: int, lr: float, network: dict[str, Any], T: int, r_min: float) -> dict[str, Any]:
    often = max(1, steps // 4)
    return {
        "train": {"steps": steps, "batch_size": batch, "optimizer": "adamw", "lr": lr, "ema_decay": 0.99,
                  "warmup": max(1, steps // 20),
                  # The cross-entropy of thousands of dimensions is large at first; clipped to norm 1 it would leave
                  # the squared error nothing.
                  "grad_clip": None, "validate_every": often, "save_every": often, "validation_samples": 200,
                  "patience": None, "sample_every": None, "log_every": 25},
        "loss": {"ce_weight": 1.0},
        "model": {"backbone": network, "schedule": {"name": "log-snr", "T": T, "r_min": r_min, "r_max": 20.0}},
        "sampling": {"n": 1, "steps": 1},
    }  # fmt: skip


def _pixelwise(width: int, maps: int) -> dict[str, Any]:
    """One resolution: independent pixels have nothing to pool."""
    return {"name": "encoder", "width": width, "multipliers": [1], "blocks": 1, "energy_maps": maps}


def _dense(width: int, maps: int) -> dict[str, Any]:
    """Sees all pixels at once, as a covariance does."""
    return {"name": "mlp", "width": width, "depth": 2, "energy_maps": maps, "dropout": 0.0}


_PAPER = preset_fields("cifar10")
_PAPER_TRAINING = _PAPER["train"] | {"steps": 50_000}

SETTINGS = {
    "smoke": Setting(
        (1, 8, 8), "digits", 4000, 200, 8,
        _layer(60, 64, 5e-3, _pixelwise(8, 4), 40, 0.01),
        _layer(60, 64, 5e-3, _dense(32, 8), 40, 0.01),
        ("8x8 pixels and the covariance of digits instead of 3x32x32 pixels and that of Fashion-MNIST; 60 steps",),
    ),
    "small": Setting(
        (3, 32, 32), "fashion-mnist", 50_000, 500, 16,
        _layer(500, 16, 5e-3, _pixelwise(16, 16), 200, 0.002),
        _layer(800, 64, 4e-3, _dense(256, 8), 200, 0.001),
        ("networks of 8 thousand (uniform pixels) and 2 million (Gaussian images) weights instead of 33 million",
         "500 and 800 steps of 16 and 64 samples, minutes of one core",
         "a log-SNR ladder of 200 levels instead of the linear schedule of 1000"),
    ),
    "paper": Setting(
        (3, 32, 32), "fashion-mnist", 50_000, 2000, 24,
        {key: _PAPER[key] for key in ("loss", "sampling")}
        | {"model": {key: _PAPER["model"][key] for key in ("backbone", "schedule")}, "train": _PAPER_TRAINING},
        {key: _PAPER[key] for key in ("loss", "sampling")}
        | {"model": {"schedule": _PAPER["model"]["schedule"],
                     "backbone": _PAPER["model"]["backbone"] | {"multipliers": [1, 2, 2], "attention": [14]}},
           "train": _PAPER_TRAINING},
        ("50 000 steps; the paper does not say how long it trained here",),
    ),
}  # fmt: skip


def run(work: Workspace) -> Result:
    """Trains two models for each distribution and compares them with the truth."""
    setting = SETTINGS[work.scale]
    shape, sigma = image_covariance(setting.covariance)
    if setting.gaussian["model"]["backbone"]["name"] == "mlp":
        shape = (math.prod(shape),)
    cases = [(f"Gaussian, g = {g:g}", gaussian_images(shape, sigma, g), setting.gaussian) for g in SHARES]
    cases += [(f"uniform, width {w:g}", uniform_pixels(setting.pixels, w), setting.uniform) for w in WIDTHS]
    rows, points = [], []
    # The cheap ones first: a covariance of all pairs of 3072 pixels takes longer than the training.
    for residual in (False, True):
        for name, mixture, layer in cases:
            config = work.adjusted(make_config(preset_fields("encoder"), layer, {"model": {"gaussian": residual}}))
            title = f"{name}, residual {'on' if residual else 'off'}"
            values = work.finished(title, partial(_measure, work, setting, name, mixture, config))
            if values is None:
                continue
            rows.append(_row(name, residual, values))
            points.append((name, residual, values["exact"], values["predicted"]))
    table = Table(
        f"log-likelihood at level 0, nats per dimension, {setting.test} test samples; the target is a mean |error| of "
        f"at most {TARGET}",
        ("distribution", "dimensions", "Gaussian residual", "analytic", "one pass", "error", "mean \\|error\\|",
         "spread of the error", "steps", "seconds"),
        tuple(rows),
    )  # fmt: skip
    figure = Figure(_paint(points, work), "One pass against the analytic log-likelihood; the dashed line is equality.")
    notes = (
        f"Sigma is the covariance of the dequantised {setting.covariance} training images in model units. Pixels that "
        "never vary in the data keep the variance of their grey level's cell, so that Sigma is not singular and g = 0 "
        f"has a density: its smallest standard deviation is {float(_smallest(sigma)):.2g}. The Gaussian images have "
        "mean zero.",
        "The paper shows these comparisons as a figure without numbers.",
    )
    return Result((table,), (figure,), setting.scaled_down, notes)


def uniform_pixels(shape: Sequence[int], width: float) -> BoxMixture:
    """Independent pixels, uniform on [-width/2, width/2]."""
    edge = torch.full((1, *shape), width / 2, dtype=torch.float64)
    return BoxMixture(torch.ones(1), -edge, edge)


def gaussian_images(shape: Sequence[int], sigma: Tensor, g: float) -> GaussianMixture:
    """N(0, (1-g)^½ sigma + g^½ I), sigma (d, d)."""
    covariance = math.sqrt(1 - g) * sigma + math.sqrt(g) * torch.eye(len(sigma), dtype=torch.float64)
    return GaussianMixture(torch.ones(1), torch.zeros(1, *shape, dtype=torch.float64), covariance[None])


def image_covariance(spec: str) -> tuple[tuple[int, ...], Tensor]:
    """Event shape and covariance (d, d) of a data set's training images, dequantised, in model units."""
    source = load_data(spec)
    x = source.train.tensors()[0].double().flatten(1)
    x = (x - x.mean(0)) / source.transform.scale
    # Uniform dequantisation adds the variance of a cell to every pixel; added here without its sampling noise.
    cell = torch.full((x.shape[1],), float(source.transform.model_bin) ** 2 / 12, dtype=torch.float64)
    return source.shape, x.T @ x / len(x) + torch.diag(cell)


def _measure(
    work: Workspace, setting: Setting, name: str, mixture: ExactMixture, config: Config
) -> dict[str, Any]:
    """Predicted and exact log-likelihoods of the test samples, and errors by level."""
    key = f"fig7-{_slug(name)}-{'residual' if config.model.gaussian else 'plain'}"
    facts: dict[str, Any] = {"settings": encode(config), "train": setting.train, "test": setting.test,
                             "levels": setting.levels}  # fmt: skip

    def make() -> dict[str, Any]:
        source = exact_source(mixture, name, setting.train, 500, setting.test)
        model, trained = work.model(key, config, source)
        assert isinstance(model, ClassificationDiffusion)
        x = source.test.tensors()[0]
        found = level_errors(model, mixture, x, spread_levels(model.schedule.T, setting.levels))
        d = x[0].numel()
        error, exact = found.error / d, found.exact / d
        return {
            "dim": d, "steps": trained["steps"], "seconds": round(trained["seconds"], 1),
            "exact": exact[0].tolist(), "predicted": (exact + error)[0].tolist(), "levels": found.levels,
            "error_by_level": error.mean(1).tolist(), "absolute_error_by_level": error.abs().mean(1).tolist(),
        }  # fmt: skip

    return work.numbers(key, facts, make)


def _row(name: str, residual: bool, values: dict[str, Any]) -> tuple[Any, ...]:
    exact, predicted = (torch.tensor(values[key], dtype=torch.float64) for key in ("exact", "predicted"))
    error = predicted - exact
    moments = (exact.mean(), predicted.mean(), error.mean(), error.abs().mean(), error.std())
    state = "on" if residual else "off"
    return name, values["dim"], state, *map(float, moments), values["steps"], values["seconds"]


def _paint(points: Sequence[tuple[str, bool, list[float], list[float]]], work: Workspace) -> Any:
    path = work.figure("fig7")
    with panels(path, 2) as axes:
        for ax, residual in zip(axes, (False, True), strict=True):
            for name, state, exact, predicted in points:
                if state == residual:
                    ax.scatter(exact, predicted, s=12, label=name, marker="o" if "uniform" in name else "^")
            low, high = ax.get_xlim()
            ax.plot([low, high], [low, high], "k--", linewidth=0.8)
            ax.set_title(f"Gaussian residual {'on' if residual else 'off'}")
            ax.set_xlabel("analytic, nats per dimension")
            ax.set_ylabel("one pass, nats per dimension")
            ax.legend(fontsize=7)

    return path


def _smallest(sigma: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(sigma)[0].sqrt()


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" = ", "-").replace(" ", "-")
