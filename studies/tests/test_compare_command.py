"""``python -m studies compare``: what is kept, what is refused, what is printed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from studies.cli import main
from studies.compare import comparison as comparing, denoising, peers as registry
from studies.compare.comparison import compare
from studies.compare.flows import FlowModule
from studies.compare.peers import PEERS
from studies.compare.results import NAME_WIDTH, Comparison, Result
from studies.compare.sklearn_peers import ClassicalPeer
from torchcdm.data import DataOptions, fingerprint, from_object, load_data
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss
from torchcdm.training.build import in_units

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(0)
    return from_object(torch.randn(200, 2, generator=generator) + 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A comparison of two, by the command."""
    folder = tmp_path_factory.mktemp("compare")
    words = ["compare", "digits", "--budget", "0.3", "--peers", "gaussian,gmm,cdm", "--out", str(folder / "out"),
             "--json", str(folder / "all.json"), "--plot", str(folder / "all.png"), "--quiet", "--device", "cpu",
             "--limit", "8", "--clock", "processor"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "CALIBRATED_LEVELS", 10)  # the reverse variances of fifty levels take longest
        patch.setattr(comparing, "DRAWN", 4)
        assert main(words) == 0
    return folder, words


# --- what comes out ------------------------------------------------------------------------------------------------


