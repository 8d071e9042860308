"""What every network owes: two derivatives, independent samples, labels that count, any image that fits."""

import pytest
import torch

from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.networks.blocks import ImageConvolution
from torchcdm.networks.encoder import Encoder, Summary
from torchcdm.networks.heads import make_head
from torchcdm.networks.mlp import DDMMLP, MLP
from torchcdm.networks.unet import CDMUNet, DDMUNet

LEVELS = 7
SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.0}

# name -> (network from keyword arguments, shape of a sample, name of a weight deep inside it).
# Images are not square, have two channels, and attention acts at the resolution of 2x4.
NETWORKS = {
    "encoder": (
        lambda **kw: Encoder(2, (4, 8), LEVELS, width=8, multipliers=(1, 2), attention=(4,), energy_maps=3, **kw),
        (2, 4, 8),
        "stages.1.0.attention.query.weight",
    ),
    "encoder-positions": (
        lambda **kw: Encoder(2, (4, 8), LEVELS, width=8, multipliers=(1, 2), blocks=1, positions=True, **kw),
        (2, 4, 8),
        "positions",
    ),
    "encoder-hidden": (
        lambda **kw: Encoder(2, (4, 8), LEVELS, width=8, multipliers=(1, 2), blocks=1, hidden=5, **kw),
        (2, 4, 8),
        "head.hidden.weight",
    ),
    "mlp": (lambda **kw: MLP(3, LEVELS, width=16, depth=2, energy_maps=2, **kw), (3,), "blocks.0.linear1.weight"),
    "unet": (
        lambda **kw: CDMUNet(2, (4, 8), LEVELS, **SMALL, **kw),
        (2, 4, 8),
        "unet.down_stages.1.0.attention.query.weight",
    ),
}
DENOISERS = {
    "ddm-mlp": (lambda **kw: DDMMLP(3, width=16, depth=2, **kw), (3,)),
    "ddm-unet": (lambda **kw: DDMUNet(2, (4, 8), **SMALL, **kw), (2, 4, 8)),
}
every_kind = pytest.mark.parametrize(
    "options", [{}, {"classes": 3}, {"classes": 3, "joint": True}], ids=["plain", "labels", "joint"]
)
every_network = pytest.mark.parametrize("name", NETWORKS)
every_denoiser = pytest.mark.parametrize("name", DENOISERS)


