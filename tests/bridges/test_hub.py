"""Models on the Hub: against a stand-in of its HTTP interface, with the real huggingface_hub."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hub_server import HubServer

import torchcdm
from torchcdm.bridges.hub import model_card, push
from torchcdm.errors import UserError
from torchcdm.likelihood import LogZ
from torchcdm.likelihood.log_z import weights_of, write_log_z
from torchcdm.training.settings import BACKBONES
from torchcdm.zoo import located

pytest.importorskip("huggingface_hub")


def in_a_process(code, address, home):
    """Runs code of its own process: huggingface_hub reads where the Hub is when it is imported."""
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_test",
                        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path):
    with HubServer() as hub:
        out = in_a_process(
            "import torchcdm; from torchcdm.cli import main\n"
            "assert main(['push', 'zoo:two-moons', 'me/moons', '--private']) == 0\n"
            "print(torchcdm.load('zoo:digits').push_to_hub('me/digits'))", hub.address, tmp_path / "first",
        )  # fmt: skip
        assert out.split() == [f"{hub.address}/me/moons", f"{hub.address}/me/digits"]
        files, steps = {"README.md", "config.json", "model.safetensors"}, {"curvatures.json", "curvatures.safetensors"}
        assert {name: set(sent) for name, sent in hub.files.items()} == {"me/moons": files, "me/digits": files | steps}
        assert hub.private == {"me/moons": True, "me/digits": False}
        assert b"licence" in hub.files["me/moons"]["README.md"]
        assert b"hub:me/digits" in hub.files["me/digits"]["README.md"]
        hub.files["me/moons"]["hub_code.py"] = b"raise SystemExit('code of the repository ran')"
        in_a_process(
            "import torch, torchcdm; from torchcdm.cli import main\n"
            "model = torchcdm.load('hub:me/moons')\n"
            f"torch.save(model.log_prob(torch.zeros(1, 2)), {str(tmp_path / 'value.pt')!r})\n"
            "assert main(['info', 'hub:me/nothing']) == 2", hub.address, tmp_path / "second",
        )  # fmt: skip
        value = torchcdm.load("zoo:two-moons").log_prob(torch.zeros(1, 2))
        assert torch.equal(torch.load(tmp_path / "value.pt"), value)
        assert not list((tmp_path / "second").rglob("*.py")), "code was downloaded"
        changed = bytearray(hub.files["me/moons"]["model.safetensors"])
        changed[-1] ^= 1
        hub.files["me/moons"]["model.safetensors"] = bytes(changed)
        code = "import sys; from torchcdm.cli import main; sys.exit(main(['info', 'hub:me/moons']) - 2)"
        in_a_process(code, hub.address, tmp_path / "third")


def test_paths_of_the_machine_are_not_uploaded(tmp_path, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, private, exist_ok):
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns):
            names = [name for name in allow_patterns if (folder_path / name).exists()]
            sent.update({name: (folder_path / name).read_bytes() for name in names})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    table = tmp_path / "private" / "people.csv"
    table.parent.mkdir()
    rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).tolist()
    table.write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows))
    model = torchcdm.fit(str(table), steps=5, progress=False, device="cpu")
    assert push(model, "me/people") == "https://hub/me/people"
    assert json.loads(sent["config.json"])["data"]["spec"] == "table:people.csv"
    assert not any(str(tmp_path).encode() in content for content in sent.values())
    specs = {f"fashion-mnist:{tmp_path}/idx": "fashion-mnist:idx", f"cifar10:{tmp_path}/bin": "cifar10:bin",
             f"hf:{tmp_path}/saved": "hf:saved", "hf:ylecun/mnist": "hf:ylecun/mnist", "digits": "digits",
             "hf:../mine/faces": "hf:faces", "table:C:\\mine\\cars.csv": "table:cars.csv"}  # fmt: skip
    for spec, told in specs.items():
        model.info = replace(model.info, data=replace(model.info.data, spec=spec))
        push(model, "me/people")
        assert json.loads(sent["config.json"])["data"]["spec"] == told
        assert not any(str(tmp_path).encode() in content for content in sent.values())
    network = BACKBONES["custom"](code=f"{tmp_path}/mine.py:make")
    model.info = replace(model.info, model=replace(model.info.model, backbone=network))
    push(model, "me/people")
    assert json.loads(sent["config.json"])["model"]["backbone"]["code"] == "mine.py:make"


def test_log_z_goes_with_its_weights_and_comes_back(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    torchcdm.load("zoo:two-moons").save(run)
    z = LogZ(0.25, 0.01, "replica exchange", 4, 2)
    write_log_z(run, z, weights_of(run))
    shutil.copytree(run, other)
    torchcdm.load("zoo:digits").save(other)  # log Z of the weights that were there before
    with HubServer() as hub:
        code = (
            "from torchcdm.bridges.hub import push; from torchcdm.likelihood.log_z import read_log_z\n"
            f"from torchcdm.zoo import located; push({str(run)!r}, 'me/z'); push({str(other)!r}, 'me/other')\n"
            "print(read_log_z(located('hub:me/z')).value)"
        )
        assert float(in_a_process(code, hub.address, tmp_path / "home")) == z.value
        assert "log_z.json" in hub.files["me/z"] and "log_z.json" not in hub.files["me/other"]


def test_what_is_wrong_is_one_line(monkeypatch):
    model = torchcdm.load("zoo:two-moons")
    for name in ("moons", "/", "a/b/c"):
        with pytest.raises(UserError, match="write OWNER/NAME"):
            push(model, name)
        with pytest.raises(UserError, match="OWNER/NAME|Repo id must"):
            located(f"hub:{name}")

    def refuse(*_, **__):
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UserError, match="hub:me/moons: cannot be written \\(401 Client Error\\)$"):
        push(model, "me/moons")


def test_the_card_of_a_model_without_a_report():
    model = torchcdm.load("zoo:two-moons")
    card = model_card("me/moons", model.info, 5)
    assert "licence of the data is not recorded" in card and "license:" not in card, "which is its owner's choice"
    assert "## Numbers" not in card


def test_the_card_of_one_test_sample_has_no_error():
    info = torchcdm.load("zoo:two-moons").info
    rows = [{"name": "one-pass", "value": 0.8, "se": None}]
    nll = {"data": {"count": 1, "split": "test"}, "unit": "nats", "rows": rows, "believe": False, "why": ""}
    card = model_card("me/moons", info, 5, report={"nll": nll, "baselines": []})
    assert "| one pass, level 0 | 0.800 | nan |" in card
