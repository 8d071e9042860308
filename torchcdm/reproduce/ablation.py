"""The models of Table 1 and of the Figures 3, 4 and 9, each trained once and shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.codec import merge
from torchcdm.config import Config, make_config, preset_fields
from torchcdm.data import DataSource, load_data
from torchcdm.denoisers import Denoiser
from torchcdm.reproduce.tre import train_tre
from torchcdm.reproduce.workspace import Workspace
from torchcdm.samplers import sample
from torchcdm.trainer import TrainResult

VARIANTS: dict[str, dict[str, Any]] = {
    "ce": {"loss": {"mse_weight": 0.0}},
    "mse": {"loss": {"ce_weight": 0.0}},
    "both": {},
    "tre": {"loss": {"mse_weight": 0.0}},
    "ddm": {"model": {"kind": "ddm"}},
    "uniform": {"model": {"schedule": {"name": "uniform-sigma"}}},
}
"""What each model changes: cross-entropy only, squared error only, both (the CDM), logistic losses of adjacent pairs
(the earlier ratio estimator), the plain diffusion model, and the CDM under uniform sigma."""

CHUNK = 250
"""Samples that are kept together."""


@dataclass(frozen=True)
class Setting:
    """One scale.

    Attributes:
        data: SPEC.
        layers: Fields of the configuration that all models share.
        ddm: Fields of the plain diffusion model, whose network is another.
        test: Test images that are scored.
        samples: Of each model, for the Fréchet distance.
        steps: Of the sampler.
        scaled_down: How it is smaller than the published setting.
        size: Images are resized to this (height, width); None leaves them.
    """

    data: str
    layers: dict[str, Any]
    ddm: dict[str, Any]
    test: int
    samples: int
    steps: int
    scaled_down: tuple[str, ...] = ()
    size: tuple[int, int] | None = None


def _training(steps: int, batch: int, lr: float) -> dict[str, Any]:
    often = max(1, steps // 5)
    return {"steps": steps, "batch_size": batch, "lr": lr, "warmup": max(1, steps // 20), "ema_decay": 0.995,
            "validate_every": often, "save_every": often, "validation_samples": 500, "select": "loss",
            "patience": None, "sample_every": None, "log_every": 25}  # fmt: skip


def _small_setting(
    data: str, width: int, multipliers: list[int], T: int, training: dict[str, Any], **sizes: Any
) -> Setting:
    """The paper's form, no Gaussian residual and no dequantisation, with the encoder-only network."""
    encoder = {"name": "encoder", "width": width, "multipliers": multipliers, "blocks": 2, "energy_maps": 32}
    unet = {"name": "unet", "channels": width, "multipliers": multipliers, "attention": [], "dropout": 0.0}
    layers = {
        "data": {"dequantize": False},
        "model": {"gaussian": False, "backbone": encoder, "schedule": {"name": "linear", "T": T}},
        "loss": {"ce_weight": 3.0},
        "train": training,
        "sampling": {"n": 0},
    }
    return Setting(data, layers, {"model": {"backbone": unet}}, **sizes)


SETTINGS = {
    "smoke": _small_setting(
        "digits", 8, [1, 2], 40, training=_training(30, 32, 3e-3), test=60, samples=40, steps=5,
        scaled_down=("digits 8x8, 30 steps, 40 levels, 40 samples: numbers prove only that the code runs",),
    ),
    "small": _small_setting(
        "fashion-mnist", 32, [1, 2, 2], 1000, training=_training(1500, 64, 2e-3), test=1000, samples=2000, steps=50,
        size=(16, 16),
        scaled_down=(
            "Fashion-MNIST resized to 16x16, in grey, instead of CIFAR-10",
            "the encoder-only network of width 32 instead of the U-Net of width 128 (DDM: a U-Net of width 32)",
            "1500 steps of 64 images instead of 500 000 of 128, for every row",
            "2000 samples instead of 50 000, for every row",
        ),
    ),
    "paper": Setting(
        "cifar10", {}, {}, 10_000, 50_000, 50,
        ("one run of the published setting",),
    ),
}  # fmt: skip


def setting_of(work: Workspace) -> Setting:
    """The setting of the workspace's scale."""
    return SETTINGS[work.scale]


def source_of(work: Workspace) -> DataSource:
    """The data of the workspace's scale, not dequantised, as in the paper."""
    setting = setting_of(work)
    # The paper trains on all images and keeps the last averaged weights.
    validation = 0 if work.scale == "paper" else None
    return load_data(setting.data, setting.size, dequantize=False, validation_fraction=validation)


def config_of(work: Workspace, variant: str) -> Config:
    """The configuration of one model."""
    setting = setting_of(work)
    fields = preset_fields("cifar10") if work.scale == "paper" else merge(preset_fields("encoder"), setting.layers)
    change = dict(VARIANTS[variant])
    if variant == "uniform":
        change = merge(change, {"model": {"schedule": {"T": fields["model"]["schedule"]["T"]}}})
        if work.scale == "paper":
            fields, change = preset_fields("cifar10-uniform"), {}
    return make_config(fields, setting.ddm if variant == "ddm" else {}, change)


def denoiser(work: Workspace, variant: str, source: DataSource) -> tuple[Denoiser, dict[str, Any]]:
    """A trained model of :data:`VARIANTS`, and its steps and seconds."""
    how: Callable[..., TrainResult] | None = train_tre if variant == "tre" else None
    return work.model(f"ablation-{variant}", config_of(work, variant), source, how)


def classifier(work: Workspace, variant: str, source: DataSource) -> ClassificationDiffusion:
    """The same, of a variant that has logits."""
    model, _ = denoiser(work, variant, source)
    assert isinstance(model, ClassificationDiffusion)
    return model


def samples_of(work: Workspace, variant: str, model: Denoiser, sampler: str = "ddim") -> Tensor:
    """The sample set of a model, data units, (n, *shape)."""
    setting = setting_of(work)
    size = min(CHUNK, setting.samples)
    settings = {"samples": setting.samples, "sampler": sampler, "steps": setting.steps}

    def make(chunk: int) -> Tensor:
        work.say(f"sampling {variant}, chunk {chunk + 1} of {setting.samples // size}")
        return sample(model, size, sampler, setting.steps, seed=chunk, progress=work.progress)

    return work.samples(f"{variant}-{sampler}", settings, setting.samples // size, make)


