"""What a step costs: denoising, training, guidance and one-pass likelihood, each against a plain diffusion model.

    python -m studies.benchmarks.step_cost --threads 1 --json step_cost.json

Two networks, each with its own baseline (DDM: the U-Net that is told the level and estimates the noise):

encoder
    The default: the preset ``fashion-mnist``; guidance from joint logits, one pass. DDM: the U-Net of the same width
    and multipliers.
paper
    The preset ``cifar10``; guidance from an embedded label, two passes. DDM: the U-Net of the same setting, and
    diffusers' ``UNet2DModel`` in the layout of ddpm-cifar10-32 where diffusers is installed.

``NETWORK-twice`` is the training step of the same network with second derivatives, those of
``torchcdm.networks.blocks``, in the place of a difference of two densities; ``NETWORK-pytorch`` with PyTorch's.

All contenders of a network take turns in one process: a machine that slows down slows all of them. The numbers are
medians over the rounds and ratios of medians. Rows are named ``network/step``; those of the default network also
stand by the name of the step alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from torchcdm import losses
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.losses import CDMLoss, DDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser, DenoisingDiffusion, GuidedDenoiser, evaluation_mode
from torchcdm.networks.blocks import SiLU
from torchcdm.runtime.processes import memory_kept
from torchcdm.training.build import build_loss, build_model, build_schedule, plain_model
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.optimizers import build_optimizer
from torchcdm.training.settings import Config, TrainConfig
from torchcdm.units import DataTransform

DEFAULT = "encoder"
BATCHES = {"encoder": 64, "paper": 4}
CLASSES = 10
GUIDANCE = 1.0

Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One row.

    Attributes:
        name: ``network/step``.
        run: Does the step once.
        ddm: Name of the DDM's row that this one is divided by.
        others: Further rows to divide by, under keys of their own.
    """

    name: str
    run: Step
    ddm: str
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mode:
    """How training steps run; the DDM's too.

    Attributes:
        compiled: Under torch.compile.
        half: Convolutions and matrix products in bfloat16, as ``cdm train --precision bf16``.
        optimizer: As ``train.optimizer``.
    """

    compiled: bool = False
    half: bool = False
    optimizer: str = "adamw"


# --- the steps -----------------------------------------------------------------------------------------------------


def denoising_step(model: Denoiser, x: Tensor, y: Tensor | None = None) -> Step:
    """What a sampler asks for at each step."""
    level = model.schedule.T // 2

    def run() -> Tensor:
        with evaluation_mode(model), torch.no_grad():
            return model.denoise(x, level, y).eps

    return run


def guided_step(model: Denoiser, x: Tensor, y: Tensor) -> Step:
    """A denoising step under classifier-free guidance."""
    return denoising_step(GuidedDenoiser(model, GUIDANCE), x, y)


