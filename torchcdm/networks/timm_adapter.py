"""Image classifiers of the timm library as networks, where they can be differentiated twice."""

from __future__ import annotations

import difflib
from typing import Any, final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError
from torchcdm.networks.blocks import ImageSize, check_images, height_and_width
from torchcdm.networks.heads import HeadedBackbone, make_head

_UNFIT = {
    "mixes the samples of a batch": ("nativebatchnorm", "cudnnbatchnorm", "miopenbatchnorm", "syncbatchnorm"),
    "has kinks, where the denoiser, its derivative, would jump": (
        "relu", "leakyrelu", "prelu", "rrelu", "hard", "softshrink", "threshold", "abs",
    ),
    "has kinks where another element becomes the largest": (
        "max", "adaptivemax", "fractionalmax", "amax", "min", "amin",
    ),
}  # fmt: skip
"""Why a classification diffusion model cannot be made of an operation: reason -> how its name may begin."""


def unfit_operations(output: Tensor) -> dict[str, str]:
    """Unfit operations between ``output`` and the tensors that it can be differentiated for: name -> reason.

    The graph shows what is no layer, such as a maximum over tokens, and leaves out layers that never see the
    image, such as a ReLU between a table of positions and its weights.
    """
    reasons: dict[str, str] = {}
    found, waiting = {output.grad_fn}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        operation = node.name().split("Backward")[0]
        for reason, beginnings in _UNFIT.items():
            if operation.lower().startswith(beginnings):
                reasons[operation] = reason
        behind = {next_node for next_node, _ in node.next_functions if next_node is not None} - found
        found |= behind
        waiting.extend(behind)
    return dict(sorted(reasons.items()))


@final
class TimmBackbone(HeadedBackbone):
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
        for layer in self.network.modules():
            if getattr(layer, "fused_attn", False):
                layer.fused_attn = False
        self.head = make_head(self._probe(name), levels, classes, joint, knots)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Of the timm model; ``y`` is not used."""
        check_images(x, self.in_channels, self.size)
        return self.network(x)

    def _probe(self, name: str) -> int:
        """Number of features, from one image that is differentiated twice; refuses what does not fit."""
        training = self.network.training
        self.network.eval()
        x = torch.linspace(-1, 1, self.in_channels * self.size[0] * self.size[1])
        x = x.reshape(1, self.in_channels, *self.size).requires_grad_()
        # Constant weights leave in the graph what happens to the image alone.
        weights = {key: parameter.detach() for key, parameter in self.network.named_parameters()}
        try:
            features = torch.func.functional_call(self.network, weights, (x,))
            reasons = unfit_operations(features)
            if not reasons:
                (gradient,) = torch.autograd.grad(features.square().sum(), x, create_graph=True)
                torch.autograd.grad(gradient.square().sum(), x)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            height, width = self.size
            raise UserError(
                f"network: timm's {name} cannot be run and differentiated twice on {height}x{width} images ({reason})"
            ) from error
        if reasons:
            listing = ", ".join(f"{operation} {reason}" for operation, reason in reasons.items())
            raise UserError(
                f"network: timm's {name} does not fit: {listing}; "
                "choose one with smooth activations and LayerNorm, such as vit_tiny_patch16_224 or convnext_atto"
            )
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
