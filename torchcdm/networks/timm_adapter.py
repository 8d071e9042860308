"""Image classifiers of the timm library as networks, where they can be differentiated twice."""

from __future__ import annotations

import difflib
import re
from typing import Any, final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError, nearest, needed, reason
from torchcdm.networks.blocks import ImageSize, height_and_width
from torchcdm.networks.heads import HeadedBackbone, make_head
from torchcdm.runtime.validation import Count, Width, checked

_BATCH_NORMS = ("nativebatchnorm", "cudnnbatchnorm", "miopenbatchnorm", "syncbatchnorm")
_KINKS = ("relu", "leakyrelu", "prelu", "rrelu", "hard", "softshrink", "threshold", "abs")
_LARGEST = ("max", "adaptivemax", "fractionalmax", "amax", "min", "amin")
_UNFIT = {
    "mixes the samples of a batch": _BATCH_NORMS,
    "has kinks, where the denoiser, its derivative, would jump": _KINKS,
    "has kinks where another element becomes the largest": _LARGEST,
}
"""Why a classification diffusion model cannot be made of an operation: reason -> how its name may begin."""

_OPTIONS = """
act_layer alpha always_partition aspect_ratio attn_drop_rate attn_gain attn_layer bottle_ratio ch_div channels
class_token conv_bias conv_mlp depth depths dims drop_path_rate drop_rate dynamic_img_pad dynamic_img_size
embed_dim extra_conv fc_norm final_norm fix_init gamma_in_act global_pool group_size img_size init_values
kernel_sizes ls_init_value mlp_ratio norm_eps norm_layer no_embed_class num_features num_heads output_stride
patch_drop_rate patch_size pos_drop_rate pos_embed pre_norm proj_bias proj_drop_rate qk_norm qkv_bias reg_tokens
rel_pos_dim rel_pos_type same_padding shared_rel_pos skipinit stages std_conv_eps stem_chs stem_type
strict_img_size use_grn weight_init width_factor window_size zero_init_fc
"""
OPTIONS = tuple(_OPTIONS.split())
"""Plain arguments of timm's architectures. None names a file or a hub: a run's configuration may be a stranger's."""


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
        for unfit, beginnings in _UNFIT.items():
            if operation.lower().startswith(beginnings):
                reasons[operation] = unfit
        behind = {next_node for next_node, _ in node.next_functions if next_node is not None} - found
        found |= behind
        waiting.extend(behind)
    return dict(sorted(reasons.items()))


@final
class TimmBackbone(HeadedBackbone):
    """The pooled features of a timm classifier under our own head.

    Vision transformers, ConvNeXt and others with smooth activations and LayerNorm or GroupNorm work; fused
    attention, which has no second derivative, is switched off in the layers of this network alone.
    Other arguments as in :class:`HeadedBackbone`; images of any size that the architecture takes.

    Args:
        model: Model name of timm, such as ``vit_tiny_patch16_224`` or ``convnext_atto``.
        options: Arguments of the architecture, of :data:`OPTIONS`: ``patch_size: 4``, ``act_layer: silu`` ...
        classes: Number of classes; needs ``joint``, for these networks take no label.
    """

    @checked
    def __init__(
        self, in_channels: Width, image_size: ImageSize, levels: Count, model: str = "vit_tiny_patch16_224",
        options: dict[str, Any] | None = None, classes: Count | None = None, joint: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if classes is not None and not joint:
            raise UserError(f"network: timm's {model} takes no labels; set joint to true, or leave classes out")
        self.in_channels, self.size = in_channels, height_and_width(image_size)
        self.classes, self.joint = classes, joint
        self.network = _create(model, in_channels, self.size, options or {})
        for layer in self.network.modules():
            if getattr(layer, "fused_attn", False):
                layer.fused_attn = False
        self.head = make_head(self._probe(model), levels, classes, joint)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Features of the timm model; ``y`` is not used."""
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
            with torch.enable_grad():
                features = torch.func.functional_call(self.network, weights, (x,))
                reasons = unfit_operations(features)
                if not reasons:
                    (gradient,) = torch.autograd.grad(features.square().sum(), x, create_graph=True)
                    torch.autograd.grad(gradient.square().sum(), x)
        except (RuntimeError, AssertionError, ValueError) as error:
            what = "cannot be run and differentiated twice on {}x{} images".format(*self.size)
            raise UserError(f"network: timm's {name} {what} ({reason(error)})") from error
        if reasons:
            listing = ", ".join(f"{operation} {why}" for operation, why in reasons.items())
            mend = "choose one with smooth activations and LayerNorm, such as vit_tiny_patch16_224 or convnext_atto"
            raise UserError(f"network: timm's {name} does not fit: {listing}; {mend}")
        self.network.train(training)
        return features.shape[1]


def _create(name: str, in_channels: int, size: tuple[int, int], options: dict[str, Any]) -> nn.Module:
    """The timm model without its classifier."""
    for key in options.keys() - set(OPTIONS):
        raise UserError(f"network: '{key}' is no option that timm's models take here; {nearest(key, OPTIONS)}")
    timm = needed("timm", "vision", f"network: {name}")
    if not re.fullmatch(r"[\w.]+", name) or not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise UserError(f"network: timm has no model '{name}'; {hint}")
    # Only models of a fixed input size, such as vision transformers, take the size as an argument.
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        options = {"img_size": size, **options}
    try:
        return timm.create_model(name, num_classes=0, in_chans=in_channels, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        raise UserError(f"network: timm cannot build {name} with these options ({reason(error)})") from error