def test_the_command_leaves_numbers_and_a_figure(made, capsys):
    folder, words = made
    content = json.loads((folder / "all.json").read_text())
    source = in_units(load_data("digits"), DataOptions(gaussianize=True))
    assert content["protocol"].pop("fingerprint") == fingerprint(source)
    assert content["protocol"] == {
        "data": "digits", "train": 1300, "validation": 200, "test": 8, "dim": 64, "unit": "bits/dim", "budget": 0.3,
        "clock": "processor", "seed": 0, "gaussianized": True, "log_z": None, "frechet": None,
    }  # fmt: skip
    assert [system["name"] for system in content["systems"]] == ["gaussian", "gmm", "cdm"]
    assert (folder / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert content["published"][0]["title"] == "MintNet" and "not measured" in content["published"][0]["note"]
    rows = {(s["name"], row["name"]): row for s in content["systems"] for row in s["rows"]}
    assert {name for system, name in rows if system == "cdm"} == {"one-pass", "one-pass-level", "elbo", "flow"}
    best = min((row for row in rows.values() if row["normalised"]), key=lambda row: row["value"])
    for row in rows.values():
        assert row["over_best"]["mean"] == pytest.approx(row["value"] - best["value"], abs=1e-9)
        # Paired: the same samples are hard for all, so that a difference is known better than its terms.
        assert row["over_best"]["se"] < math.hypot(row["se"], best["se"])
    for system in content["systems"]:
        assert system["status"] == "measured" and system["setting"] and system["version"] and system["parameters"] > 0
        assert system["sampling"]["per_second"] > 0


def test_the_table_ranks_only_what_is_normalised(made, capsys):
    _, words = made
    assert main(words) == 0
    text = capsys.readouterr().out
    ranked, loose = text.split("not normalised:")
    assert "CDM, elbo (level 5)" in ranked and "CDM, one-pass " not in ranked
    assert "CDM, one-pass" in loose and "~" in loose and "MintNet" in loose
    values = [float(line[NAME_WIDTH:].split()[0]) for line in ranked.splitlines()[4:] if line.strip()]
    assert values == sorted(values) and len(values) == 6


def test_plain_units_are_another_protocol(made, capsys):
    _, words = made
    assert main([*words, "--no-gaussianize"]) == 2
    assert "was made with gaussianized = True, not False" in capsys.readouterr().err


def test_bent_columns_are_another_protocol_too(source, tmp_path):
    words = {"seconds": 0.3, "folder": tmp_path, "peers": ("gaussian",), "clock": "processor"}
    assert compare(source, **words).protocol.gaussianized is False
    with pytest.raises(UserError, match="gaussianized = False, not True"):
        compare(in_units(source, DataOptions(gaussianize=True)), **words)


def test_what_is_finished_is_not_made_again(made, monkeypatch):
    folder, words = made
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.json")}

    def forbidden(*_):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(ClassicalPeer, "fit", forbidden)
        assert main(words) == 0
        patch.setattr(comparing, "_measured", forbidden)
        assert main(words) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.json")} == before


def test_an_interrupted_comparison_goes_on(source, tmp_path, monkeypatch):
    fit = PEERS["gmm"].fit
    monkeypatch.setattr(ClassicalPeer, "fit", lambda self, *a: (_ for _ in ()).throw(KeyboardInterrupt)
                        if self.name == "gmm" else fit(*a))  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        compare(source, 5, tmp_path, ["gaussian", "gmm"])
    assert (tmp_path / "gaussian.json").exists() and not (tmp_path / "gmm.json").exists()
    monkeypatch.undo()
    kept = (tmp_path / "gaussian.json").stat().st_mtime_ns
    result = compare(source, 5, tmp_path, ["gaussian", "gmm"])
    assert [r.name for r in result.results] == ["gaussian", "gmm"]
    assert (tmp_path / "gaussian.json").stat().st_mtime_ns == kept


def test_results_of_another_protocol_are_not_mixed(source, tmp_path):
    compare(source, 5, tmp_path, ["gaussian"])
    changes = (
        ({"seconds": 6}, "budget = 5.0, not 6.0"),
        ({"seed": 1}, "seed = 0, not 1"),
        ({"clock": "processor"}, "clock = wall"),
        ({"limit": 10}, "test = 20, not 10"),
        ({"frechet": 2000}, "frechet = None, not 2000"),
        ({"frechet": 1999}, "1999 samples are too few for a Fréchet distance; 2000 are needed"),
    )
    for changed, message in changes:
        with pytest.raises(UserError, match=message):
            compare(source, **({"seconds": 5, "folder": tmp_path, "peers": ["gaussian"]} | changed))


def test_a_spoiled_result_is_named(source, tmp_path):
    compare(source, 5, tmp_path, ["gaussian"])
    (tmp_path / "gaussian.json").write_text("{")
    with pytest.raises(UserError, match="gaussian.json: damaged, .*; restore it from a copy, or make it again"):
        compare(source, 5, tmp_path, ["gaussian"])


def test_frechet_distances_tell_a_good_model_from_a_poor_one(tmp_path, monkeypatch):
    words = ["compare", "digits", "--budget", "5", "--peers", "gaussian,kde", "--out", str(tmp_path), "--limit", "20",
             "--frechet", "2000", "--json", str(tmp_path / "all.json"), "--quiet"]  # fmt: skip
    assert main(words) == 0
    sampling = {s["name"]: s["sampling"] for s in json.loads((tmp_path / "all.json").read_text())["systems"]}
    # Draws around training digits are nearer to them than those of one Gaussian.
    assert 0 < sampling["kde"]["frechet"] < 0.5 * sampling["gaussian"]["frechet"]
    assert sampling["kde"]["features"].startswith("Fréchet distance of 2000 samples to 1300 training images")
    assert len(list((tmp_path / "features").glob("reference-*.safetensors"))) == 1, "later systems have the same"
    monkeypatch.setattr(comparing, "Reference", lambda *_: pytest.fail("made again"))
    assert main(words) == 0


# --- divergence ----------------------------------------------------------------------------------------------------


def spoil(monkeypatch, calls):
    """Makes the first so many losses of flows infinite."""
    loss, count = FlowModule.loss, iter(range(10**6))
    monkeypatch.setattr(FlowModule, "loss", lambda self, z: loss(self, z) * (math.nan if next(count) < calls else 1))


def test_a_second_attempt_has_a_lower_rate(source, tmp_path, monkeypatch):
    pytest.importorskip("normflows")
    spoil(monkeypatch, 10)
    (result,) = compare(source, 2.0, tmp_path, ["realnvp"], clock="processor").results
    assert result.status == "measured" and result.attempts == 2 and math.isfinite(result.rows[0].value)
    assert "lr 0.0001 " in result.setting and result.note.startswith("second attempt: 10 steps in a row")


def test_two_divergences_are_an_honest_row(source, tmp_path, monkeypatch):
    pytest.importorskip("normflows")
    spoil(monkeypatch, 10**6)
    both = compare(source, 0.5, tmp_path, ["realnvp", "gaussian"], clock="processor")
    result = both.results[0]
    assert result.status == "diverged" and result.rows == () and result.sampling is None
    line = next(line for line in both.table().splitlines() if line.startswith("RealNVP "))
    assert "diverged" in line and "no finite loss" in line
    # The verdict is kept like any result.
    monkeypatch.undo()
    assert compare(source, 0.5, tmp_path, ["realnvp", "gaussian"], clock="processor").results[0] == result


def test_a_likelihood_that_is_not_finite_is_a_divergence(source, tmp_path, monkeypatch):
    pytest.importorskip("normflows")
    density = FlowModule.log_prob
    monkeypatch.setattr(
        FlowModule, "log_prob", lambda self, z: density(self, z) + (0 if self.network.training else math.inf)
    )
    monkeypatch.setattr(FlowModule, "validation_loss", lambda self, z: 1.0)
    (result,) = compare(source, 0.3, tmp_path, ["realnvp"], clock="processor").results
    assert result.status == "diverged" and "no finite likelihood for 20 of 20 test samples" in result.note


def test_our_own_divergence_counts_like_any(source, tmp_path, monkeypatch):
    forward = CDMLoss.forward

    def lost(self, *arguments):
        terms = forward(self, *arguments)
        return terms | {"loss": terms["loss"] * math.nan}

    monkeypatch.setattr(CDMLoss, "forward", lost)
    (result,) = compare(source, 5, tmp_path, ["cdm"]).results
    assert result.status == "diverged" and "10 steps in a row" in result.note
    assert (tmp_path / "run-cdm").is_dir() and (tmp_path / "run-cdm-lower-rate").is_dir()


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "required: DATA"),
        (["compare", "digits"], "required: --budget"),
        (["compare", "digits", "--budget", "0"], "budget is 0 seconds; it must be positive"),
        (["compare", "digits", "--budget", "-5"], "budget is -5 seconds"),
        (["compare", "digits", "--budget", "1", "--log-z", "3"], "--log-z is 3; it must be at least 4"),
        (["compare", "digits", "--budget", "soon"], "invalid float value: 'soon'"),
        (["compare", "digits", "--budget", "1", "--peers", "nfs"], "unknown peer 'nfs'; did you mean 'nsf'"),
        (["compare", "digits", "--budget", "1", "--peers", ""], "unknown peer ''"),
        (["compare", "digits", "--budget", "1", "--clock", "sun"], "unknown clock 'sun'"),
        (["compare", "toy:two-moons", "--budget", "1", "--peers", "glow"], "glow does not suit toy:two-moons"),
        (["compare", "digits", "--budget", "1", "--seed", "-1"], "--seed is -1"),
        (["compare", "digits", "--budget", "1", "--limit", "1"], "--limit is 1"),
        (["compare", "nothing", "--budget", "1"], "nothing"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


def test_a_missing_library_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "zuko" else object())
    assert main(["compare", "digits", "--budget", "1", "--peers", "gaussian,nsf,maf"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "zuko not installed, which nsf, maf come from" in error
    assert "pip install 'torchcdm[studies]'" in error


def test_peers_are_listed_with_what_they_suit(capsys):
    assert main(["compare", "toy:two-moons", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(PEERS) and "not for toy:two-moons" in lines["glow"] and "not for" not in lines["nsf"]


def test_without_names_all_that_suit_are_taken(source, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: object())
    names = [peer.name for peer in registry.chosen_peers(None, source)]
    assert names == [name for name in PEERS if name != "glow"]


@pytest.mark.slow
def test_the_package_does_not_load_the_libraries():
    import subprocess
    import sys

    code = ("import sys, studies.compare.peers, studies.cli.comparing; "
            "print([n for n in ('zuko', 'normflows', 'torchcfm', 'matplotlib') if n in sys.modules])")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_comparison_of_diverged_systems_alone_is_a_table(made):
    folder, _ = made
    content = json.loads((folder / "out" / "gaussian.json").read_text())
    kept, protocol = Result.from_plain(content["values"]), comparing.Protocol(**content["settings"])
    lost = replace(kept, rows=(), sampling=None, status="diverged", note="lost")
    assert "diverged" in Comparison(protocol, (lost,), "cpu").table()


def test_results_of_other_data_of_the_same_size_are_not_mixed(tmp_path):
    x = np.random.RandomState(0).normal(size=(100, 3))
    compare(from_object(x), 1.0, tmp_path, ["gaussian"])
    with pytest.raises(UserError, match="was made with fingerprint = "):
        compare(from_object(x[:, ::-1].copy()), 1.0, tmp_path, ["gaussian"])
