"""Checkpoints of the published code (github.com/shaharYadin/CDM) as weights of :class:`CDMUNet`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchcdm.data.reading import reading
from torchcdm.errors import UserError
from torchcdm.networks.unet import CDMUNet

EMA_KEY = "ema_model_state_dict"

PARTS = {"block_1": "0.block", "block_2": "1.block", "attn_1": "0.attention", "attn": "attention",
         "temb_proj": "project", "nin_shortcut": "shortcut", "q": "query", "k": "key", "v": "value",
         "proj_out": "out"}  # fmt: skip
"""Parts of names that differ."""

NAMES = {
    r"(conv_in|norm_out)\.(\w+)": r"unet.\1.\2",
    r"conv_out\.(\w+)": r"conv_out.\1",
    r"linear_layer\.(\w+)": r"head.linear.\1",
    r"label_emb\.(\w+)": r"label.\1",
    r"temb\.dense\.0\.(\w+)": r"embed.0.\1",
    r"temb\.dense\.1\.(\w+)": r"embed.2.\1",
    r"mid\.(block_1|block_2|attn_1)\.(.+)": r"unet.middle.\1.\2",
    r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(.+)": r"unet.\1_stages.\2.\4.\3.\5",
    r"(down|up)\.(\d+)\.(?:down|up)sample\.conv\.(\w+)": r"unet.\1s.\2.conv.\3",
}
"""Names of weights there, and ours."""

MEND = "; give a checkpoint saved by the published CDM code"


def load_official(path: str | Path, backbone: CDMUNet) -> None:
    """Copies the averaged (EMA) weights of a published checkpoint into ``backbone``.

    The file, a ``.pt``, stores no configuration: ``backbone`` must have been built with that of the training. Names
    may begin with ``module.``; conditional weights are included.

    Raises:
        UserError: Not such a file, or one of another architecture; names the options that differ.
    """
    with reading(Path(path), "weights", MEND) as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports a foreign file by many exceptions, over many lines.
            raise UserError(f"{path}: torch cannot read it as weights ({type(error).__name__}){MEND}") from error
    averaged = content.get(EMA_KEY) if isinstance(content, Mapping) else None
    if not isinstance(averaged, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in averaged.items()
    ):
        raise UserError(f"{path}: no weights '{EMA_KEY}' in it{MEND}")
    averaged = {key.removeprefix("module."): value for key, value in averaged.items()}
    # Their way up counts from full resolution, ours from the coarsest.
    up = re.compile(r"(?<=^up\.)\d{1,3}(?=\.)", re.ASCII)
    last = max((int(m[0]) for m in map(up.search, averaged) if m), default=0)
    try:
        state = {
            renamed(up.sub(lambda stage: str(last - int(stage[0])), key), NAMES, PARTS): value
            for key, value in averaged.items()
        }
        _check_fit(state, backbone)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    backbone.load_state_dict(state)


def _check_fit(state: Mapping[str, Tensor], backbone: CDMUNet) -> None:
    """Refuses converted weights that are not those of ``backbone``, naming the options that differ."""
    target = backbone.state_dict()
    size = max(backbone.unet.size)
    found, told = _architecture(state, size), _architecture(target, size)
    differing = [key for key in told if found[key] != told[key]]
    if differing:
        raise UserError(
            "; ".join(f"{key} is {found[key]} in the file, {told[key]} in the configuration" for key in differing)
        )
    for key in [*target, *state]:
        shapes = [tuple(s[key].shape) if key in s else "missing" for s in (state, target)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{key} is {shapes[0]} in the file, {shapes[1]} in the configuration")


def _architecture(state: Mapping[str, Tensor], size: int) -> dict[str, object]:
    """The options of :class:`CDMUNet` that show in its weights; ``size`` is the longer side of the images."""
    for key, ndim in (("unet.conv_in.weight", 4), ("conv_out.weight", 4), ("head.linear.weight", 2)):
        if key not in state:
            raise UserError(f"the weight {key} is missing; only unconditional and label-conditional CDMs convert")
        if state[key].ndim != ndim or 0 in state[key].shape:
            raise UserError(f"the weight {key} has shape {tuple(state[key].shape)}; {ndim} positive sizes are needed")
    state = {key: value for key, value in state.items() if value.ndim}
    channels, in_channels = state["unet.conv_in.weight"].shape[:2]
    firsts = [re.fullmatch(r"unet\.down_stages\.(\d{1,3})\.0\.block\.conv2\.weight", key) for key in state]
    widths = {int(m[1]): len(state[m[0]]) for m in firsts if m}
    steps = [re.fullmatch(r"unet\.down_stages\.0\.(\d+)\.block\.conv2\.weight", key) for key in state]
    attended = [re.match(r"unet\.down_stages\.(\d{1,2})\.0\.attention\.", key) for key in state]
    return {
        "in_channels": in_channels,
        "channels": channels,
        "multipliers": tuple(widths[i] // channels for i in sorted(widths)),
        "blocks": sum(m is not None for m in steps),
        "attention": tuple(sorted({size >> int(m[1]) for m in attended if m}, reverse=True)),
        "classes": len(state["label.weight"]) - 1 if "label.weight" in state else None,
        "head_channels": len(state["conv_out.weight"]),
        "levels": len(state["head.linear.weight"]),
    }


def renamed(key: str, names: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """The name that a weight called ``key`` elsewhere has here, by patterns of whole ``names``, the first that fits.

    Then ``parts`` between two dots are replaced. UserError for a name that no pattern fits.
    """
    for pattern, ours in names.items():
        if match := re.fullmatch(pattern, key, re.ASCII):
            return ".".join(parts.get(part, part) for part in match.expand(ours).split("."))
    raise UserError(f"'{key}' is no weight of the published network")
