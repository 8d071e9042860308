"""Clusters in the place of classes: what is found, which splits are told, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import torchcdm
from torchcdm.data import from_object, load_data
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.networks.mlp import MLP
from torchcdm.training.build import hint
from torchcdm.training.settings import ModelConfig

CENTRES = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 9.0]])


def groups(count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows about three centres, half of them about the first, and their centres."""
    place = torch.arange(count) % 4 % 3
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return CENTRES[place] + noise * torch.tensor([2.0, 0.4]), place


def test_groups_are_found_whatever_the_units_of_the_columns_are():
    x, place = groups()
    source = from_object(x, clusters=3)
    assert source.class_names == ("cluster 0", "cluster 1", "cluster 2")
    of_row = {tuple(row.tolist()): int(k) for row, k in zip(x, place, strict=True)}
    found, labels = source.train.tensors()
    pairs = {(of_row[tuple(row.tolist())], int(k)) for row, k in zip(found, labels, strict=True)}
    assert len(pairs) == 3 and len({k for _, k in pairs}) == 3
    assert torch.equal(from_object(x, clusters=3).train.labels, labels)


def test_groups_are_what_neighbours_hang_together_as_and_strays_are_none():
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(400) % 2
    angle = 2 * torch.pi * torch.rand(400, generator=generator)
    rings = (1 + 3 * place[:, None]) * torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.cat([rings + 0.1 * torch.randn(400, 2, generator=generator), torch.tensor([[40.0, 0.0]])])
    source = from_object(x, clusters=2, validation_fraction=0, test_fraction=0)
    found, labels = source.train.tensors()
    inner, stray = found.norm(dim=1) < 2.5, found[:, 0] > 30
    assert labels[inner].unique().numel() == labels[~inner & ~stray].unique().numel() == 1
    assert labels[inner][0] != labels[~inner & ~stray][0]


def test_only_training_samples_are_told_their_cluster():
    x, place = groups()
    source = from_object(x, place, clusters=2)
    assert set(source.train.labels.tolist()) == {0, 1}
    assert all(part.labels.eq(-1).all() for part in (source.validation, source.test))
    scored = load_data("digits", like=load_data("digits").transform, clusters=5)
    assert scored.class_names is None and scored.train.labels.eq(-1).all()


def test_files_of_images_are_read_in_parts(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    whole = load_data(f"array:{tmp_path / 'x.npy'}", clusters=4).train.labels
    monkeypatch.setattr("torchcdm.data.clusters.NUMBERS", 48)
    assert torch.equal(load_data(f"array:{tmp_path / 'x.npy'}", clusters=4).train.labels, whole)


def test_fewer_samples_than_neighbours_have_groups():
    source = from_object(groups(20)[0][:4], clusters=2, validation_fraction=0, test_fraction=0)
    assert set(source.train.labels.tolist()) == {0, 1}


def test_mistakes_are_named_in_one_line():
    x, _ = groups(20)
    with pytest.raises(UserError, match="data.clusters is 17, but there are 16 training samples"):
        from_object(x, clusters=17)
    with pytest.raises(UserError, match="clusters is 1; it must be at least 2"):
        from_object(x, clusters=1)
    with pytest.raises(UserError, match="data.clusters makes classes, but this model takes none"):
        torchcdm.fit(x, steps=1, data={"clusters": 3}, progress=False)
    with pytest.raises(UserError, match="data.clusters has no effect here"):
        torchcdm.fit(from_object(x), steps=1, data={"clusters": 3}, model={"labels": "joint"}, progress=False)


def test_a_model_of_clusters_draws_and_scores_without_labels(tmp_path):
    x, _ = groups()
    settings = {"data": {"clusters": 3}, "model": {"labels": "joint", "class_gaussians": True}}
    model = torchcdm.fit(x, steps=20, out=tmp_path / "run", progress=False, **settings)
    drawn = model.sample(400, seed=1)
    near = torch.cdist(drawn / x.std(0), CENTRES / x.std(0)).argmin(1).bincount(minlength=3) / 400
    assert torch.allclose(near, torch.tensor([0.5, 0.25, 0.25]), atol=0.08)  # 0.025 is a standard error
    assert torchcdm.load(tmp_path / "run").classes == 3
    assert model.log_prob(x).shape == (300,)
    manifest = (tmp_path / "run" / "samples" / "manifest.csv").read_text()
    assert "cluster" not in manifest


def test_pictures_without_labels_are_told_of_groups():
    config = ModelConfig()
    pictures, rows = (from_object(torch.rand(40, *shape)) for shape in ((1, 4, 4), (3,)))
    assert "--data.clusters 20 --model.labels joint" in hint(config, pictures)
    assert "the 3 classes of the data are not used" in hint(config, from_object(torch.rand(300, 3), clusters=3))
    for settings in ({"labels": "joint"}, {"kind": "ddm"}):
        assert not hint(replace(config, **settings), pictures)
    assert not hint(config, rows)


def test_networks_of_ones_own_learn_clusters():
    x, _ = groups()
    networks = [MLP(2, levels=22, width=16, depth=1, classes=3, joint=True) for _ in range(2)]
    settings = {"steps": 2, "data": {"clusters": 3}, "progress": False}
    made = torchcdm.train(ClassificationDiffusion(networks[0], UniformSigmaSchedule(20)), x, **settings)
    schedule = {"schedule": {"name": "uniform-sigma", "T": 20}}
    fitted = torchcdm.fit(x, backbone=networks[1], model=schedule, **settings)
    assert [model.draw_classes(9).max() < 3 for model in (made, fitted)] == [True, True]
    assert fitted.log_class_prior.exp().sort().values.tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.05)
