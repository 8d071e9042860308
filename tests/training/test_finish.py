"""Do no harm: the better of the trained model and its start is kept, and what is wrong has a name and a mend."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from pretended_device import pretended_device
from sklearn.covariance import LedoitWolf
from small_runs import small_config

import torchcdm
from torchcdm.data import from_object
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.training import evaluation, loop
from torchcdm.training.build import load_source, new_model
from torchcdm.training.checkpoint import load, read_info
from torchcdm.training.config_files import make_config
from torchcdm.training.finish import _uniform, compare, problems
from torchcdm.training.loop import train


def table(rows=160, columns=150):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 20)) @ rng.normal(size=(20, columns)) + 0.5 * rng.normal(size=(rows, columns))


def test_a_table_with_fewer_rows_than_columns_is_as_good_as_ledoit_and_wolf(tmp_path):
    x = table()
    torchcdm.fit(x, preset="table", out=tmp_path / "run", progress=False, steps=10, sampling={"n": 0})
    outcome = json.loads((tmp_path / "run" / "report.json").read_text())["outcome"]
    fitted = LedoitWolf().fit(x[:128])
    expected = -np.mean([fitted.score(x[128:][k : k + 1]) for k in range(32)])
    best = min(outcome["values"]["model"], outcome["values"]["start"])
    # Other rows than those of the run's own split: within the spread of a few rows.
    assert outcome["unit"] == "nats" and best < expected + 30


def test_a_training_that_goes_wrong_keeps_its_start_and_says_so(tmp_path, capsys):
    config = small_config(
        train__lr="3.0", train__steps="12", train__warmup="0", sampling__n="0", train__optimizer="adamw"
    )
    result = train(config, tmp_path / "run", device="cpu", progress=True)
    said = capsys.readouterr().out
    assert result.outcome["kept"] == "start" and result.outcome["problems"][0]["name"] == "worse than its start"
    assert "worse than its start" in said and "the start is kept" in said and "try more steps, or half the lr" in said
    model, info = load(tmp_path / "run"), read_info(tmp_path / "run")
    assert info.selected["step"] == 0 and info.selected["best"] == pytest.approx(result.outcome["values"]["start"])
    x, _ = result.source.validation.tensors()
    value, _ = single_pass(model, x, None, Scoring(level=0)).mean_and_error()
    assert value == pytest.approx(result.outcome["values"]["start"], abs=0.02)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["outcome"]["kept"] == "start"
    # Stopped after the start took the place of the weights, it says the same when it goes on.
    kept = (tmp_path / "run" / "config.json").read_bytes()
    again = train(config, tmp_path / "run", resume=True, device="cpu", progress=False)
    assert again.outcome == result.outcome and (tmp_path / "run" / "config.json").read_bytes() == kept


def test_a_start_that_was_kept_is_not_taken_for_the_best_weights_later(tmp_path, monkeypatch):
    values, kept = iter([1.0, 1.5, 2.0]), iter(["start", "model"])
    monkeypatch.setattr(evaluation, "validate", lambda *_: dict.fromkeys(("nll", "mse", "loss"), next(values)))
    outcome = {"unit": "bits/dim", "values": {"start": 0.5}, "problems": []}
    monkeypatch.setattr(loop, "compare", lambda *_: outcome | {"kept": next(kept)})
    for steps in (8, 12):
        config = small_config(train__steps=str(steps), sampling__n="0")
        train(config, tmp_path / "run", resume=True, device="cpu", progress=False)
    assert read_info(tmp_path / "run").selected["step"] == 12


def test_without_fallback_the_trained_one_stays(tmp_path):
    config = small_config(
        train__lr="3.0", train__steps="12", train__warmup="0", sampling__n="0", train__optimizer="adamw",
        train__fallback="false",
    )  # fmt: skip
    result = train(config, tmp_path / "run", device="cpu", progress=False)
    assert result.outcome["kept"] == "model" and read_info(tmp_path / "run").selected["step"] > 0


def test_what_is_compared_lies_where_the_model_does():
    config = small_config(model__gaussian="false")
    source = load_source(config.data)
    model = new_model(config.model, source, flip=False).eval()
    with pretended_device() as device:
        model = model.to(device)
        outcome = compare(model, config, source, {key: value.clone() for key, value in model.state_dict().items()})
    assert outcome["values"]["gaussian"] < outcome["values"]["start"] < outcome["values"]["uniform"] + 1


def test_the_comparison_shows_a_bar(capsys):
    config = small_config()
    source = load_source(config.data)
    model = new_model(config.model, source, flip=False).eval()
    compare(model, config, source, model.state_dict())
    assert not capsys.readouterr().err
    compare(model, config, source, model.state_dict(), progress=True)
    assert "comparing models" in capsys.readouterr().err


def named(unit="bits/dim", **values):
    values = {"model": 3.0, "training": 3.0, "start": 4.0, "gaussian": 4.0, "uniform": 8.0} | values
    return [problem["name"] for problem in problems(values, unit, 0.15, small_config())]


def test_every_problem_has_its_name():
    assert named() == []
    assert named(training=2.0) == ["overfitting"]
    assert named(model=-0.5, training=-0.5) == ["impossible likelihood"]
    assert named(model=9.0, training=9.0, start=9.5, gaussian=9.5) == ["worse than a uniform density"]
    assert named(model=4.5, training=4.5, start=5.0) == ["worse than a Gaussian"]
    assert named(model=5.0, training=5.0) == ["worse than its start"]
    assert named("nats", model=-3.0, training=-3.0, start=-2.0, gaussian=-2.0) == []


def test_a_uniform_density_gives_values_probabilities():
    draw, half = np.random.default_rng(0), np.arange(400) % 2
    frame = pd.DataFrame({
        "number": draw.uniform(0, 5, 400), "count": draw.integers(0, 3, 400), "text": draw.choice(["x", "y"], 400),
        "rain": np.where(half, draw.uniform(1, 11, 400), 0.0),
    })  # fmt: skip
    source = from_object(frame, validation_fraction=0.5, test_fraction=0.0)
    (train, _), (held_out, _) = (split.tensors() for split in (source.train, source.validation))
    # Of rain one half is 0; of the other the numbers are alike.
    expected = math.log(5) + math.log(3) + math.log(2) + math.log(2) + 0.5 * math.log(10)
    assert _uniform(source, train, held_out) == pytest.approx(expected, abs=0.05)


def test_training_samples_are_compared_without_their_cluster():
    source = from_object(torch.cat([torch.randn(100, 2), torch.randn(100, 2) + 50]), clusters=2)
    config = make_config({"model": {"labels": "joint", "class_gaussians": True, "backbone": "mlp"}})
    model = new_model(config.model, source, flip=False).eval()
    found = compare(model, config, source, model.state_dict())["values"]["training"]
    alone = single_pass(model, source.train.tensors()[0], scoring=Scoring(level=0)).values().mean()
    assert found == pytest.approx(float(alone))
