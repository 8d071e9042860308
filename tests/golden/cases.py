"""The numbers of the whole method on small models with weights by formula: what a change of the code must leave alone.

``python -m tests.golden.cases`` writes ``values.safetensors`` anew, which only a change that is meant to move numbers
may do. Weights come from a formula, so that no order of random draws in a constructor is part of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_runs import small_config
from torch import Tensor, nn

from torchcdm.apps.anomaly import AnomalyDetector
from torchcdm.apps.denoising import estimate_noise, nearest_level
from torchcdm.apps.ratio import DensityRatio
from torchcdm.compose import sample
from torchcdm.diffusion.gaussian import GaussianMarginals, fit_class_gaussians
from torchcdm.diffusion.mixture import MixtureMarginals
from torchcdm.diffusion.schedules import LinearSchedule, LogSNRSchedule, UniformSigmaSchedule
from torchcdm.likelihood import (
    FlowSolver,
    Scoring,
    elbo,
    log_normalizer,
    probability_flow,
    report,
    single_pass,
)
from torchcdm.losses import CDMLoss, DDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser, DenoisingDiffusion, GuidedDenoiser, working_dtype
from torchcdm.networks.encoder import Encoder
from torchcdm.networks.mlp import DDMMLP, MLP
from torchcdm.networks.unet import CDMUNet, DDMUNet
from torchcdm.samplers import DDIM
from torchcdm.training.checkpoint import load
from torchcdm.training.evaluation import level_sums
from torchcdm.training.finish import calibrate_levels
from torchcdm.training.loop import train
from torchcdm.training.optimizers import build_optimizer
from torchcdm.training.settings import TrainConfig
from torchcdm.units import DataTransform, GaussianizedTransform

VALUES = Path(__file__).with_name("values.safetensors")

Case = Callable[[], dict[str, Tensor]]


def with_weights(model: nn.Module) -> nn.Module:
    """Every parameter a wave of its own, of the size of common initialisations."""
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            wave = torch.sin(1.0 + 0.7 * k + 0.37 * torch.arange(parameter.numel(), dtype=torch.float64) ** 1.3)
            fan_in = max(1, parameter.numel() // max(1, len(parameter))) if parameter.ndim > 1 else 1
            size = fan_in**-0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_((size * wave).reshape(parameter.shape) + (parameter.ndim == 1))
    return model.eval()


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grey(n: int, channels: int = 1, side: int = 8, seed: int = 1) -> Tensor:
    """Grey levels 0 ... 16 that hang together, (n, channels, side, side)."""
    field = draws(n, channels, side, side, seed=seed)
    smooth = field + field.roll(1, -1) + field.roll(1, -2)
    return (8 + 3 * smooth).round().clamp(0, 16)


GREY = {"shift": 8.0, "scale": 4.0, "bin": 1.0, "low": 0.0, "high": 16.0}


def vector_model(context: int | None = None) -> ClassificationDiffusion:
    schedule, data = UniformSigmaSchedule(20), draws(200, 3, seed=2).double() @ torch.tensor(
        [[1.0, 0.5, 0], [0, 0.7, 0.2], [0, 0, 0.4]], dtype=torch.float64
    )
    base = GaussianMarginals.fit(data, schedule)
    net = MLP(3, levels=22, width=16, depth=2, energy_maps=4, context=context)
    return with_weights(ClassificationDiffusion(net, schedule, DataTransform((3,)), base))


def mixture_model() -> ClassificationDiffusion:
    schedule, data = LogSNRSchedule(20, 0.05, 20.0), torch.cat([draws(60, 2, seed=3), 4 + draws(40, 2, seed=4)])
    base = MixtureMarginals.fit(data.double(), schedule, 2)
    net = MLP(2, levels=22, width=16, depth=1, energy_maps=4)
    return with_weights(ClassificationDiffusion(net, schedule, DataTransform((2,)), base))


def image_model(gaussianize: bool = False, gaussian: bool = True) -> ClassificationDiffusion:
    schedule, x = UniformSigmaSchedule(12), grey(100)
    transform = DataTransform((1, 8, 8), **GREY)
    if gaussianize:
        transform = GaussianizedTransform.fit(transform, [x])
    z = transform.encode(x, torch.Generator().manual_seed(0))
    base = GaussianMarginals.fit(z, schedule, 1e-3, shrinkage=0.1) if gaussian else None
    net = Encoder(1, 8, levels=14, width=8, multipliers=(1, 2), blocks=1, energy_maps=4, positions=True,
                  pooled=(16, 32))  # fmt: skip
    return with_weights(ClassificationDiffusion(net, schedule, transform, base))


def joint_model() -> ClassificationDiffusion:
    schedule, x, y = UniformSigmaSchedule(12), grey(90), torch.arange(90) % 3
    transform = DataTransform((1, 8, 8), **GREY)
    base = fit_class_gaussians(transform.encode(x + y[:, None, None, None], torch.Generator()), y, schedule, 1e-3)
    net = Encoder(1, 8, levels=14, width=8, multipliers=(1, 2), blocks=1, energy_maps=4, classes=3, joint=True,
                  pooled=(16, 32))  # fmt: skip
    prior = torch.tensor([2.0, 1.0, 1.0])
    return with_weights(ClassificationDiffusion(net, schedule, transform, base, prior))


def paper_model() -> ClassificationDiffusion:
    net = CDMUNet(3, 8, levels=42, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), classes=3, groups=4,
                  direction="data")  # fmt: skip
    transform = DataTransform((3, 8, 8), 127.5, 127.5, 1.0, False, 0.0, 255.0)
    return with_weights(ClassificationDiffusion(net, LinearSchedule(40), transform))


def plain_model(images: bool = True) -> DenoisingDiffusion:
    schedule = UniformSigmaSchedule(12)
    if not images:
        return with_weights(DenoisingDiffusion(DDMMLP(3, width=16, depth=2), schedule, DataTransform((3,))))
    net = DDMUNet(1, 8, channels=8, multipliers=(1, 2), blocks=1, attention=(), classes=3, groups=4)
    return with_weights(DenoisingDiffusion(net, schedule, DataTransform((1, 8, 8), **GREY)))


MODELS: dict[str, tuple[Callable[[], Denoiser], bool]] = {
    "vector": (vector_model, False),
    "mixture": (mixture_model, False),
    "image": (image_model, False),
    "image-gaussianized": (lambda: image_model(True), False),
    "joint": (joint_model, True),
    "paper": (paper_model, True),
    "plain": (plain_model, True),
    "plain-vector": (lambda: plain_model(False), False),
}
"""Each with whether it has three classes."""


def inputs(model: Denoiser, n: int = 4) -> Tensor:
    """Data units."""
    return draws(n, *model.shape) if len(model.shape) == 1 else grey(n, model.shape[0], seed=7)


def of_model(name: str) -> dict[str, Tensor]:
    """Logits, densities with gradient, denoisers."""
    make, labelled = MODELS[name]
    model, values = make(), {}
    z = model.transform(inputs(model))
    label = torch.tensor([0, 1, 2, 0]) if labelled else None
    x_t = model.schedule.perturb(z, 5, draws(*z.shape, seed=5))
    for t in (1, 5, model.schedule.T, torch.tensor([1, 3, 5, 7])):
        key = t if isinstance(t, int) else "each"
        values[f"eps/{key}"] = model.denoise(x_t, t, label).eps
    if isinstance(model, ClassificationDiffusion):
        x = inputs(model).requires_grad_()
        for y in [None, label] if labelled else [None]:
            log_p = model.log_prob(x, y=y)
            values[f"log_prob/{y is None}"] = log_p
            values[f"gradient/{y is None}"] = torch.autograd.grad(log_p.sum(), x)[0]
            values[f"levels/{y is None}"] = model.log_prob_levels(x_t, y)
        if model.joint:
            values["posterior"] = model.class_posterior(x_t, 5)
            values["guided"] = GuidedDenoiser(model, 1.5).denoise(x_t, 5, label).eps
    elif labelled:
        values["guided"] = GuidedDenoiser(model, 1.5).denoise(x_t, 5, label).eps
    return values


def loss_of(model: Denoiser, **options: object) -> nn.Module:
    if not isinstance(model, ClassificationDiffusion):
        return DDMLoss(model, **{"label_dropout": 0.0} | options)
    return CDMLoss(model, **{"ce_weight": 1.0, "label_dropout": 0.0} | options)


STEPS: dict[str, tuple[str, str, dict[str, object]]] = {
    "differences": ("image", "adamw", {"ce_weight": 1.0, "time_weight": 1.0}),
    "muon": ("image", "muon", {"ce_weight": 2.0}),
    "cross-entropy": ("vector", "adamw", {"mse_weight": 0.0}),
    "squared-error": ("vector", "adamw", {"ce_weight": 0.0}),
    "joint": ("joint", "adamw", {"label_dropout": 0.3}),
    "paper": ("paper", "adamw", {"label_dropout": 0.1}),
    "second-derivatives": ("paper", "adamw", {"label_dropout": 0.1}),
    "plain": ("plain", "adamw", {"label_dropout": 0.1}),
    "plain-vector": ("plain-vector", "adamw", {}),
}


def of_step(name: str) -> dict[str, Tensor]:
    """One training step: the terms, and the weights after it."""
    which, optimizer, options = STEPS[name]
    make, labelled = MODELS[which]
    model = make().train()
    loss, generator = loss_of(model, **options), torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    n = 6
    z = model.transform(inputs(model, n))
    y = torch.arange(n) % 3 if labelled else None
    t, eps = loss.draw_levels(n, generator), draws(*z.shape, seed=8)
    if name == "second-derivatives":
        torch.set_float32_matmul_precision("high")  # what GPUs do: a difference of densities is too coarse then
    try:
        terms = loss(z, y, t, eps, generator)
    finally:
        torch.set_float32_matmul_precision("highest")
    terms["loss"].mean().backward()
    build_optimizer(TrainConfig(optimizer=optimizer, lr=1e-2), model).step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {f"term/{key}": value for key, value in terms.items()} | {"weights": weights[:: max(1, len(weights) // 64)]}


def of_samplers() -> dict[str, Tensor]:
    values = {}
    for name in ("ddpm", "ddim", "dpm2", "dpm++", "heun"):
        for which in ("vector", "image", "plain"):
            values[f"{name}/{which}"] = sample(MODELS[which][0](), 3, sampler=name, steps=5, seed=4)
    values["ddim-eta"] = sample(vector_model(), 3, sampler=DDIM(0.5), steps=5, seed=4)
    for which in ("joint", "plain", "paper"):
        y = torch.tensor([0, 1, 2])
        values[f"guided/{which}"] = sample(MODELS[which][0](), 3, "dpm++", 5, y, 1.5, seed=4, batch_size=2)
    return values


def of_likelihoods() -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for which in ("vector", "image", "image-gaussianized", "joint", "plain"):
        make, labelled = MODELS[which]
        model = make()
        x, y = inputs(model, 5), torch.arange(5) % 3 if labelled else None
        scoring = Scoring(level=2, seed=1)
        bound = elbo(model, x, y, scoring)
        values[f"{which}/elbo"] = bound.nats
        values[f"{which}/elbo-terms"] = torch.stack([bound.prior, bound.diffusion, bound.reconstruction])
        values[f"{which}/elbo-strata"] = elbo(model, x, y, scoring, evaluations=5).nats
        values[f"{which}/flow"] = probability_flow(model, x, y, scoring).nats
        solver = FlowSolver(model, Scoring(level=2, steps=6, seed=1))
        values[f"{which}/flow-x"] = solver.log_prob(model.transform(x), y).log_prob
        if isinstance(model, ClassificationDiffusion):
            values[f"{which}/published"] = single_pass(model, x, y, Scoring(0), dither=False).nats
            for level in (0, 3):
                values[f"{which}/single-{level}"] = single_pass(model, x, y, Scoring(level, draws=3, seed=1)).nats
    model = vector_model()
    gaps = probability_flow(model, inputs(model, 8), None, Scoring(level=1, seed=1)).flow.gaps()
    values["gap-by-level"] = torch.tensor([[-gap for gap in gaps["mean"]], gaps["sd"]], dtype=torch.float64)
    table = report(image_model(), grey(6), None, Scoring(draws=2, seed=1), sweeps=8).to_json()
    kept = [row for row in table["rows"] if not row["name"].endswith("-restricted")]
    values["report"] = torch.tensor([row["value"] or 0.0 for row in kept])
    return values


def of_tools() -> dict[str, Tensor]:
    """What stands on the likelihoods: noise levels, evaluation, calibrations, anomaly scores."""
    model, values = image_model(), {}
    x_t = model.schedule.perturb(model.transform(grey(4)), 4, draws(4, 1, 8, 8, seed=5))
    x_t = x_t.to(working_dtype(model, x_t.dtype))
    ratio, log_p = estimate_noise(model, x_t)
    level = nearest_level(model.schedule, ratio)
    values["noise"] = torch.stack([ratio, level.double(), log_p])
    values["denoised"] = model.denoise(model.schedule.at(level, x_t)[0] * x_t, level).x0
    sums = level_sums(model, grey(20), draws=2, seed=1)
    values["evaluation"] = torch.stack([sums["mse"], sums["ce"], sums["accuracy"]])
    for name in ("log_prob", "typicality", "coarse"):
        score = AnomalyDetector(name, model)
        score.learn(score.features(grey(30, seed=11)))
        values[f"anomaly/{name}"] = score.score(grey(5, seed=12))
    found = torch.tensor(calibrate_levels(model, grey(40, seed=13), copies=400, seed=1))
    values["constants"] = torch.cat([model.level_constants, found])
    return values


def learned(run: Path) -> dict[str, Tensor]:
    """What a run has saved, less the coarse data, which no step changes."""
    tensors = load_file(run / "model.safetensors")
    return {key: value for key, value in tensors.items() if not key.startswith("coarse.")}


def of_training() -> dict[str, Tensor]:
    """A run, and the same one stopped half way and resumed."""
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in {
            "digits": {},
            "joint": {"model__labels": "joint", "model__class_gaussians": "true"},
            "ddm": {"model__kind": "ddm", "model__backbone": "{name: unet, channels: 8, multipliers: [1, 2]}"},
            "calibrated": {"train__calibration": "500", "loss__logits_from": "[0.2, 0.4]"},
        }.items():
            out = Path(folder) / name
            config = small_config(sampling__n="0", **changes)
            train(config, out, progress=False, device="cpu")
            tensors = learned(out)
            flat = torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])
            values[name] = flat[:: max(1, len(flat) // 64)]
        model = load(Path(folder) / "digits")
        values["loaded"] = model.log_prob(torch.full((2, 1, 8, 8), 3.0))
        half = Path(folder) / "resumed"
        train(small_config(train__steps="6", sampling__n="0"), half, progress=False, device="cpu")
        train(small_config(sampling__n="0"), half, resume=True, progress=False, device="cpu")
        tensors = learned(half)
        values["resumed"] = torch.stack([tensors[key].double().sum() for key in sorted(tensors)])
    return values


def of_ratio() -> dict[str, Tensor]:
    a, b = draws(300, 2, seed=21).numpy(), 0.5 + draws(300, 2, seed=22).numpy()
    ratio = DensityRatio(random_state=0, progress=False, steps=20).fit(a, b)
    return {"log_ratio": torch.from_numpy(np.asarray(ratio.log_ratio(draws(8, 2, seed=23).numpy())))}


def of_log_z() -> dict[str, Tensor]:
    z = log_normalizer(vector_model(), scoring=Scoring(seed=2), sweeps=6, replicas=4)
    return {"estimates": torch.tensor([z.value, z.se, z.check.value]), "x": z.x[:8]}


CASES: dict[str, Case] = {
    **{f"model/{name}": (lambda name=name: of_model(name)) for name in MODELS},
    **{f"step/{name}": (lambda name=name: of_step(name)) for name in STEPS},
    "samplers": of_samplers,
    "likelihoods": of_likelihoods,
    "log-z": of_log_z,
    "tools": of_tools,
    "training": of_training,
    "ratio": of_ratio,
}


def all_values() -> Iterator[tuple[str, Tensor]]:
    for name, case in CASES.items():
        for key, value in case().items():
            yield f"{name}/{key}", value.detach().clone().contiguous()


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_file(dict(all_values()), VALUES, {"torch": torch.__version__.split("+")[0]})
    print(VALUES, VALUES.stat().st_size)
