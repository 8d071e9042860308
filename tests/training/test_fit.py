"""Training in one call."""

import math

import numpy as np
import pytest
import torch

import torchcdm
from torchcdm.data import from_object
from torchcdm.errors import UserError
from torchcdm.training.config_files import make_config
from torchcdm.training.fit import override_fields
from torchcdm.training.loop import Interrupted

TINY = {"device": "cpu", "progress": False}


def test_fit_learns_a_density_in_the_units_of_the_data():
    # Two columns of very different scales, the second skewed: the true entropy is known.
    generator = torch.Generator().manual_seed(0)
    n = 4000
    a = 100 + 30 * torch.randn(n, generator=generator)
    b = 0.01 * (0.6 * torch.randn(n, generator=generator)).exp()
    data = torch.stack([a, b], 1)
    network = {"width": 64, "depth": 2, "dropout": 0}
    model = torchcdm.fit(data, steps=250, batch_size=128, lr=3e-3, model={"backbone": network}, **TINY)
    normal, skewed = torch.distributions.Normal(100.0, 30.0), torch.distributions.LogNormal(math.log(0.01), 0.6)
    true = normal.log_prob(a) + skewed.log_prob(b)
    gaussian = normal.log_prob(a) + torch.distributions.Normal(b.mean(), b.std()).log_prob(b)
    assert gaussian.mean() < true.mean() - 0.25
    assert abs(float(model.log_prob(data).mean() - true.mean())) < 0.08
    x = torchcdm.sample(model, 1000, steps=50)
    assert abs(float(x[:, 0].mean()) - 100) < 5 and abs(float(x[:, 0].std()) / 30 - 1) < 0.15
    assert abs(float(x[:, 1].median()) / 0.01 - 1) < 0.1


def test_a_model_of_the_zoo_that_is_trained_on_is_loaded_by_name(tmp_path):
    model = torchcdm.load("zoo:two-moons")
    torchcdm.train(model, torch.randn(60, 2), steps=2, **TINY).save(tmp_path / "on")
    x = torch.randn(3, 2)
    assert torch.equal(torchcdm.load(tmp_path / "on").log_prob(x), model.log_prob(x))
    model.backbone = torch.nn.Sequential(model.backbone)  # another network is one's own
    torchcdm.train(model, torch.randn(60, 2), steps=2, **TINY).save(tmp_path / "own")
    with pytest.raises(UserError, match="has a network of your own, Sequential"):
        torchcdm.load(tmp_path / "own")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_wherever_it_is_called(context):
    x = torch.randn(60, 2)
    with context():
        model = torchcdm.fit(x, steps=2, model={"backbone": {"width": 8}}, **TINY)
    assert model.log_prob(x[:3]).isfinite().all()


def test_what_several_processes_leave_nowhere_is_refused_before_the_training(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="give out, a folder that all of them see"):
        torchcdm.fit(torch.randn(60, 2), steps=2, **TINY)


def test_a_folder_with_a_model_alone_has_nothing_to_go_on_with(tmp_path):
    torchcdm.load("zoo:two-moons").save(tmp_path)
    with pytest.raises(UserError, match="holds a model, but no training to go on with"):
        torchcdm.fit(torch.randn(60, 2), steps=2, out=tmp_path, resume=True, **TINY)


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
    assert model.transform.least.all(), "both columns become their logarithms"
    z = model.transform(x.double())
    assert float(z.mean().abs()) < 0.3 and torch.allclose(model.transform.inverse(z), x.double())


def test_a_preset_says_how_objects_are_read():
    x = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    network = {"channels": 8, "multipliers": [1], "blocks": 1, "attention": []}
    words = {"steps": 1, "batch_size": 4, "model": {"backbone": network, "schedule": {"T": 50}}} | TINY
    model = torchcdm.fit(x, preset="cifar10", **words)
    # No noise on grey levels, and no validation split.
    assert not model.transform.dequantize and model.info.selected["value"] == "last"
    model = torchcdm.fit(x, preset="cifar10", data={"dequantize": True}, **words)
    assert model.transform.dequantize and model.info.data.dequantize


@pytest.mark.parametrize(
    "options",
    [{"size": [4, 4]}, {"channels": 1}, {"label": "kind"}, {"spec": "digits"}, {"crop": [4, 4]}],
)
def test_fields_without_effect_on_objects_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=f"data.{name} has no effect here; change the data that you give"):
        torchcdm.fit(torch.randn(60, 2), data=options, **TINY)


