"""Optimisers: what Muon moves, by how much, and that AdamW has the rest; float64."""

import pytest
import torch
from torch import nn

from torchcdm.networks.encoder import Encoder
from torchcdm.networks.mlp import MLP
from torchcdm.networks.unet import DDMUNet
from torchcdm.training.optimizers import MuonAdamW, build_optimizer, hidden_matrices, orthogonalized
from torchcdm.training.settings import TrainConfig


def names_of(network):
    hidden = {id(weight) for weight in hidden_matrices(network)}
    return {name for name, weight in network.named_parameters() if id(weight) in hidden}


def test_hidden_matrices_are_neither_at_the_ends_nor_in_the_head():
    names = names_of(Encoder(1, 8, levels=12, width=8, multipliers=(1, 2)))
    assert {"stages.0.0.block.conv1.weight", "downs.0.conv.weight", "summaries.0.pooled.weight"} <= names
    assert not any(name.startswith(("conv_in", "head")) or name.endswith("bias") for name in names)
    unet = names_of(DDMUNet(1, 8, channels=8, multipliers=(1,)))
    assert unet and not any("conv_in" in name or "conv_out" in name for name in unet)
    assert {name.split(".")[0] for name in names_of(MLP(2, levels=12))} == {"blocks", "energy"}


def test_a_weight_that_two_layers_share_is_moved_once():
    layers = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    layers[2].weight = layers[0].weight
    assert len(hidden_matrices(layers)) == 1


@pytest.mark.parametrize("shape", [(5, 5), (4, 30), (30, 4)])
def test_orthogonalising_keeps_the_singular_vectors_and_levels_the_values(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64, generator=generator), full_matrices=False)
    values = torch.linspace(0.02, 1, min(shape), dtype=torch.float64)
    found = u.T @ orthogonalized(u * values @ v) @ v.T
    assert float((found - found.diag().diag()).abs().max()) < 1e-10
    assert float(found.diag().min()) > 0.6 and float(found.diag().max()) < 1.25


def test_a_first_step_moves_a_kernel_like_adamw_would_in_the_mean_square_and_shrinks_it():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3, bias=False).double()
    before = layer.weight.detach().clone()
    optimizer = MuonAdamW(layer, TrainConfig(lr=0.1, weight_decay=0.5))
    layer.weight.grad = torch.randn_like(layer.weight) * 1e-6
    optimizer.step()
    change = layer.weight.detach() - before * (1 - 0.1 * 0.5)
    # Singular values near 1 of 32 in (32, 144): root mean square 1 / sqrt(144), times 0.2 sqrt(144).
    assert float(change.square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.2)
    assert float((change * layer.weight.grad).sum()) < 0
    assert layer.weight.grad is not None


def test_everything_else_is_moved_as_by_adamw():
    torch.manual_seed(0)
    networks = [Encoder(1, 8, levels=12, width=8, multipliers=(1,)).double() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [
        build_optimizer(TrainConfig(optimizer=name, lr=1e-2, weight_decay=0.1), network)
        for name, network in zip(("muon", "adamw"), networks, strict=True)
    ]
    for _ in range(3):
        for weights in zip(*(network.parameters() for network in networks), strict=True):
            gradient = torch.randn_like(weights[0])
            for weight in weights:
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    hidden = names_of(networks[0])
    for (name, by_muon), by_adamw in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(by_muon, by_adamw) != (name in hidden), name


def test_weights_without_a_gradient_stay():
    network = Encoder(1, 8, levels=12, width=8, multipliers=(1,))
    before = [weight.detach().clone() for weight in network.parameters()]
    MuonAdamW(network, TrainConfig(lr=1e-2)).step()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
