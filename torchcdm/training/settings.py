"""Configuration of a run: frozen dataclasses, whose defaults presets, files and flags override."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torchcdm.data import DataOptions
from torchcdm.errors import UserError

FEWEST_PARTICLES = 128
"""For log Z: a quarter of them are the draws of the second estimate."""

# --- networks: the arguments of the classes in torchcdm.networks -----------------------------------------------


@dataclass(frozen=True)
class EncoderConfig:
    """:class:`torchcdm.networks.encoder.Encoder`; images."""

    name: Literal["encoder"] = "encoder"
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    dropout: float = 0.0
    attention: tuple[int, ...] = ()
    energy_maps: int = 32
    knots: int | None = None
    positions: bool = False


@dataclass(frozen=True)
class UNetConfig:
    """:class:`torchcdm.networks.unet.CDMUNet`, or ``DDMUNet`` in a ddm; images."""

    name: Literal["unet"] = "unet"
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1
    groups: int = 32
    head_channels: int | None = None
    direction: Literal["data", "noise"] = "noise"


@dataclass(frozen=True)
class MLPConfig:
    """:class:`torchcdm.networks.mlp.MLP`, or ``DDMMLP`` in a ddm; vectors."""

    name: Literal["mlp"] = "mlp"
    width: int = 256
    depth: int = 4
    dropout: float = 0.0
    energy_maps: int = 32
    knots: int | None = None
    context: int | None = None
    waves: int = 0
    wave_frequency: float = 4.0


@dataclass(frozen=True)
class TimmConfig:
    """:class:`torchcdm.networks.timm_adapter.TimmBackbone`; images. ``options`` go to ``timm.create_model``."""

    name: Literal["timm"] = "timm"
    model: str = "vit_tiny_patch16_224"
    knots: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


BackboneConfig = EncoderConfig | UNetConfig | MLPConfig | TimmConfig

# --- schedules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearConfig:
    """:class:`torchcdm.diffusion.schedules.LinearSchedule`."""

    name: Literal["linear"] = "linear"
    T: int = 1000
    beta_min: float = 1e-4
    beta_max: float = 0.02


@dataclass(frozen=True)
class CosineConfig:
    """:class:`torchcdm.diffusion.schedules.CosineSchedule`."""

    name: Literal["cosine"] = "cosine"
    T: int = 1000
    offset: float = 0.008


@dataclass(frozen=True)
class UniformSigmaConfig:
    """:class:`torchcdm.diffusion.schedules.UniformSigmaSchedule`."""

    name: Literal["uniform-sigma"] = "uniform-sigma"
    T: int = 200


@dataclass(frozen=True)
class OptimalTransportConfig:
    """:class:`torchcdm.diffusion.schedules.OptimalTransportSchedule`."""

    name: Literal["optimal-transport"] = "optimal-transport"
    T: int = 200


@dataclass(frozen=True)
class LogSNRConfig:
    """:class:`torchcdm.diffusion.schedules.LogSNRSchedule`; ``r_min`` is half a grey level, or a hundredth of the
    scale of continuous data, when None."""

    name: Literal["log-snr"] = "log-snr"
    T: int = 200
    r_min: float | None = None
    r_max: float = 80.0


ScheduleConfig = LinearConfig | CosineConfig | UniformSigmaConfig | OptimalTransportConfig | LogSNRConfig

# --- the rest ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        kind: ``cdm``, or ``ddm``: the plain denoising diffusion baseline.
        labels: ``none``; ``input``: the class is an input of the network, as in the paper; ``joint``: all classes
            from one pass (identity 10).
        gaussian: Logits are a correction to a fitted Gaussian.
        components: Number of Gaussians in the base density; above 1 for vectors only.
        shrinkage: Share by which each covariance is moved towards a round one; for few samples of many numbers.
        class_gaussians: Each class has a base Gaussian of its own, or weights of its own for the same ``components``;
            for joint labels.
        backbone: The network.
        schedule: The noise levels.
    """

    kind: Literal["cdm", "ddm"] = "cdm"
    labels: Literal["none", "input", "joint"] = "none"
    gaussian: bool = True
    components: int = 1
    shrinkage: float = 0.0
    class_gaussians: bool = False
    backbone: BackboneConfig = EncoderConfig()
    schedule: ScheduleConfig = UniformSigmaConfig()


