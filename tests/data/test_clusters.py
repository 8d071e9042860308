"""Clusters in the place of classes: what k-means finds, which splits are told, what is refused."""

import numpy as np
import pytest
import torch

import torchcdm
from torchcdm.data import from_object, load_data
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.training.build import new_model
from torchcdm.training.config_files import make_config
from torchcdm.training.finish import compare

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


def test_mistakes_are_named_in_one_line():
    x, _ = groups(20)
    with pytest.raises(UserError, match="data.clusters is 17, but there are 16 training samples"):
        from_object(x, clusters=17)
    with pytest.raises(UserError, match="clusters is 1; it must be at least 2"):
        from_object(x, clusters=1)
    with pytest.raises(UserError, match="data.clusters is 3; it needs model.labels joint, or input"):
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


def test_training_samples_are_compared_without_their_cluster():
    x, _ = groups()
    source = from_object(x, clusters=3)
    config = make_config({"model": {"labels": "joint", "class_gaussians": True, "backbone": "mlp"}})
    model = new_model(config.model, source, flip=False).eval()
    found = compare(model, config, source, model.state_dict())["values"]["training"]
    alone = single_pass(model, source.train.tensors()[0], scoring=Scoring(level=0)).values().mean()
    assert found == pytest.approx(float(alone))
