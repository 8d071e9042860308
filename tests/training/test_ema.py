"""The averaged weights."""

import pytest
import torch
from torch import nn

from torchcdm.training.optimizers import EMA


def walk(ema, model, steps, start=0):
    for k in range(start, start + steps):
        with torch.no_grad():
            model.weight.fill_(float(k))
        ema.update(model)


def test_average_is_the_ramped_sum():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(7.0)
    ema = EMA(model, 0.9)
    expected = 7.0
    walk(ema, model, 200)
    # The ramp reaches 0.9 at n = 80: (1 + 80) / (10 + 80).
    for n in range(200):
        decay = 0.9 if n >= 80 else (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * n
    assert abs(float(ema.model.weight) - expected) < 1e-4
    assert ema.updates == 200


def test_what_a_network_of_ones_own_counts_is_that_of_the_model():
    """Spectral normalisation divides by what vectors in buffers say, which follow the weights."""
    model = nn.Module()
    model.backbone = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    ema, weight = EMA(model, 0.5), model.backbone.parametrizations.weight.original
    for k in range(100):
        with torch.no_grad():
            weight.copy_(torch.diag(torch.tensor([0.1, 0.1, 0.1, 2.0])) + 1e-3 * k)
        model.backbone(torch.ones(1, 4))
        ema.update(model)
    assert float(torch.linalg.matrix_norm(ema.model.backbone.weight, 2)) == pytest.approx(1, rel=0.01)


def test_without_its_counter_the_average_would_forget():
    # After a resume the ramp must not start again: with the counter the average is that of an unbroken run.
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole, first = (EMA(model, 0.99) for model in models)
    walk(whole, models[0], 100)
    walk(first, models[1], 60)
    resumed = EMA(models[1], 0.99)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.updates = first.updates
    walk(resumed, models[1], 40, start=60)
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_the_copy_is_apart():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    ema = EMA(model, 0.5)
    assert model.training and not ema.model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ema.model.parameters())
    before = [p.clone() for p in model.parameters()]
    ema.update(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