@dataclass(frozen=True)
class LossConfig:
    """:class:`torchcdm.losses.CDMLoss`, or :class:`torchcdm.losses.DDMLoss`, which reads ``label_dropout`` alone.

    Attributes:
        logits_from: Shares of the training between which the weights of the cross-entropy, of the time term and of the
            kernel's rise from 0.
    """

    ce_weight: float = 3.0
    mse_weight: float = 1.0
    label_dropout: float = 0.1
    time_weight: float = 0.0
    kernel_weight: float = 0.0
    logits_from: tuple[float, ...] = (0.0, 0.0)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained.

    Attributes:
        steps: Optimiser steps.
        max_seconds: End after so much time even so; the cosine is then zero at whichever end comes first.
        batch_size: Samples a step, all processes together.
        seed: Everything random in step k is a function of this and k.
        optimizer: ``adamw``, ``adam``, or ``muon``: Muon for the hidden layers, AdamW for the rest.
        lr: Peak learning rate.
        betas: The two decay rates of Adam.
        weight_decay: Of AdamW and Muon.
        warmup: Steps of linear warm-up.
        decay: ``cosine`` to zero at the last step, ``constant``, or ``step``: times ``decay_factor`` every
            ``decay_every`` steps.
        decay_every: See ``decay``.
        decay_factor: See ``decay``.
        grad_clip: Largest norm of the gradient; None for no limit.
        ema_decay: Decay of the averaged weights, reached by a ramp.
        precision: ``fp32`` or ``bf16``.
        compile: Compile the loss with torch.compile.
        validate_every: Steps between validations of the averaged weights.
        validation_samples: At most so many validation samples.
        select: Validation value that names the best model: ``nll``, ``loss`` or ``mse``; a ddm has ``mse``, or
            ``loss`` where that is weighted.
        patience: Stop after so many validations without a new best; None never stops early.
        calibration: Noisy copies of the validation split by which the constants of a cdm's levels are set at the end,
            where that lowers the cross-entropy (:mod:`torchcdm.training.level_constants`); 0 leaves them as they are.
        log_every: Steps between lines of metrics.jsonl.
        save_every: Steps between states that a resumed run starts from.
        sample_every: Steps between grids of samples; None for one at the end.
        init: A run whose weights are the start, where they fit.
        trackers: Names for accelerate's ``log_with``, such as ``tensorboard``.
    """

    steps: int = 10_000
    max_seconds: float | None = None
    batch_size: int = 128
    seed: int = 0
    optimizer: Literal["adamw", "adam", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    decay: Literal["cosine", "constant", "step"] = "cosine"
    decay_every: int = 200_000
    decay_factor: float = 0.1
    grad_clip: float | None = 1.0
    ema_decay: float = 0.999
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    validate_every: int = 500
    validation_samples: int = 2000
    select: Literal["nll", "loss", "mse"] = "nll"
    patience: int | None = None
    calibration: int = 0
    log_every: int = 50
    save_every: int = 500
    sample_every: int | None = None
    init: str | None = None
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "validation_samples", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise UserError(f"max_seconds is {self.max_seconds:g}; it must be positive")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value:g}; it must be positive")
        for name in ("warmup", "weight_decay", "calibration"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name):g}; it must not be negative")
        for name in ("patience", "decay_every", "sample_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay:g}; it must be at least 0 and below 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must not be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {list(self.betas)}; two numbers of at least 0 and below 1 are needed")


@dataclass(frozen=True)
class SamplingConfig:
    """The samples a run draws of itself; none where ``n`` is 0."""

    n: int = 64
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.n < 0 or self.steps < 1:
            raise UserError(f"sampling: n is {self.n} and steps is {self.steps}; at least 0 and 1 are needed")


@dataclass(frozen=True)
class ReportConfig:
    """What is measured on the test split when training ends.

    Attributes:
        methods: Likelihoods, see :func:`torchcdm.likelihood.report`; of a ddm those that it has, elbo and flow.
        limit: At most so many test samples.
        draws: Noise draws of the one-pass likelihoods.
        flow_steps: Heun steps of the probability flow.
        flow_probes: Random probes of its divergence.
        particles: Of the estimate of log Z.
        baselines: Put classical density models beside it, where the data are small.
    """

    methods: tuple[str, ...] = ("single", "flow")
    limit: int = 500
    draws: int = 1
    flow_steps: int = 50
    flow_probes: int = 2
    particles: int = 1024
    baselines: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "draws", "flow_steps", "flow_probes"):
            if getattr(self, name) < 1:
                raise UserError(f"report: {name} is {getattr(self, name)}; it must be at least 1")
        if self.particles < FEWEST_PARTICLES:
            raise UserError(f"report: particles is {self.particles}; at least {FEWEST_PARTICLES} are needed")


@dataclass(frozen=True)
class Reaches:
    """What a preset should reach, and whether that was measured with it or published elsewhere."""

    text: str
    source: Literal["measured", "published"]


@dataclass(frozen=True)
class Config:
    """All of a run; ``config.yaml`` in its folder."""

    preset: str | None = None
    description: str = ""
    reaches: Reaches | None = None
    data: DataOptions = DataOptions()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    report: ReportConfig = ReportConfig()
