"""The models of the paper's tables and figures, each trained once and shared, and their samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from studies.reproduce.bound import BoundLoss
from studies.reproduce.result import Figure
from studies.reproduce.tre import TRELoss
from studies.reproduce.workspace import Workspace
from torchcdm.compose import sample
from torchcdm.data import save_grid
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.validation import encode
from torchcdm.training.build import load_source
from torchcdm.training.config_files import make_config, merge, preset_fields
from torchcdm.training.finish import balanced_labels
from torchcdm.training.settings import Config
from torchcdm.units import DataTransform

CHUNK = 250
"""Samples that are kept together."""

SEEDS = 1_000_000
"""Chunks have seeds of their own, below this many for each seed of a workspace."""

SHOWN = 64
POOL = 10_000
"""Training images among which the nearest to a sample is looked for."""


def variants(T: int) -> dict[str, dict[str, Any]]:
    """What each model changes in the configuration of its scale, which has ``T`` noise levels.

    ``both`` is the CDM; ``ce`` and ``mse`` have one of its losses; ``tre`` has the logistic losses of adjacent pairs
    (the earlier ratio estimator); ``ddm`` is the plain diffusion model, ``ddm-bound`` the same trained on its
    likelihood bound; the others differ in schedule, or are given the class.
    """
    ddm = {"model": {"kind": "ddm"}}
    labels = {"model": {"labels": "input"}}
    return {
        "both": {},
        "ce": {"loss": {"mse_weight": 0.0}},
        "mse": {"loss": {"ce_weight": 0.0}},
        "tre": {"loss": {"mse_weight": 0.0}},
        "uniform": {"model": {"schedule": {"name": "uniform-sigma", "T": T}}},
        # The paper counts levels 0 ... T with pure noise at T.
        "ot": {"model": {"schedule": {"name": "optimal-transport", "T": T - 1}}},
        "conditional": labels,
        "ddm": ddm,
        "ddm-bound": ddm,
        "ddm-conditional": merge(ddm, {"model": merge(ddm["model"], labels["model"])}),
    }


LOSSES: dict[str, Callable[[Any], torch.nn.Module]] = {"tre": TRELoss, "ddm-bound": BoundLoss}
"""Of the models that another loss trains than their kind's own."""


@dataclass(frozen=True)
class Setting:
    """One data set at one scale.

    Attributes:
        data: SPEC.
        preset: Whose configuration the models take.
        test: Test images that are scored.
        samples: Of each model and sampler, for the Fréchet distance.
        steps: Of the samplers: where the paper takes 50, 1000 and 25.
        layers: Fields of the configuration that all models share, on top of the preset.
        ddm: Fields of the plain diffusion models, whose network is another.
        presets: Models that have a preset of their own.
        scaled_down: How it is smaller than the published setting.
        weights: Grid of guidance weights.
    """

    data: str
    preset: str
    test: int
    samples: int
    steps: Mapping[str, int]
    layers: dict[str, Any] = field(default_factory=dict)
    ddm: dict[str, Any] = field(default_factory=dict)
    presets: Mapping[str, str] = field(default_factory=dict)
    scaled_down: tuple[str, ...] = ()
    weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)


PUBLISHED_STEPS = {"ddim": 50, "ddpm": 1000, "dpm2": 25}


