"""The preset for images scales itself to the images and the time."""

import json
import sys

import numpy as np
import pytest
import torch

import torchcdm
from torchcdm.cli import main
from torchcdm.data import DataSource, from_object
from torchcdm.errors import UserError
from torchcdm.training import fit
from torchcdm.training.config_files import file_fields, make_config, preset_fields, to_yaml
from torchcdm.training.finish import FLOW_COST, affordable, samples_to_draw


def images(n: int = 60, side: int = 8) -> DataSource:
    return from_object(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8))


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("90s", 90), ("1.5h", 5400), (45, 45), ("2d", 172800)])
def test_times(text, seconds):
    assert fit.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "ten", "0", "-3m", "1e9m", "nan", "10 weeks", "1" * 40])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match="give a time such as 90s, 10m or 2h"):
        fit.seconds_of(text)


def sized(monkeypatch, budget, cost, n=2000):
    """What is chosen for a time, where a step costs so many seconds for each width squared and sample."""
    monkeypatch.setattr(
        fit, "seconds_a_step", lambda config, *_: cost * config.model.backbone.width**2 * config.train.batch_size
    )
    return fit.with_budget([preset_fields("encoder"), {}], images(n, 4), budget, "cpu")


def test_more_time_takes_a_larger_network_and_less_a_smaller_one(monkeypatch):
    found = [sized(monkeypatch, budget, 1e-5) for budget in ("1m", "10m", "3h", "20h")]
    widths = [config.model.backbone.width for config in found]
    assert widths == sorted(widths) and widths[0] == 16 and widths[-1] > 32
    for config, seconds in zip(found, (60, 600, 10800, 72000), strict=True):
        assert config.train.max_seconds == pytest.approx(0.8 * seconds)
        took = 1e-5 * config.model.backbone.width**2 * config.train.batch_size
        assert config.model.backbone.width == 16 or config.train.max_seconds / took >= 2500
    # No sample is seen more than a few hundred times, however much time there is.
    assert found[-1].train.steps * found[-1].train.batch_size <= 300 * 2000


def test_a_plain_model_has_the_unet_of_the_width(monkeypatch):
    tried = []
    monkeypatch.setattr(fit, "seconds_a_step", lambda config, *_: tried.append(config.model.backbone.name) or 1.0)
    layers = [preset_fields("encoder"), {"model": {"kind": "ddm"}}]
    config = fit.with_budget(layers, images(100), "1m", "cpu")
    assert set(tried) == {"unet"} and config.model.backbone.channels == 16
    assert fit.with_budget([*layers, {"train": {"steps": 3}}], images(100), None, "cpu").model.backbone.channels == 32


def test_after_few_steps_little_is_drawn_and_reported():
    config = make_config(preset_fields("encoder"))
    assert [samples_to_draw(config, steps) for steps in (30, 2000)] == [9, 64]
    assert [affordable(config, steps, FLOW_COST, 8, 500) for steps in (30, 2000, 20_000)] == [8, 91, 500]
    assert config.report.limit is None and samples_to_draw(make_config({"sampling": {"n": 0}}), 30) == 0
    # Of a preset for data that it knows the report is that of its published numbers.
    assert make_config(preset_fields("digits")).report.limit == 500


@pytest.mark.parametrize("again", [[], ["encoder"]])
def test_a_resume_goes_on_as_the_run_was_but_for_what_is_given(tmp_path, monkeypatch, again):
    configs = []
    monkeypatch.setattr("torchcdm.cli.training.trained", lambda config, *_: configs.append(config) or sys.exit(0))

    def settings(*words):
        with pytest.raises(SystemExit):
            main(["train", *words, "--out", str(tmp_path), "--device", "cpu", "--quiet"])
        (tmp_path / "config.yaml").write_text(to_yaml(configs[-1]))
        return configs[-1].train.steps, configs[-1].train.lr, configs[-1].report.limit, configs[-1].data.spec

    assert settings("encoder", "--data", "digits", "--steps", "30", "--train.lr", "1e-3") == (30, 1e-3, None, "digits")
    assert settings(*again, "--resume") == (30, 1e-3, None, "digits")
    assert settings(*again, "--resume", "--steps", "2000", "--report.limit", "5") == (2000, 1e-3, 5, "digits")
    assert settings(*again, "--resume", "--steps", "3000") == (3000, 1e-3, 5, "digits")


