"""DDPM checkpoints of diffusers (``UNet2DModel``, such as google/ddpm-cifar10-32): the paper's DDM, trained by others.

The two networks are the same function, but for names, attention as matrices or 1x1 convolutions, and the level: index
i in diffusers is our level t = i + 1. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchcdm.bridges.official import renamed
from torchcdm.diffusion.schedules import LinearSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.networks.blocks import halved_sizes, time_embedding
from torchcdm.networks.unet import DDMUNet
from torchcdm.runtime.artefact import read_json, unpacked
from torchcdm.runtime.reading import read_bytes
from torchcdm.runtime.validation import Rate, Width, WidthPair, Widths, read_as, shown, validated
from torchcdm.units import DataTransform

WEIGHTS, NETWORK, SCHEDULER = "diffusion_pytorch_model.safetensors", "config.json", "scheduler_config.json"

DOWN = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
"""Blocks on the way down, and theirs on the way up."""

FIXED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "norm_eps": (1e-6, 1e-5),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
"""Options that only one value of fits :class:`DDMUNet`, and what diffusers takes where they are left out."""

FIXED_SCHEDULER: dict[str, tuple[Any, Any]] = {
    "beta_schedule": ("linear", "linear"),
    "num_train_timesteps": (1000, 1000),
    "prediction_type": ("epsilon", "epsilon"),
    "trained_betas": (None, None),
}

PARTS = {"resnets": "block", "attentions": "attention", "time_emb_proj": "project", "conv_shortcut": "shortcut",
         "group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out": "out",
         "proj_attn": "out"}  # fmt: skip
"""Parts of names that differ; ``proj_attn`` is that of old files."""

NAMES = {
    r"conv_in\.(\w+)": r"unet.conv_in.\1",
    r"conv_norm_out\.(\w+)": r"unet.norm_out.\1",
    r"conv_out\.(\w+)": r"conv_out.\1",
    r"time_embedding\.linear_1\.(\w+)": r"embed.0.\1",
    r"time_embedding\.linear_2\.(\w+)": r"embed.2.\1",
    r"(mid)_block\.(resnets|attentions)\.(\d+)\.(.+)": r"unet.middle.\3.\2.\4",
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)": r"unet.\1_stages.\2.\4.\3.\5",
    r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(\w+)": r"unet.\1s.\2.conv.\3",
}
"""Names of weights in diffusers, and ours."""


@validated
class UNetOptions:
    """Options of a ``UNet2DModel`` that become arguments of :class:`DDMUNet`; those with a default may be left out."""

    sample_size: Width | WidthPair
    in_channels: Width
    out_channels: Width
    block_out_channels: Widths
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: Width
    dropout: Rate = 0.0
    norm_num_groups: Width = 32


def load_diffusers(folder: str | Path) -> DenoisingDiffusion:
    """A DDPM of diffusers as a denoiser on 8-bit images, in eval mode on the CPU.

    Args:
        folder: Holds ``config.json`` and ``diffusion_pytorch_model.safetensors`` of the network;
            ``scheduler_config.json`` is read where it is there, else the schedule is the linear one of DDPM. A
            saved pipeline has them in ``unet`` and ``scheduler``.

    Raises:
        UserError: A missing or damaged file, or another architecture, schedule or target of the prediction.
    """
    folder = Path(folder)
    pipeline = (folder / "unet").is_dir()
    network, timing = (folder / "unet", folder / "scheduler" / SCHEDULER) if pipeline else (folder, folder / SCHEDULER)
    config, state = read_json(network / NETWORK), unpacked(read_bytes(network / WEIGHTS), network / WEIGHTS)
    scheduler = read_json(timing) if timing.exists() else {}
    try:
        _check(scheduler, FIXED_SCHEDULER)
        schedule = LinearSchedule(1000, scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02))
    except UserError as error:
        raise UserError(f"{timing}: {error}") from None
    try:
        backbone = convert_unet(config, state)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    shape = (backbone.conv_out.out_channels, *halved_sizes(config["sample_size"], 1)[0])
    transform = DataTransform.images(shape, dequantize=False)
    return DenoisingDiffusion(backbone, schedule, transform).eval()


def convert_unet(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> DDMUNet:
    """The network of a ``UNet2DModel`` from its configuration and its weights.

    Raises:
        UserError: An option that :class:`DDMUNet` does not have, or weights that are not those of the configuration.
    """
    _check(config, FIXED)
    names = UNetOptions.__dataclass_fields__
    options = read_as(UNetOptions, {key: config[key] for key in names if config.get(key) is not None})
    size, widths, down = options.sample_size, options.block_out_channels, options.down_block_types
    ((height, width),) = halved_sizes(size, 1)
    channels = widths[0]
    if options.in_channels != options.out_channels or any(other % channels for other in widths):
        raise UserError("a network of as many channels out as in, whose widths are multiples of the first, is needed")
    if len(down) != len(widths) or tuple(DOWN.get(kind) for kind in reversed(down)) != options.up_block_types:
        raise UserError(f"blocks {', '.join(down)} with {', '.join(options.up_block_types)} are not those of a DDPM")
    network = DDMUNet(
        options.in_channels, (height, width), channels, [other // channels for other in widths],
        options.layers_per_block, [max(height, width) >> i for i, kind in enumerate(down) if "Attn" in kind],
        options.dropout, groups=options.norm_num_groups,
    )  # fmt: skip
    # The output of the attention is the first of a list there.
    names = {key: renamed(key.replace(".to_out.0.", ".to_out."), NAMES, PARTS) for key in state}
    converted = {names[key]: _as_convolution(key, value) for key, value in state.items()}
    try:
        network.load_state_dict(converted)
    except RuntimeError as error:
        raise UserError(f"the weights are not those of the configuration ({' '.join(str(error).split())})") from None
    _count_from_one(network)
    return network


def _count_from_one(network: DDMUNet) -> None:
    """Weights that see the level t where they have seen the index t - 1.

    sin(w (t-1)) and cos(w (t-1)) are a rotation of sin(w t) and cos(w t) by w.
    """
    first = network.embed[0]
    one = time_embedding(torch.ones(1), network.channels, torch.float64)[0]
    sin, cos = one[: len(one) // 2], one[len(one) // 2 : 2 * (len(one) // 2)]
    weight = first.weight.detach().double()
    of_sin, of_cos = weight[:, : len(sin)], weight[:, len(sin) : 2 * len(sin)]
    turned = torch.cat([of_sin * cos + of_cos * sin, of_cos * cos - of_sin * sin, weight[:, 2 * len(sin) :]], 1)
    with torch.no_grad():
        first.weight.copy_(turned)


def _as_convolution(key: str, value: Tensor) -> Tensor:
    """Matrices of the attention as 1x1 convolutions."""
    return value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value


def _check(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuses options that have no counterpart here."""
    for key, (needed, default) in fixed.items():
        if config.get(key, default) != needed:
            raise UserError(f"{key} is {shown(config.get(key, default))}; only {needed!r} has a counterpart here")