def test_fields_without_effect_on_sources_and_files_are_refused(tmp_path):
    source = from_object(torch.randn(60, 2))
    with pytest.raises(UserError, match="data.seed has no effect here; change the data"):
        torchcdm.fit(source, data={"seed": 3}, **TINY)
    with pytest.raises(UserError, match="data.spec has no effect here"):
        torchcdm.fit("toy:rings", data={"spec": "digits"}, **TINY)
    with pytest.raises(UserError, match="labels have no effect on a DataSource, which has its own; make it with them"):
        torchcdm.fit(source, torch.arange(60) % 2, **TINY)
    # What is as it would be without is no mistake.
    small = {"steps": 1, "model": {"backbone": {"width": 8}}} | TINY
    assert torchcdm.fit(source, data={"seed": 0, "limit": None}, **small).shape == (2,)


def test_overrides_may_be_numbers_of_numpy():
    config = make_config(override_fields({"steps": np.int64(3), "model": {"components": np.int64(2)}}))
    assert config.train.steps == 3 and config.model.components == 2


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


def test_what_was_read_off_the_data_is_said(capsys):
    x = np.random.RandomState(0).choice([0.0, 1.0, 3.0], (60, 2))
    torchcdm.fit(x, steps=1, model={"backbone": {"width": 8}}, device="cpu")
    assert "column 'c1' has 3 distinct values: dequantised with cells of 1" in capsys.readouterr().out


def test_labels_come_second_as_in_scikit_learn():
    x, y = np.random.RandomState(0).normal(size=(60, 2)), np.arange(60) % 3
    model = torchcdm.fit(x, y, steps=1, model={"labels": "input", "backbone": {"width": 8}}, **TINY)
    assert model.classes == 3


def test_files_and_series(tmp_path):
    x = np.random.RandomState(0).normal(size=(60, 2))
    np.savetxt(tmp_path / "t.csv", x, delimiter=",", header="a,b", comments="")
    small = {"steps": 1, "model": {"backbone": {"width": 8}}} | TINY
    model = torchcdm.fit(tmp_path / "t.csv", **small)
    assert model.shape == (2,) and model.info.data.spec == f"table:{tmp_path}/t.csv"
    assert torchcdm.fit(x, preset="two-moons", **small).info.data.spec is None, "not the data of the preset"
    pd = pytest.importorskip("pandas")
    assert torchcdm.fit(pd.Series(np.arange(60.0) ** 2), **small).shape == (1,)


@pytest.mark.parametrize("data", [{"a": [1.0, 2.0]}, b"bytes"])
def test_other_objects_are_refused_in_one_line(data):
    with pytest.raises(UserError, match="data of type .* are not understood"):
        torchcdm.fit(data, **TINY)


def test_what_is_no_network_and_no_model_is_refused():
    x = torch.randn(40, 2)
    for backbone in (b"3", True, 3, object(), len):
        with pytest.raises(UserError, match="give an nn.Module"):
            torchcdm.fit(x, backbone=backbone, progress=False)
    for swapped in ((x, x), ("model", x), (None, x)):
        with pytest.raises(UserError, match="give the model, then the data"):
            torchcdm.train(*swapped)


def test_networks_that_want_the_level_or_are_compiled_are_refused():
    class OfLevel(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    refused = {"missing 1 required positional argument: 't'": OfLevel(2, 102)}
    refused["compile=True"] = torch.compile(torch.nn.Linear(2, 102))
    for says, network in refused.items():
        with pytest.raises(UserError, match=says):
            torchcdm.fit(torch.randn(40, 2), backbone=network, progress=False)


def test_no_samples_are_drawn_for_a_run_that_is_not_kept(monkeypatch):
    monkeypatch.setattr("torchcdm.training.finish.draw", lambda *args: pytest.fail("drawn for nobody"))
    torchcdm.fit(torch.randn(60, 2), steps=1, model={"backbone": {"width": 8}}, **TINY)


def test_an_interrupted_fit_does_not_promise_a_state(monkeypatch):
    def stopped(*args, **kwargs):
        raise Interrupted(2, "stopped after step 3; the state is saved, go on with --resume")

    monkeypatch.setattr("torchcdm.training.loop.train", stopped)
    with pytest.raises(Interrupted, match="stopped by a signal; nothing of it is kept"):
        torchcdm.fit(torch.randn(60, 2), **TINY)


    # Neither does one whose steps are still timed.
    with pytest.raises(Interrupted, match="stopped by a signal while steps were timed; nothing is kept"):
        torchcdm.fit(torch.randint(0, 9, (60, 1, 8, 8)), budget="10s", progress=False)


@pytest.mark.parametrize("kind", [np.asarray, lambda x: x.double()])
def test_log_prob_takes_numbers_of_any_precision(kind):
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    model = torchcdm.fit(x, steps=1, model={"backbone": {"width": 8}}, **TINY)
    assert torch.allclose(model.log_prob(kind(x)), model.log_prob(x), atol=1e-5)
