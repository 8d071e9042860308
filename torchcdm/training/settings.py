"""Settings of a run: what presets, YAML files and flags may set; those of parts are derived from constructors."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Le
from pydantic import model_validator

from torchcdm.data import DataOptions
from torchcdm.diffusion import schedules
from torchcdm.likelihood.log_z import SWEEPS, Sweeps
from torchcdm.likelihood.report import Method
from torchcdm.likelihood.scoring import Scoring
from torchcdm.losses import CDMLoss
from torchcdm.networks.encoder import Encoder
from torchcdm.networks.mlp import DDMMLP, MLP
from torchcdm.networks.unet import CDMUNet, DDMUNet
from torchcdm.runtime import validation
from torchcdm.runtime.validation import Count, CountOrZero, Float, NotNegative, Positive, Rate, Seed, validated


class OwnNetwork:
    """A network of your own, which is given in Python: ``torchcdm.fit(data, backbone=module)``.

    Args:
        code: Where it is made, see :func:`torchcdm.training.build.imported`; None where a module was given.
        module: Its class, for ``cdm info``.
    """

    def __init__(self, code: str | None = None, module: str = "nn.Module") -> None: ...


NETWORKS: dict[str, tuple[type, type | None]] = {
    "encoder": (Encoder, None), "unet": (CDMUNet, DDMUNet), "mlp": (MLP, DDMMLP), "custom": (OwnNetwork, None),
}  # fmt: skip
"""The networks by name: as a classifier of levels, and as a plain denoiser, which takes part of its settings."""

SCHEDULES: dict[str, type[schedules.NoiseSchedule]] = {
    "linear": schedules.LinearSchedule, "cosine": schedules.CosineSchedule,
    "uniform-sigma": schedules.UniformSigmaSchedule, "optimal-transport": schedules.OptimalTransportSchedule,
    "log-snr": schedules.LogSNRSchedule,
}  # fmt: skip

_OF_DATA = ("classes", "joint")  # what the data and ``model.labels`` give
BACKBONES = {name: validation.settings_of(kind, name, _OF_DATA, __name__) for name, (kind, _) in NETWORKS.items()}
SCHEDULE_SETTINGS = {name: validation.settings_of(kind, name, (), __name__) for name, kind in SCHEDULES.items()}
LossConfig = validation.settings_of(CDMLoss, None, (), __name__)

# Pickle looks a class up by its name in its module.
globals().update({kind.__name__: kind for kind in (*BACKBONES.values(), *SCHEDULE_SETTINGS.values(), LossConfig)})


@validated
class ModelConfig:
    """What is trained.

    Attributes:
        kind: ``cdm``, or ``ddm``: the plain denoising diffusion baseline.
        labels: ``none``; ``input``: the class is an input of the network, as in the paper; ``joint``: all classes
            from one pass (identity 10).
        gaussian: Logits are a correction to a fitted Gaussian. This and the next three are chosen by the likelihood
            of validation data where they are left out.
        components: Number of Gaussians in the base density; above 1 for images in the form ``cosine``.
        shrinkage: Share by which each covariance is moved towards a round one; for few samples of many numbers.
        form: Form of the covariances: ``full``; ``cosine``, one variance for each cosine of an image; ``diagonal``.
        class_gaussians: For joint labels, a base Gaussian for each class, or its own weights of the ``components``.
        backbone: The network.
        schedule: The noise levels.
    """

    kind: Literal["cdm", "ddm"] = "cdm"
    labels: Literal["none", "input", "joint"] = "none"
    gaussian: bool | None = None
    components: validation.Width | None = None
    shrinkage: validation.Share | None = None
    form: Literal["full", "cosine", "diagonal"] | None = None
    class_gaussians: bool = False
    backbone: validation.named(*BACKBONES.values()) = BACKBONES["encoder"]()
    schedule: validation.named(*SCHEDULE_SETTINGS.values()) = SCHEDULE_SETTINGS["uniform-sigma"]()

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        components = self.components or 1
        if self.class_gaussians and (self.gaussian is False or self.labels != "joint"):
            raise ValueError("class_gaussians needs gaussian, and labels joint")
        if components > 1 and self.gaussian is False:
            raise ValueError(f"components is {components}; above 1 it needs gaussian")
        other = {"mlp": "cosine", "custom": "diagonal"}.get(self.backbone.name, "full")
        if components > 1 and self.form in ("diagonal", other):
            raise ValueError(f"components is {components}; above 1 form is full for vectors, cosine for images")
        if self.shrinkage and (self.gaussian is False or (self.class_gaussians and components == 1)):
            needs = "gaussian, and components with class_gaussians"
            raise ValueError(f"shrinkage is {self.shrinkage:g}; above 0 it needs {needs}")
        return self


@validated
class TrainConfig:
    """How it is trained.

    Attributes:
        steps: Optimiser steps.
        max_seconds: End after so much time even so, that before a resume included; the cosine is then zero at
            whichever end comes first.
        batch_size: Samples a step, all processes together.
        seed: Everything random in step k is a function of this and k.
        optimizer: ``adamw``, or ``muon``: Muon for the hidden layers, AdamW for the rest.
        lr: Peak learning rate.
        betas: The two decay rates of Adam.
        weight_decay: Weight decay of AdamW and Muon.
        warmup: Steps of linear warm-up.
        decay: ``cosine`` to zero at the last step, ``constant``, or ``step``.
        decay_every: Of ``step``: the steps after which the rate falls.
        decay_factor: What it is multiplied by.
        grad_clip: Largest norm of the gradient; None for no limit.
        ema_decay: Decay of the averaged weights, reached by a ramp.
        precision: ``fp32`` or ``bf16``.
        compile: Compile the loss with torch.compile.
        validate_every: Steps between validations of the averaged weights.
        validation_samples: At most so many validation samples.
        select: Validation value that names the best model: ``nll``, ``loss`` or ``mse``; a ddm has ``mse`` alone.
        patience: Stop after so many validations without a new best; None never stops early.
        fallback: Keep what the training began with as the model where the trained one is worse on validation data.
        calibration: Noisy copies of the validation split by which the constants of a cdm's levels are set at the end,
            where that lowers the cross-entropy (:mod:`torchcdm.training.finish`); 0 leaves them as they are.
        log_every: Steps between lines of metrics.jsonl.
        save_every: Steps between states that a resumed run starts from.
        sample_every: Steps between grids of samples; None for one at the end.
        init: A run whose weights are the start, where they fit.
    """

    steps: Count = 10_000
    max_seconds: Positive | None = None
    batch_size: Count = 128
    seed: Seed = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[Positive, Le(1e3)] = 1e-3
    betas: validation.RatePair = (0.9, 0.99)
    weight_decay: NotNegative = 0.01
    warmup: CountOrZero = 100
    decay: Literal["cosine", "constant", "step"] = "cosine"
    decay_every: Count = 200_000
    decay_factor: Annotated[Positive, Le(1)] = 0.1
    grad_clip: Positive | None = 1.0
    ema_decay: Rate = 0.999
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    validate_every: Count = 500
    validation_samples: Count = 2000
    select: Literal["nll", "loss", "mse"] = "nll"
    patience: Count | None = None
    fallback: bool = True
    calibration: CountOrZero = 0
    log_every: Count = 50
    save_every: Count = 500
    sample_every: Count | None = None
    init: str | None = None


@validated
class SamplingConfig:
    """The samples that a run draws of itself.

    Attributes:
        n: Number of samples; none are drawn where it is 0. None: up to 64, which take a small share of the time.
        sampler: Name of the sampler; that of :func:`torchcdm.sample` when None, and so the others.
        steps: Levels visited.
        guidance: Weight of the class, for models that saw classes.
    """

    n: CountOrZero | None = 64
    sampler: str | None = None
    steps: Count | None = None
    guidance: Float = 0.0


@validated
class ReportConfig:
    """What is measured on the test split when training ends.

    Attributes:
        methods: Likelihoods, see :func:`torchcdm.likelihood.report`; of a ddm those that it has, elbo and flow.
        limit: At most so many test samples. None: up to 500, whose flow takes a small share of the time of training.
        draws: Noise draws of the one-pass likelihoods.
        flow_steps: Heun steps of the probability flow. More than in :class:`Scoring`: every level of the demo.
        sweeps: Sweeps of the replica exchange that estimates log Z.
        baselines: Put classical density models beside it, where the data are small.
    """

    methods: tuple[Method, ...] = ("single", "flow")
    limit: Count | None = 500
    draws: Count = Scoring.draws
    flow_steps: Count = 50
    sweeps: Sweeps = SWEEPS
    baselines: bool = False


@validated
class Config:
    """All settings of a run; ``config.yaml`` in its folder.

    Attributes:
        preset: Name of the preset that it started from.
        data: What to train on.
        model: What is trained.
        loss: The loss; a ddm reads ``label_dropout`` alone.
        train: How it is trained.
        sampling: The samples that it draws of itself.
        report: What is measured at the end.
    """

    preset: str | None = None
    data: DataOptions = DataOptions()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    report: ReportConfig = ReportConfig()
