"""Our own systems: the classification diffusion model under several schedules, and the plain diffusion model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

from studies.budget import Budget
from studies.compare.denoising import FittedDenoiser
from studies.compare.peer import Diverged, Peer, Task, Training
from torchcdm.data import DataSource
from torchcdm.training.build import plain_model
from torchcdm.training.checkpoint import load
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.finish import sampling_options
from torchcdm.training.loop import NotFinite, train
from torchcdm.training.settings import SCHEDULE_SETTINGS, Config

PRESETS = {"digits": "digits", "fashion-mnist": "fashion-mnist"}
"""Of data that have a preset of their own for this size of machine."""

DDM_BY_ADAMW = {"digits": 2e-3}
"""Rates of data whose DDM is better by AdamW than by the preset's Muon: on digits by 0.16 bits/dim. On Fashion-MNIST
16x16 Muon at the preset's rate is better by 0.05, after the same 300 s."""

UNLIMITED = 10**9
"""Steps: the budget ends the training."""


def preset_of(source: DataSource) -> Config:
    """The preset whose network and training our systems take on these data."""
    return make_config(preset_fields(PRESETS.get(source.name, "mlp" if len(source.shape) == 1 else "encoder")))


@final
class ClassificationPeer(Peer):
    """A classification diffusion model: the network and the training of the data's preset.

    Args:
        name: On the command line.
        title: In the table.
        schedule: In the place of the preset's.
    """

    def __init__(self, name: str, title: str, schedule: Any = None) -> None:
        self.name, self.title, self.schedule = name, title, schedule

    def fit(self, task: Task, budget: Budget, rate: float = 1.0) -> FittedDenoiser:
        config = preset_config(task)
        model = config.model if self.schedule is None else replace(config.model, schedule=self.schedule)
        return _fit(self.name, replace(config, model=model), task, budget, rate)


@final
class DiffusionPeer(Peer):
    """The plain denoising diffusion model: the preset's training, a network of the same width that is told the level.

    On images it is the U-Net of the encoder's width, multipliers and blocks, by the better of two optimisers.
    """

    name, title = "ddm", "DDM"

    def fit(self, task: Task, budget: Budget, rate: float = 1.0) -> FittedDenoiser:
        config = preset_config(task)
        training = config.train
        if rate_of_adamw := DDM_BY_ADAMW.get(task.source.name):
            training = replace(training, optimizer="adamw", lr=rate_of_adamw)
        return _fit(self.name, replace(config, model=plain_model(config.model), train=training), task, budget, rate)


def preset_config(task: Task) -> Config:
    """The preset's configuration on the comparison's data."""
    return replace(preset_of(task.source), data=task.data)


def _fit(name: str, config: Config, task: Task, budget: Budget, rate: float) -> FittedDenoiser:
    folder = task.folder / (f"run-{name}" if rate == 1 else f"run-{name}-lower-rate")
    # The constants of the levels would be set after the budget's end.
    limits = replace(
        config.train, steps=UNLIMITED, max_seconds=budget.seconds, lr=rate * config.train.lr, seed=task.seed,
        calibration=0,
    )  # fmt: skip
    config = replace(config, train=limits)
    try:
        result = train(
            config, folder, task.source, resume=True, device=str(task.device), progress=task.progress, clock=budget.now
        )
    except NotFinite as error:
        raise Diverged(str(error)) from error
    chosen = result.selected
    training = Training(result.step, result.seconds, chosen.get("best"), chosen["step"], _setting(config))
    model = load(folder, task.device)
    return FittedDenoiser(model, training, sampling=sampling_options(model, config.sampling), log_z=task.log_z)


def _setting(config: Config) -> str:
    model, net = config.model, config.model.backbone
    width = getattr(net, "width", getattr(net, "channels", None))
    average = f"EMA {config.train.ema_decay:g}"
    base = " on a fitted Gaussian" if model.gaussian else ""
    return (
        f"preset {config.preset}: {net.name} of width {width}{base}, {model.schedule.name} T={model.schedule.T}, "
        f"{config.train.optimizer}, lr {config.train.lr:g} {config.train.decay}, batch {config.train.batch_size}, "
        f"{average}"
    )


OWN: tuple[Peer, ...] = (
    ClassificationPeer("cdm", "CDM"),
    ClassificationPeer("cdm-linear", "CDM, linear schedule", SCHEDULE_SETTINGS["linear"](T=1000)),
    ClassificationPeer("cdm-uniform", "CDM, uniform sigma", SCHEDULE_SETTINGS["uniform-sigma"](T=1000)),
    ClassificationPeer("cdm-ot", "CDM, optimal transport", SCHEDULE_SETTINGS["optimal-transport"](T=999)),
    DiffusionPeer(),
)
"""The default, the three published schedules with the same network, and the plain model."""