def test_what_the_user_gives_is_not_chosen(monkeypatch):
    preset = preset_fields("encoder")
    assert fit.scales([preset, {}], None) and fit.scales([preset, {"train": {"lr": 1e-3}}], "5m")
    assert not fit.scales([preset, {"train": {"steps": 7}}], None)
    assert fit.scales([preset, {"train": {"steps": 7}}], "5m")
    assert not fit.scales([preset, {"model": {"backbone": {"width": 8}}}], "5m")
    assert not fit.scales([preset_fields("mlp"), {}], "5m")
    config = fit.with_budget([preset_fields("mlp"), {}], None, "5m", None)
    assert config.train.max_seconds == 300


def test_several_processes_do_not_scale_each_by_its_own_clock(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not fit.scales([preset_fields("encoder"), {}], "5m")


def test_a_budget_is_the_same_at_first_and_when_a_run_goes_on(tmp_path):
    x = images()
    for own in ({}, {"model": {"backbone": {"width": 8, "multipliers": [1], "blocks": 1}}}):
        seconds = []
        for steps in (2, 3):
            torchcdm.fit(x, budget="10m", device="cpu", out=tmp_path / str(len(own)), sampling={"n": 0},
                         progress=False, resume=True, steps=steps, **own)  # fmt: skip
            seconds.append(file_fields(tmp_path / str(len(own)) / "config.yaml")["train"]["max_seconds"])
        assert seconds == [480, 480]


def test_a_configuration_that_was_scaled_is_taken_as_it_is(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(make_config(preset_fields("encoder"))))
    assert not fit.scales([file_fields(path), {}], None)


@pytest.mark.parametrize(("sides", "found"), [((32, 32), 3), ((8, 8), 2), ((28, 28), 3), ((25, 30), 1), ((96, 64), 4)])
def test_sides_that_do_not_halve_have_fewer_resolutions(sides, found):
    assert len(fit.multipliers_of(*sides)) == found


def test_fit_within_a_time_ends_in_it_and_says_what_it_chose(tmp_path, capsys):
    pixels = torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8)
    model = torchcdm.fit(pixels, budget="4s", device="cpu", out=tmp_path, sampling={"n": 0})
    said = capsys.readouterr().out
    assert "scaled to 32 images of 1x6x6 and 4 s: width 16 at 1 resolutions" in said and "steps of" in said
    assert model.log_prob(pixels[:3].float()).isfinite().all()
    # It goes on as it was scaled.
    torchcdm.fit(pixels, device="cpu", out=tmp_path, sampling={"n": 0}, resume=True)
    said = capsys.readouterr().out
    assert "scaled" not in said and "no step is left to take: its 3.2 s" in said


def test_a_scaled_run_goes_on_as_it_was_scaled_within_the_time_that_is_given(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8))
    run = ["--out", str(tmp_path / "run"), "--device", "cpu", "--no-report", "--resume", "--sampling.n", "0"]
    words = ["train", "encoder", "--data", f"array:{tmp_path / 'x.npy'}", *run]

    def goes_on(words, seconds, steps=0):
        """Whether a resume takes so many ``steps``, and what it says where there is no time for any."""
        before = json.loads((tmp_path / "run" / "report.json").read_text())["steps"]
        capsys.readouterr()
        assert main([*words, "--train.steps", str(before + (steps or 5))]) == 0
        told = capsys.readouterr().out
        assert ("no step is left to take: its" in told and "give more by --budget" in told) == (not steps)
        assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == before + steps
        assert file_fields(tmp_path / "run" / "config.yaml")["train"]["max_seconds"] == pytest.approx(seconds)

    assert main([*words, "--budget", "2s"]) == 0
    goes_on(["train", *run], 1.6)
    # The time is one in all, of which training has its share, as at first.
    goes_on([*words, "--budget", "9m"], 432.0, steps=2)
    goes_on(["train", *run, "--budget", "10m"], 480.0, steps=1)
    goes_on(["train", "encoder", *run], 480.0, steps=1)