def randomised(network):
    """Float64 and away from the zero start, where the head would hide everything."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return network.double()


def batch(n, shape, seed=1):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_network
@every_kind
def test_two_derivatives_in_input_and_weights(name, options):
    build, shape, weight_name = NETWORKS[name]
    network = randomised(build(**options))
    weight = network.get_parameter(weight_name).detach().clone().requires_grad_()
    y = torch.tensor([1]) if options else None

    def outputs(x, weight):
        return torch.func.functional_call(network, {weight_name: weight}, (x, y))

    x = batch(1, shape).requires_grad_()
    second = torch.autograd.functional.hvp(lambda x: outputs(x, weight).square().sum(), x, torch.ones_like(x))[1]
    assert second.abs().max() > 1e-6
    # The outputs can be large; the tolerances are relative to them.
    assert torch.autograd.gradgradcheck(outputs, (x, weight), fast_mode=True, rtol=1e-3, atol=1e-4)


@every_network
@every_kind
def test_samples_do_not_see_each_other(name, options):
    build, shape, _ = NETWORKS[name]
    network = randomised(build(**options)).train()
    x, y = batch(4, shape), torch.tensor([0, 1, 2, 3])
    alone = torch.cat([network(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(network(x, y), alone, rtol=1e-9, atol=1e-9)


@every_network
def test_labels_count_and_none_is_the_null_label(name):
    build, shape, _ = NETWORKS[name]
    network = randomised(build(classes=3))
    assert (network.classes, network.joint) == (3, False)
    x = batch(2, shape)
    outputs = [network(x, torch.full((2,), k)) for k in range(4)]
    torch.testing.assert_close(network(x), outputs[3], rtol=0, atol=0)
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-3


@every_network
def test_a_joint_network_gives_every_class_whatever_the_label(name):
    build, shape, _ = NETWORKS[name]
    network = randomised(build(classes=3, joint=True))
    assert (network.classes, network.joint) == (3, True)
    h = network(batch(2, shape))
    assert h.shape == (2, 3, LEVELS)
    assert (h[:, 0] - h[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(network(batch(2, shape), torch.tensor([1, 2])), h, rtol=0, atol=0)


@every_denoiser
def test_denoisers_know_level_label_and_only_their_own_sample(name):
    build, shape = DENOISERS[name]
    assert build()(batch(2, shape).float(), torch.tensor([1, 5])).abs().max() == 0
    network = randomised(build(classes=3))
    x, t, y = batch(4, shape), torch.tensor([1, 20, 300, 1000]), torch.tensor([0, 1, 2, 3])
    eps = network(x, t, y)
    assert eps.shape == x.shape
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(eps, alone, rtol=1e-9, atol=1e-9)
    null = network(x, t)
    torch.testing.assert_close(null[3], eps[3], rtol=1e-9, atol=1e-9)
    assert (null[:3] - eps[:3]).flatten(1).abs().amax(1).min() > 1e-4
    assert (network(x, t + 1, y) - eps).flatten(1).abs().amax(1).min() > 1e-6


@every_network
def test_half_precision_gives_full_precision_outputs_and_finite_gradients(name):
    build, shape, _ = NETWORKS[name]
    network = build()
    loss = CDMLoss(ClassificationDiffusion(network, UniformSigmaSchedule(LEVELS - 2)))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(batch(2, shape).float()).dtype == torch.float32
        loss(batch(8, shape).float())["loss"].mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_parameter_counts_of_the_published_cifar10_models():
    with torch.device("meta"):
        networks = CDMUNet(3, 32, levels=1002, direction="data"), DDMUNet(3, 32)
    # The second is the DDPM of 35.7 M parameters.
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [33_405_930, 35_746_307]


@pytest.mark.parametrize("name", ["encoder", "mlp"])
def test_inner_products_put_the_features_into_the_gradient(name):
    build, shape, _ = NETWORKS[name]
    network = randomised(build())
    energy = network.energy if name == "mlp" else network.summaries[1].energy
    pooled = 16 if name == "mlp" else network.summaries[0].features + 64
    # Constant features of 1, and a head that sees one inner product alone: h_0 is a multiple of the sum of x.
    energy.weight.data.zero_()
    energy.bias.data.fill_(1)
    network.head.linear.weight.data.zero_()
    network.head.linear.weight.data[:, pooled] = 1
    x = batch(2, shape).requires_grad_()
    (gradient,) = torch.autograd.grad(network(x)[:, 0].sum(), x)
    torch.testing.assert_close(gradient, gradient.flatten()[0].expand_as(x))
    assert gradient.flatten()[0].abs() > 1e-3


def test_head_channels_and_direction_of_the_unet():
    small = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
    network = CDMUNet(1, 4, LEVELS, **small, head_channels=24, direction="data")
    assert network.features(torch.randn(2, 1, 4, 4)).shape == (2, 24)
    assert network(torch.randn(2, 1, 4, 4)).abs().max() > 0
    residual = CDMUNet(1, 4, LEVELS, **small)
    assert residual(torch.randn(2, 1, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("call, message", [
    (lambda: Encoder(1, (30, 28), LEVELS), "30x28 cannot be halved 2 times.*multiples of 4, such as 32x28"),
    (lambda: CDMUNet(1, 28, LEVELS), "28x28 cannot be halved 3 times.*such as 32x32"),
    (lambda: Encoder(1, 8, LEVELS, joint=True), "number of classes"),
    (lambda: MLP(2, LEVELS, classes=0), "at least 1"),
    (lambda: MLP(2, LEVELS, width=-3), "MLP: width is -3; it must be at least 1"),
    (lambda: MLP(2, LEVELS, dropout=float("nan")), "dropout is nan; it must be a finite number"),
    (lambda: Encoder(1, 8, LEVELS, energy_maps=-2), "energy_maps is -2; it must be at least 1"),
    (lambda: Encoder(1, 8, LEVELS, pooled=[8, 8]), "pooled has 2 numbers for 3 resolutions; give one for each"),
    (lambda: Encoder(1, 8, LEVELS, multipliers=[1, "x"]), r"multipliers\[1\] is 'x'; it must be a valid integer"),
    (lambda: CDMUNet(1, 8, LEVELS, **SMALL, direction="dat"), "did you mean 'data'"),
    (lambda: CDMUNet(1, 8, LEVELS, **SMALL, direction="data", classes=3, joint=True), "leave direction out"),
    (lambda: make_head(4, 2, None, joint=False), "levels is 2; it must be at least 3"),
])  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "multipliers, pooled", [((1,), [32]), ((1, 2, 2), [2, 16, 64]), ((1, 2, 2, 3), [2, 4, 16, 96])]
)
def test_fewer_features_are_pooled_where_pixels_are_many(multipliers, pooled):
    assert [summary.pooled.out_channels for summary in Encoder(1, 8, LEVELS, 8, multipliers).summaries] == pooled


@pytest.mark.parametrize("hidden", [None, 5])
def test_an_encoder_in_half_precision_has_logits_in_float32(hidden):
    network, x = randomised(Encoder(2, 8, LEVELS, width=8, multipliers=(1, 2), hidden=hidden)), batch(3, (2, 8, 8))
    with torch.no_grad():
        found, expected = network.bfloat16()(x.bfloat16()), network.double()(x)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("channels", [3, 6])
def test_energies_are_the_maps_times_the_image_and_a_matrix_product_is_a_convolution(channels):
    summary, h, image = Summary(4, channels, 8, 5).double(), batch(2, (4, 6, 7)), batch(2, (channels, 6, 7), seed=2)
    active = torch.nn.functional.silu(summary.norm(h))
    maps = summary.energy(active).unflatten(1, (5, channels))
    pooled = torch.nn.functional.conv2d(active, summary.pooled.weight, summary.pooled.bias)
    expected = torch.cat([torch.nn.functional.silu(pooled).mean((2, 3)), (maps * image[:, None]).sum((2, 3, 4))], 1)
    torch.testing.assert_close(summary(h, image), expected)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_shifts_of_an_image_times_a_matrix_are_a_convolution(channels):
    layer, x = ImageConvolution(channels, 5).double(), batch(2, (channels, 6, 7)).requires_grad_()
    torch.testing.assert_close(layer(x), torch.nn.Conv2d.forward(layer, x))
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
