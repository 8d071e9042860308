"""Checkpoints of the published code (github.com/shaharYadin/CDM) as weights of :class:`CDMUNet`."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.networks.unet import CDMUNet
from torchcdm.runtime.reading import reading
from torchcdm.training.checkpoint import check_shapes

PARTS = {
    "block_1": "0.block", "block_2": "1.block", "attn_1": "0.attention", "attn": "attention", "q": "query", "k": "key",
    "v": "value", "proj_out": "out", "temb_proj": "project", "nin_shortcut": "shortcut",
}  # fmt: skip
"""Parts of names that differ."""
NAMES = {
    r"(conv_in|norm_out)\.(\w+)": r"unet.\1.\2", r"conv_out\.(\w+)": r"conv_out.\1",
    r"linear_layer\.(\w+)": r"head.linear.\1", r"label_emb\.(\w+)": r"label.\1",
    r"temb\.dense\.0\.(\w+)": r"embed.0.\1", r"temb\.dense\.1\.(\w+)": r"embed.2.\1",
    r"mid\.(block_1|block_2|attn_1)\.(.+)": r"unet.middle.\1.\2",
    r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(.+)": r"unet.\1_stages.\2.\4.\3.\5",
    r"(down|up)\.(\d+)\.(?:down|up)sample\.conv\.(\w+)": r"unet.\1s.\2.conv.\3",
}  # fmt: skip
"""Names of weights there, and ours."""

MEND = "; give a checkpoint saved by the published CDM code"


def load_official(path: str | Path, backbone: CDMUNet) -> None:
    """Copies the averaged (EMA) weights of a published checkpoint into ``backbone``.

    The file, a ``.pt``, stores no configuration: ``backbone`` must have been built with that of the training. Names
    may begin with ``module.``; conditional weights are included. UserError names the first weight that differs.
    """
    with reading(Path(path), "weights", MEND) as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports a foreign file by many exceptions, over many lines.
            raise ValueError(f"torch reports a {type(error).__name__}") from error
    averaged = content.get("ema_model_state_dict") if isinstance(content, Mapping) else None
    pairs = averaged.items() if isinstance(averaged, Mapping) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise UserError(f"{path}: no weights 'ema_model_state_dict' in it{MEND}")
    averaged = {key.removeprefix("module."): value for key, value in averaged.items()}
    # Their way up counts from full resolution, ours from the coarsest.
    up = re.compile(r"(?<=^up\.)\d{1,3}(?=\.)", re.ASCII)
    last = max((int(m[0]) for m in map(up.search, averaged) if m), default=0)
    turned = {up.sub(lambda stage: str(last - int(stage[0])), key): value for key, value in averaged.items()}
    try:
        state = {renamed(key, NAMES, PARTS): value for key, value in turned.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    told = "channels, multipliers, blocks, attention, head_channels, classes, schedule.T: give its training's"
    check_shapes(backbone.state_dict(), state, Path(path), told)
    backbone.load_state_dict(state)


def renamed(key: str, names: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """The name that a weight called ``key`` elsewhere has here, by patterns of whole ``names``, the first that fits.
    Then ``parts`` between two dots are replaced. UserError for a name that no pattern fits."""
    for pattern, ours in names.items():
        if match := re.fullmatch(pattern, key, re.ASCII):
            return ".".join(parts.get(part, part) for part in match.expand(ours).split("."))
    raise UserError(f"'{key}' is no weight of the published network")