def training_step(loss: CDMLoss | DDMLoss, x: Tensor, mode: Mode, y: Tensor | None = None) -> Step:
    """Loss, gradients and optimiser, as in the trainer; levels and noise are drawn anew."""
    optimizer = build_optimizer(TrainConfig(optimizer=mode.optimizer, lr=1e-5), loss.model)
    module: nn.Module = torch.compile(loss, fullgraph=True) if mode.compiled else loss

    def run() -> None:
        loss.model.train()
        t = loss.draw_levels(len(x))
        with torch.autocast(x.device.type, torch.bfloat16, mode.half, cache_enabled=False):
            terms = module(x, y, t, torch.randn_like(x))
        terms["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def differentiated_twice(step: Step) -> Step:
    """The same with second derivatives."""

    def run() -> Any:
        with patch.object(losses, "differences_suffice", lambda x: False):
            return step()

    return run


def with_pytorch_layers(step: Step) -> Step:
    """The same with second derivatives, none of them by hand."""

    def run() -> Any:
        with patch.object(SiLU, "forward", nn.SiLU.forward):
            return differentiated_twice(step)()

    return run


def one_pass_likelihood(model: ClassificationDiffusion, x: Tensor) -> Step:
    """log p of a batch. A DDM has none in one pass: the row is divided by one evaluation of its network."""

    def run() -> Tensor:
        with evaluation_mode(model), torch.no_grad():
            return model.log_prob(x, units="model")

    return run


# --- the contenders ------------------------------------------------------------------------------------------------


def contenders(network: str, batch: int, mode: Mode) -> list[Contender]:
    """All rows of a network."""
    torch.manual_seed(0)
    make = {"encoder": _encoder_models, "paper": _paper_models}[network]
    return make(batch, mode)


def _encoder_models(batch: int, mode: Mode) -> list[Contender]:
    config, shape = make_config(preset_fields("fashion-mnist")), (1, 28, 28)
    mode = replace(mode, optimizer=config.train.optimizer)
    joint = replace(config, model=replace(config.model, labels="joint"))
    ddm = replace(config, model=replace(plain_model(config.model), gaussian=False))
    x, y = torch.randn(batch, *shape), torch.arange(batch) % CLASSES
    rows = _rows("encoder", config, joint, x, y, mode, baseline="encoder-ddm")
    rows += _rows("encoder-ddm", ddm, _labelled(ddm), x, y, mode, baseline="encoder-ddm")
    # The guided step's own network without guidance: what guidance adds to a step.
    model = untrained(joint, shape)
    rows.append(Contender("encoder/joint-unguided-step", denoising_step(model, x, y), "encoder-ddm/denoising-step"))
    return rows


def _paper_models(batch: int, mode: Mode) -> list[Contender]:
    config, shape = make_config(preset_fields("cifar10")), (3, 32, 32)
    mode = replace(mode, optimizer=config.train.optimizer)
    ddm = replace(config, model=replace(config.model, kind="ddm"))
    x, y = torch.randn(batch, *shape), torch.arange(batch) % CLASSES
    diffusers = _diffusers_unet()
    rival = None if diffusers is None else "paper-diffusers"
    rows = _rows("paper", config, _labelled(config), x, y, mode, "paper-ddm", rival)
    rows += _rows("paper-ddm", ddm, _labelled(ddm), x, y, mode, "paper-ddm", rival)
    if diffusers is not None:
        model = DenoisingDiffusion(diffusers, build_schedule(config.model.schedule), DataTransform(shape))
        loss = DDMLoss(model)
        rows += [
            Contender("paper-diffusers/denoising-step", denoising_step(model, x), "paper-ddm/denoising-step"),
            Contender("paper-diffusers/training-step", training_step(loss, x, mode), "paper-ddm/training-step"),
        ]
    return rows


def _rows(
    name: str,
    config: Config,
    labelled: Config,
    x: Tensor,
    y: Tensor,
    mode: Mode,
    baseline: str,
    rival: str | None = None,
) -> list[Contender]:
    """The steps of one model.

    Args:
        name: Of the model.
        config: The model without classes.
        labelled: The one that is guided.
        x: Inputs, model units.
        y: Classes.
        mode: Of the training steps.
        baseline: Name of its DDM.
        rival: Another DDM to divide by.
    """
    shape = tuple(x.shape[1:])
    model, guided = untrained(config, shape), untrained(labelled, shape)

    def row(step: str, run: Step) -> Contender:
        others = {"ratio_to_diffusers": f"{rival}/{step}"} if rival else {}
        return Contender(f"{name}/{step}", run, f"{baseline}/{step}", others)

    train = training_step(build_loss(config.loss, model), x, mode)
    rows = [
        row("denoising-step", denoising_step(model, x)),
        row("training-step", train),
        Contender(f"{name}/guided-step", guided_step(guided, x, y), f"{baseline}/guided-step"),
    ]
    if isinstance(model, ClassificationDiffusion):
        if config.loss.logits_from[0]:  # the squared error alone until then
            alone = build_loss(config.loss, model)
            alone.advance(0.0)
            run = training_step(alone, x, mode)
            rows.append(Contender(f"{name}/squared-error-step", run, f"{baseline}/training-step"))
        for suffix, step in (("twice", differentiated_twice(train)), ("pytorch", with_pytorch_layers(train))):
            rows.append(Contender(f"{name}-{suffix}/training-step", step, f"{baseline}/training-step"))
        run = one_pass_likelihood(model, x)
        rows.append(Contender(f"{name}/one-pass-likelihood", run, f"{baseline}/denoising-step"))
    return rows


def _labelled(config: Config) -> Config:
    """The same with the class as an input of the network."""
    return replace(config, model=replace(config.model, labels="input"))


def untrained(config: Config, shape: tuple[int, ...], classes: int = CLASSES) -> Denoiser:
    """An untrained model, its Gaussian that of noise: neither has any influence on the cost."""
    schedule: NoiseSchedule = build_schedule(config.model.schedule)
    gaussian = GaussianMarginals.fit(torch.randn(500, *shape), schedule, 1e-3) if config.model.gaussian else None
    return build_model(config.model, DataTransform(shape), classes, gaussian)


def _diffusers_unet() -> nn.Module | None:
    """The DDM of the published comparison, 35 746 307 parameters; None where diffusers is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None

    class Adapter(nn.Module):
        joint, classes = False, None

        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel(
                sample_size=32,
                block_out_channels=(128, 256, 256, 256),
                down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=None,
                downsample_padding=0,
                flip_sin_to_cos=False,
                freq_shift=1,
                norm_eps=1e-6,
                dropout=0.1,
            )

        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            return self.unet(x, t).sample

    return Adapter()


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(rows: Sequence[Contender], rounds: int, say: Callable[[str], None]) -> dict[str, float]:
    """Median seconds of each row; the rows take turns, after one turn to warm up. Memory is kept as in a training."""
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    with memory_kept():
        for number in range(rounds + 1):
            for row in rows:
                began = time.perf_counter()
                row.run()
                if number:
                    times[row.name].append(time.perf_counter() - began)
            say(f"round {number} of {rounds}" if number else "warmed up")
    return {name: statistics.median(values) for name, values in times.items()}


def table(rows: Sequence[Contender], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the report."""
    report = []
    for row in rows:
        took = seconds[row.name]
        line = {"name": row.name, "seconds": took, "ratio_to_ddm": took / seconds[row.ddm]}
        report.append(line | {key: took / seconds[other] for key, other in row.others.items()})
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["all", *BATCHES], default="all")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each row")
    parser.add_argument("--batch", type=int, help=f"samples a step; by network when left out: {BATCHES}")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--compile", action="store_true", help="training steps under torch.compile, the DDM's too")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                        help="of the training steps, the DDM's too")  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    for name in ("rounds", "batch", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; at least 1 is needed")
    if options.threads:
        torch.set_num_threads(options.threads)

    report: list[dict[str, Any]] = []
    for network in BATCHES if options.network == "all" else [options.network]:
        batch = options.batch or BATCHES[network]
        print(f"{network}: batch {batch}, {torch.get_num_threads()} thread(s), torch {torch.__version__}", flush=True)
        rows = contenders(network, batch, Mode(options.compile, options.precision == "bf16"))
        lines = table(rows, measure(rows, options.rounds, lambda text: print(f"  {text}", flush=True)))
        for line in lines:
            ratios = "".join(f"{value:9.2f} x {key[9:]}" for key, value in line.items() if key.startswith("ratio_to_"))
            print(f"  {line['name']:34}{1e3 * line['seconds']:10.1f} ms{ratios}", flush=True)
        if network == DEFAULT:
            own = [line for line in lines if line["name"].startswith(f"{DEFAULT}/")]
            report += [line | {"name": line["name"].removeprefix(f"{DEFAULT}/")} for line in own]
        report += lines
    if options.json:
        options.json.write_text(json.dumps({"rows": report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
