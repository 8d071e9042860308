"""Image classifiers of the timm library as networks, where they can be differentiated twice."""

from __future__ import annotations

import difflib
from typing import Any, final

import torch
from torch import Tensor, nn

from torchcdm.backbones.blocks import ImageSize, check_images, height_and_width
from torchcdm.backbones.heads import make_head
from torchcdm.errors import UserError

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_KINKED = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "Hardtanh", "Hardshrink", "Softshrink", "Threshold",
           "HardSwish", "Hardswish", "HardSigmoid", "Hardsigmoid", "HardMish", "HardSwishMe", "HardSigmoidMe",
           "HardMishMe")  # fmt: skip


def unfit_layers(network: nn.Module) -> dict[str, str]:
    """Layers that a classification diffusion model cannot be made of: class name -> reason."""
    reasons: dict[str, str] = {}
    for layer in network.modules():
        name = type(layer).__name__
        if isinstance(layer, _BATCH_NORM):
            reasons[name] = "mixes the samples of a batch"
        elif name in _KINKED:
            reasons[name] = "has kinks, where the denoiser, its derivative, would jump"
        elif "MaxPool" in name or "CatAvgMax" in name:
            reasons[name] = "has no second derivative"
    return reasons


@final
class TimmBackbone(nn.Module):
    """The pooled features of a timm classifier under our own head.

    Vision transformers, ConvNeXt and others with smooth activations and LayerNorm or GroupNorm work; fused
    attention, which has no second derivative, is switched off in the layers of this network alone.

    Args:
        name: Model name of timm, such as ``vit_tiny_patch16_224`` or ``convnext_atto``.
        in_channels: Channels of the images.
        image_size: Side, or (height, width).
        levels: T + 2.
        classes: Number of classes; needs ``joint``, for these networks take no label.
        joint: Outputs for all classes from one pass.
        knots: Outputs at so many levels, interpolated; one for each level when None.
        **options: Passed to ``timm.create_model``: ``patch_size=4``, ``act_layer="silu"``, ``drop_rate=0.1`` ...

    Raises:
        UserError: timm is not installed, the name is unknown, or the model cannot be differentiated twice.
    """

    def __init__(
        self,
        name: str,
        in_channels: int,
        image_size: ImageSize,
        levels: int,
        classes: int | None = None,
        joint: bool = False,
        knots: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if classes is not None and not joint:
            raise UserError(f"network: timm's {name} takes no labels; set joint to true, or leave classes out")
        self.in_channels, self.size = in_channels, height_and_width(image_size)
        self.classes, self.joint = classes, joint
        self.network = _create(name, in_channels, self.size, options)
        reasons = unfit_layers(self.network)
        if reasons:
            listing = ", ".join(f"{layer} {reason}" for layer, reason in reasons.items())
            raise UserError(
                f"network: timm's {name} does not fit: {listing}; "
                "choose one with smooth activations and LayerNorm, such as vit_tiny_patch16_224 or convnext_atto"
            )
        for layer in self.network.modules():
            if getattr(layer, "fused_attn", False):
                layer.fused_attn = False
        self.head = make_head(self._probe(name), levels, classes, joint, knots)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """h, (B, T+2) or joint (B, classes, T+2), from images (B, in_channels, H, W); ``y`` is not used."""
        check_images(x, self.in_channels, self.size)
        return self.head(self.network(x))

    def _probe(self, name: str) -> int:
        """Number of features, from one image that is differentiated twice."""
        training = self.network.training
        self.network.eval()
        x = torch.linspace(-1, 1, self.in_channels * self.size[0] * self.size[1])
        x = x.reshape(1, self.in_channels, *self.size).requires_grad_()
        try:
            features = self.network(x)
            (gradient,) = torch.autograd.grad(features.square().sum(), x, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), x)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            height, width = self.size
            raise UserError(
                f"network: timm's {name} cannot be run and differentiated twice on {height}x{width} images ({reason})"
            ) from error
        self.network.train(training)
        return features.shape[1]


def _create(name: str, in_channels: int, size: tuple[int, int], options: dict[str, Any]) -> nn.Module:
    """The timm model without its classifier."""
    try:
        import timm
    except ImportError:
        raise UserError("network: timm is not installed; pip install 'torchcdm[vision]'") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise UserError(f"network: timm has no model '{name}'; {hint}")
    # Only models of a fixed input size, such as vision transformers, take the size as an argument.
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        options = {"img_size": size, **options}
    try:
        return timm.create_model(name, num_classes=0, in_chans=in_channels, **options)
    except (TypeError, AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"network: timm cannot build {name} with these options ({reason})") from error
