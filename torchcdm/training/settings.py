"""Settings of a run: what presets, YAML files and flags may set; those of parts are derived from constructors."""

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
    """What is trained."""

    kind: Literal["cdm", "ddm"] = "cdm"  #: ``cdm``, or ``ddm``: the plain denoising diffusion baseline.
    #: ``none``; ``input``: the class is an input of the network, as in the paper; ``joint``: all classes from one pass
    #: (identity 10).
    labels: Literal["none", "input", "joint"] = "none"
    #: Logits are a correction to a fitted Gaussian. This and the next three are chosen by the likelihood of validation
    #: data where they are left out.
    gaussian: bool | None = None
    #: Number of Gaussians in the base density; above 1 for images in the form ``cosine``.
    components: validation.Width | None = None
    #: Share by which each covariance is moved towards a round one; for few samples of many numbers.
    shrinkage: validation.Share | None = None
    #: Form of the covariances: ``full``; ``cosine``, one variance for each cosine of an image; ``diagonal``.
    form: Literal["full", "cosine", "diagonal"] | None = None
    #: For joint labels, a base Gaussian for each class, or its own weights of the ``components``.
    class_gaussians: bool = False
    backbone: validation.named(*BACKBONES.values()) = BACKBONES["encoder"]()  #: The network.
    #: The noise levels.
    schedule: validation.named(*SCHEDULE_SETTINGS.values()) = SCHEDULE_SETTINGS["uniform-sigma"]()

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
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
    """How it is trained."""

    steps: Count = 10_000  #: Optimiser steps.
    #: End after so much time even so, that before a resume included; the cosine is then zero at whichever end comes
    #: first.
    max_seconds: Positive | None = None
    batch_size: Count = 128  #: Samples a step, all processes together.
    seed: Seed = 0  #: Everything random in step k is a function of this and k.
    #: ``adamw``, or ``muon``: Muon for the hidden layers, AdamW for the rest.
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[Positive, Le(1e3)] = 1e-3  #: Peak learning rate.
    betas: validation.RatePair = (0.9, 0.99)  #: The two decay rates of Adam.
    weight_decay: NotNegative = 0.01  #: Weight decay of AdamW and Muon.
    warmup: CountOrZero = 100  #: Steps of linear warm-up.
    #: ``cosine`` to zero at the last step, ``constant``, or ``step``.
    decay: Literal["cosine", "constant", "step"] = "cosine"
    decay_every: Count = 200_000  #: Of ``step``: the steps after which the rate falls.
    decay_factor: Annotated[Positive, Le(1)] = 0.1  #: What it is multiplied by.
    grad_clip: Positive | None = 1.0  #: Largest norm of the gradient; None for no limit.
    ema_decay: Rate = 0.999  #: Decay of the averaged weights, reached by a ramp.
    precision: Literal["fp32", "bf16"] = "fp32"  #: ``fp32`` or ``bf16``.
    compile: bool = False  #: Compile the loss with torch.compile.
    validate_every: Count = 500  #: Steps between validations of the averaged weights.
    validation_samples: Count = 2000  #: At most so many validation samples.
    #: Validation value that names the best model: ``nll``, ``loss`` or ``mse``; a ddm has ``mse`` alone.
    select: Literal["nll", "loss", "mse"] = "nll"
    patience: Count | None = None  #: Stop after so many validations without a new best; None never stops early.
    #: Keep what the training began with as the model where the trained one is worse on validation data.
    fallback: bool = True
    #: Noisy copies of the validation split by which the constants of a cdm's levels are set at the end, where that
    #: lowers the cross-entropy (:mod:`torchcdm.training.finish`); 0 leaves them as they are.
    calibration: CountOrZero = 0
    log_every: Count = 50  #: Steps between lines of metrics.jsonl.
    save_every: Count = 500  #: Steps between states that a resumed run starts from.
    sample_every: Count | None = None  #: Steps between grids of samples; None for one at the end.
    init: str | None = None  #: A run whose weights are the start, where they fit.


@validated
class SamplingConfig:
    """The samples that a run draws of itself."""

    #: Number of samples; none are drawn where it is 0. None: up to 64, which take a small share of the time.
    n: CountOrZero | None = 64
    sampler: str | None = None  #: Name of the sampler; that of :func:`torchcdm.sample` when None, and so the others.
    steps: Count | None = None  #: Levels visited.
    guidance: Float = 0.0  #: Weight of the class, for models that saw classes.


@validated
class ReportConfig:
    """What is measured on the test split when training ends."""

    #: Likelihoods, see :func:`torchcdm.likelihood.report`; of a ddm those that it has, elbo and flow.
    methods: tuple[Method, ...] = ("single", "flow")
    #: At most so many test samples. None: up to 500, whose flow takes a small share of the time of training.
    limit: Count | None = 500
    draws: Count = Scoring.draws  #: Noise draws of the one-pass likelihoods.
    #: Heun steps of the probability flow. More than in :class:`Scoring`: every level of the demo.
    flow_steps: Count = 50
    sweeps: Sweeps = SWEEPS  #: Sweeps of the replica exchange that estimates log Z.
    baselines: bool = False  #: Put classical density models beside it, where the data are small.


@validated
class Config:
    """All settings of a run; ``config.yaml`` in its folder."""

    preset: str | None = None  #: Name of the preset that it started from.
    data: DataOptions = DataOptions()  #: What to train on.
    model: ModelConfig = ModelConfig()  #: What is trained.
    loss: LossConfig = LossConfig()  #: The loss; a ddm reads ``label_dropout`` alone.
    train: TrainConfig = TrainConfig()  #: How it is trained.
    sampling: SamplingConfig = SamplingConfig()  #: The samples that it draws of itself.
    report: ReportConfig = ReportConfig()  #: What is measured at the end.
