"""A small checkpoint in the published format, and the published network written out by names."""

import torch
import torch.nn.functional as F

WIDTHS, SIZE, LEVELS, CLASSES = (32, 64), 8, 12, 3

OPTIONS = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.1,
           "direction": "data"}  # fmt: skip


def published_shapes(classes):
    """Names and shapes of the weights of the published network with the options above."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, inside, outside):
        layer(f"{name}.norm1", inside)
        layer(f"{name}.conv1", outside, inside, 3, 3)
        layer(f"{name}.norm2", outside)
        layer(f"{name}.conv2", outside, outside, 3, 3)
        if classes:
            layer(f"{name}.temb_proj", outside, 128)
        if inside != outside:
            layer(f"{name}.nin_shortcut", outside, inside, 1, 1)

    def attention(name, width):
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    layer("conv_in", 32, 1, 3, 3)
    block("down.0.block.0", 32, 32)
    layer("down.0.downsample.conv", 32, 32, 3, 3)
    block("down.1.block.0", 32, 64)
    attention("down.1.attn.0", 64)
    block("mid.block_1", 64, 64)
    attention("mid.attn_1", 64)
    block("mid.block_2", 64, 64)
    block("up.1.block.0", 64 + 64, 64)
    attention("up.1.attn.0", 64)
    block("up.1.block.1", 64 + 32, 64)
    attention("up.1.attn.1", 64)
    layer("up.1.upsample.conv", 64, 64, 3, 3)
    block("up.0.block.0", 64 + 32, 32)
    block("up.0.block.1", 32 + 32, 32)
    layer("norm_out", 32)
    layer("conv_out", 64, 32, 3, 3)
    layer("linear_layer", LEVELS, 64)
    if classes:
        layer("temb.dense.0", 128, 32)
        layer("temb.dense.1", 128, 128)
        shapes["label_emb.weight"] = (classes + 1, 32)
    return shapes


def published_output(w, x, y=None):
    """What the published network computes, from weights by their published names."""

    def conv(name, h, **kw):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **kw)

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, h):
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def block(name, h):
        inner = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)), padding=1)
        if y is not None:
            inner = inner + linear(f"{name}.temb_proj", F.silu(temb))[..., None, None]
        inner = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", inner)), padding=1)
        return inner + (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in w else h)

    def attention(name, h):
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", h)).flatten(2).mT for part in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v)
        return h + conv(f"{name}.proj_out", mixed.mT.reshape(h.shape))

    if y is not None:
        temb = linear("temb.dense.1", F.silu(linear("temb.dense.0", w["label_emb.weight"][y])))
    a = conv("conv_in", x, padding=1)
    b = block("down.0.block.0", a)
    c = conv("down.0.downsample.conv", F.pad(b, (0, 1, 0, 1)), stride=2)
    d = attention("down.1.attn.0", block("down.1.block.0", c))
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", d)))
    h = attention("up.1.attn.0", block("up.1.block.0", torch.cat([h, d], 1)))
    h = attention("up.1.attn.1", block("up.1.block.1", torch.cat([h, c], 1)))
    h = conv("up.1.upsample.conv", F.interpolate(h, scale_factor=2), padding=1)
    h = block("up.0.block.0", torch.cat([h, b], 1))
    h = block("up.0.block.1", torch.cat([h, a], 1))
    h = conv("conv_out", F.silu(norm("norm_out", h)), padding=1).mean((2, 3))
    return linear("linear_layer", h).cumsum(1)


def write_checkpoint(path, classes=None, prefix=""):
    """A file in the published format; returns its averaged weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(classes)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save({
        "epoch": 1,
        "model_state_dict": {prefix + name: torch.zeros(shape) for name, shape in shapes.items()},
        "ema_model_state_dict": {prefix + name: value for name, value in weights.items()},
        "optimizer_state_dict": {},
        "loss": 0.5,
    }, path)  # fmt: skip
    return weights