def _training(steps: int, batch: int, lr: float) -> dict[str, Any]:
    often = max(1, steps // 5)
    return {"steps": steps, "batch_size": batch, "optimizer": "adamw", "lr": lr, "warmup": max(1, steps // 20),
            "ema_decay": 0.995, "validate_every": often, "save_every": often, "validation_samples": 500,
            "select": "loss", "patience": None, "sample_every": None, "log_every": 25}  # fmt: skip


def _small_setting(
    data: str,
    width: int,
    multipliers: list[int],
    T: int,
    training: dict[str, Any],
    size: tuple[int, int] | None = None,
    **sizes: Any,
) -> Setting:
    """The paper's form, no Gaussian residual and no dequantisation, with the encoder-only network."""
    encoder = {"name": "encoder", "width": width, "multipliers": multipliers, "blocks": 2, "energy_maps": 32}
    unet = {"name": "unet", "channels": width, "multipliers": multipliers, "attention": [], "dropout": 0.0}
    layers = {
        "data": {"spec": data, "size": None if size is None else list(size), "dequantize": False},
        "model": {"gaussian": False, "backbone": encoder, "schedule": {"name": "linear", "T": T}},
        "loss": {"ce_weight": 3.0},
        "train": training,
        "sampling": {"n": 0},
    }
    return Setting(data, "encoder", layers=layers, ddm={"model": {"backbone": unet}}, **sizes)


SETTINGS = {
    "smoke": _small_setting(
        "digits", 8, [1, 2], 40, training=_training(30, 32, 3e-3), test=60, samples=40,
        steps={"ddim": 5, "ddpm": 10, "dpm2": 4}, weights=(0.5, 1.0),
        scaled_down=("digits 8x8, 30 steps, 40 levels, 40 samples: numbers prove only that the code runs",),
    ),
    "small": _small_setting(
        "fashion-mnist", 32, [1, 2, 2], 1000, training=_training(1500, 64, 2e-3), test=1000, samples=2000,
        steps={"ddim": 50, "ddpm": 200, "dpm2": 25}, size=(16, 16),
        scaled_down=(
            "Fashion-MNIST resized to 16x16, in grey, instead of CIFAR-10",
            "the encoder-only network of width 32 instead of the U-Net of width 128 (DDM: a U-Net of width 32)",
            "1500 steps of 64 images instead of 500 000 of 128, for every model",
            "2000 samples instead of 50 000, and 200 sampling steps where the paper takes 1000, for every model",
        ),
    ),
    "paper": Setting(
        "cifar10", "cifar10", 10_000, 50_000, PUBLISHED_STEPS,
        presets={"uniform": "cifar10-uniform", "ot": "cifar10-ot", "conditional": "cifar10-conditional",
                 "ddm-conditional": "cifar10-conditional"},
        scaled_down=("one run of the published setting",),
    ),
}  # fmt: skip
"""The paper trains on all images and keeps the last averaged weights."""

CELEBA = Setting("celeba", "celeba64", 10_000, 50_000, PUBLISHED_STEPS, scaled_down=SETTINGS["paper"].scaled_down)


def config_of(setting: Setting, variant: str) -> Config:
    """The configuration of a model of :func:`variants`."""
    common = make_config(preset_fields(setting.preset), setting.layers)
    change = variants(common.model.schedule.T)[variant]
    network = setting.ddm if change.get("model", {}).get("kind") == "ddm" else {}
    return make_config(preset_fields(setting.presets.get(variant, setting.preset)), setting.layers, network, change)


@final
class Models:
    """The models of one setting, trained where they are not finished yet, and their samples.

    Args:
        work: Where they are kept.
        setting: Of the workspace's scale when None.

    Attributes:
        setting: The setting, with as many samples as the workspace wants.
        source: Its data, not dequantised, as in the paper.
    """

    def __init__(self, work: Workspace, setting: Setting | None = None) -> None:
        self.work = work
        setting = SETTINGS[work.scale] if setting is None else setting
        self.setting = setting if work.sample_count is None else replace(setting, samples=work.sample_count)
        self.source = load_source(config_of(self.setting, "both").data)
        self._loaded: dict[str, tuple[Denoiser, dict[str, Any]]] = {}

    def name(self, variant: str) -> str:
        """Under which a model, its numbers and samples are kept."""
        return f"{self.source.name}-{variant}"

    def config(self, variant: str) -> Config:
        """The configuration of a model of :func:`variants`."""
        return self.work.adjusted(config_of(self.setting, variant))

    def denoiser(self, variant: str) -> tuple[Denoiser, dict[str, Any]]:
        """A trained model, and its steps and seconds."""
        if variant not in self._loaded:
            found = self.work.model(self.name(variant), self.config(variant), self.source, LOSSES.get(variant))
            self._loaded[variant] = found
        return self._loaded[variant]

    def classifier(self, variant: str) -> ClassificationDiffusion:
        """The same, of a variant that has logits."""
        model, _ = self.denoiser(variant)
        assert isinstance(model, ClassificationDiffusion)
        return model

    def samples(
        self,
        variant: str,
        sampler: str = "ddim",
        steps: int | None = None,
        guidance: float = 0.0,
        count: int | None = None,
    ) -> Tensor:
        """Samples of a model; of one that is given the class, sample i has class i modulo their number.

        Args:
            variant: Of :func:`variants`.
            sampler: Name.
            steps: Of the sampler; the setting's when None.
            guidance: Weight.
            count: At least so many where the setting has more; the setting's when None.

        Returns:
            Data units, (n, *shape).
        """
        model, _ = self.denoiser(variant)
        # Chunks hold whole rounds of the classes.
        classes = model.classes or 1
        size = max(1, min(CHUNK, self.setting.samples) // classes) * classes
        steps = min(self.setting.steps[sampler] if steps is None else steps, model.schedule.T)
        chunks = -(-min(count or self.setting.samples, self.setting.samples) // size)
        y = None if model.classes is None else balanced_labels(size, classes)
        name = f"{self.name(variant)}-{sampler}-{steps}" + (f"-w{guidance:g}" if guidance else "")

        def make(chunk: int) -> Tensor:
            self.work.say(f"sampling {name}, chunk {chunk + 1} of {chunks}")
            seed = SEEDS * self.work.seed + chunk
            return sample(model, size, sampler, steps, y, guidance, seed=seed, progress=self.work.progress)

        facts = {"config": encode(self.config(variant)), "chunk": size}
        return self.work.samples(name, facts, chunks, make)

    def figure(self, name: str, x: Tensor, what: str) -> Figure:
        """The first of some samples (n, *shape), data units, each above its nearest training image.

        Args:
            name: Of the file.
            x: The samples.
            what: They are, for the caption.
        """
        pool = self.source.train.tensors(POOL)[0]
        path = neighbours(x[:SHOWN], pool, self.work.figure(name), self.source.transform)
        return Figure(path, f"Samples, {what}; below each its nearest of {len(pool)} training images.")


def neighbours(samples: Tensor, train: Tensor, path: Path, transform: DataTransform) -> Path:
    """Samples (N, C, H, W), and below each the nearest training image, data units: what was learned by heart shows."""
    columns = min(16, len(samples))
    rows = len(samples) // columns
    samples = samples[: rows * columns].float().cpu()
    nearest = train[torch.cdist(samples.flatten(1), train.float().flatten(1)).argmin(1)].float()
    pairs = torch.stack([samples.unflatten(0, (rows, columns)), nearest.unflatten(0, (rows, columns))], 1)
    return save_grid(pairs.flatten(0, 2), path, transform, columns)
