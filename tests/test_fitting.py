"""Training in one call."""

import math

import numpy as np
import pytest
import torch

import torchcdm
from torchcdm.errors import UserError

TINY = {"device": "cpu", "progress": False}


def test_fit_learns_a_density_in_the_units_of_the_data():
    # Two columns of very different scales, the second skewed: the true entropy is known.
    generator = torch.Generator().manual_seed(0)
    n = 4000
    a = 100 + 30 * torch.randn(n, generator=generator)
    b = 0.01 * (0.6 * torch.randn(n, generator=generator)).exp()
    data = torch.stack([a, b], 1)
    network = {"width": 64, "depth": 2, "dropout": 0}
    model = torchcdm.fit(data, steps=500, batch_size=128, lr=3e-3, model={"backbone": network}, **TINY)
    normal, skewed = torch.distributions.Normal(100.0, 30.0), torch.distributions.LogNormal(math.log(0.01), 0.6)
    true = normal.log_prob(a) + skewed.log_prob(b)
    gaussian = normal.log_prob(a) + torch.distributions.Normal(b.mean(), b.std()).log_prob(b)
    assert gaussian.mean() < true.mean() - 0.25
    assert abs(float(model.log_prob(data).mean() - true.mean())) < 0.08
    x = torchcdm.sample(model, 1000, steps=50)
    assert abs(float(x[:, 0].mean()) - 100) < 5 and abs(float(x[:, 0].std()) / 30 - 1) < 0.15
    assert abs(float(x[:, 1].median()) / 0.01 - 1) < 0.1


def test_fit_takes_images_and_keeps_the_run(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    model = torchcdm.fit(
        (x, np.arange(60) % 3), steps=2, batch_size=8, out=tmp_path / "run",
        model={"labels": "input", "backbone": {"width": 8, "blocks": 1}}, sampling={"n": 3, "steps": 2}, **TINY,
    )  # fmt: skip
    assert isinstance(model, torchcdm.ClassificationDiffusion) and model.shape == (3, 8, 8) and model.classes == 3
    again = torchcdm.load(tmp_path / "run")
    values = torch.from_numpy(x[:2]).movedim(3, 1)
    assert torch.equal(again.log_prob(values), model.log_prob(values))


def test_fields_of_the_data_are_overrides_too():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).exp()
    settings = {"gaussianize": True, "validation_fraction": 0.5}
    model = torchcdm.fit(x, data=settings, steps=2, model={"backbone": {"width": 8}}, **TINY)
    assert model.transform.warp.least.all(), "both columns become their logarithms"
    z = model.transform(x.double())
    assert float(z.mean().abs()) < 0.3 and torch.allclose(model.transform.inverse(z), x.double())


def test_overrides_are_checked():
    data = torch.randn(50, 2)
    with pytest.raises(UserError, match="unknown override 'stesp'; did you mean 'steps'"):
        torchcdm.fit(data, stesp=3, **TINY)
    with pytest.raises(UserError, match="unknown preset 'mpl'; did you mean 'mlp'"):
        torchcdm.fit(data, preset="mpl", **TINY)
    with pytest.raises(UserError, match="unknown field 'model.backbone.wdth'; did you mean 'width'"):
        torchcdm.fit(data, model={"backbone": {"wdth": 3}}, **TINY)


def test_public_names():
    assert set(torchcdm.__all__) <= set(dir(torchcdm))
    for name in torchcdm.__all__:
        assert getattr(torchcdm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        torchcdm.lode  # noqa: B018
