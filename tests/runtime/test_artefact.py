"""Artefacts: exact, whole after a crash at any moment, and refused in one line when a bit is wrong."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from damage import resealed

from torchcdm.errors import UserError
from torchcdm.runtime import artefact
from torchcdm.runtime.artefact import read_artefact, read_json, unpacked, write_artefact
from torchcdm.runtime.files import TEMPORARY, write_json
from torchcdm.runtime.reading import read_bytes

TENSORS = {"a.safetensors": {"x": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}}
CONTENT = {"name": "ä", "values": [1.5, 1e-300, None, True], "pair": (1, 2), "nan": float("nan")}


def written(folder, content=CONTENT, tensors=TENSORS):
    write_artefact(folder / "a.json", "thing", content, tensors)
    return folder / "a.json"


def refused(read):
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_reads_back_exactly(tmp_path):
    content, (tensors,) = read_artefact(written(tmp_path / "new"), "thing", ["a.safetensors"])
    assert content["values"] == CONTENT["values"] and content["pair"] == [1, 2] and content["nan"] is None
    assert content.keys() == CONTENT.keys()
    whole = json.loads((tmp_path / "new" / "a.json").read_text())
    assert whole["format"] == artefact.FORMAT and whole["kind"] == "thing"
    assert all(torch.equal(tensors[key], value) for key, value in TENSORS["a.safetensors"].items())
    assert sorted(os.listdir(tmp_path / "new")) == ["a.json", "a.safetensors"]


def test_tensors_that_share_memory_are_saved_one_by_one(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    shared = {"x": x, "same": x, "row": x[1], "turned": x.T, "wide": x[:, :1].expand(2, 4)}
    _, (again,) = read_artefact(written(tmp_path, tensors={"a.safetensors": shared}), "thing", ["a.safetensors"])
    assert all(torch.equal(again[key], value) for key, value in shared.items())


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_a_flipped_bit_anywhere_is_refused(tmp_path, name):
    path = written(tmp_path)
    whole, (tensors,) = read_artefact(path, "thing", ["a.safetensors"])
    file, chance = tmp_path / name, random.Random(0)
    right = file.read_bytes()
    for _ in range(200):
        at = chance.randrange(8 * len(right))
        wrong = bytearray(right)
        wrong[at // 8] ^= 1 << at % 8
        file.write_bytes(wrong)
        try:
            content, _ = read_artefact(path, "thing", ["a.safetensors"])
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
        else:
            assert content == whole, "another spelling of the same, such as 1E-300"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "damaged, not JSON"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", "format version None"),
        ("[]", "not a JSON object"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"format": 3}', "format version 3, but this"),
        ('{"format": 5, "kind": "thing"}', "does not match its checksum"),
        (b"\xff\xfe{", "not JSON"),
    ],
)
def test_what_is_no_artefact_is_one_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(lambda: read_artefact(path, "thing"))


def test_foreign_content_with_a_right_checksum(tmp_path):
    path = written(tmp_path)
    resealed(path, lambda content: content.update(kind="other"))
    assert "holds a other, not a thing" in refused(lambda: read_artefact(path, "thing"))
    for files in (None, [], {}, {"a.safetensors": 3}, {"../a.safetensors": ""}, {"": ""}):
        resealed(path, lambda content, files=files: content.update(kind="thing", files=files))
        refused(lambda: read_artefact(path, "thing", ["a.safetensors"]))
        artefact.settle(path)


def test_files_that_are_missing_or_none(tmp_path):
    path = written(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    assert "a.safetensors: no such file" in refused(lambda: read_artefact(path, "thing", ["a.safetensors"]))
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: cannot be read as a file" in refused(lambda: read_json(tmp_path / "pipe"))
    assert "it is a folder, not a file" in refused(lambda: read_bytes(tmp_path))
    assert "no safetensors" in refused(lambda: unpacked(b"\xff" * 8, tmp_path / "bad.safetensors"))


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is run."""


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, calls):
    path, left = written(tmp_path), calls
    new = {"a.safetensors": {"x": torch.ones(3)}, "b.safetensors": {"x": torch.ones(1)}}

    def killed(function):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed(os.replace))
        if calls < 4:  # the JSON and two files of tensors
            with pytest.raises(Killed):
                written(tmp_path, {"new": 1}, new)
        else:
            written(tmp_path, {"new": 1}, new)
    content, (x,) = read_artefact(path, "thing", ["a.safetensors"])
    assert torch.equal(x["x"], torch.ones(3) if "new" in content else TENSORS["a.safetensors"]["x"])
    assert ("new" in content) == (calls > 1)
    written(tmp_path, {"new": 2}, new)
    content, (_, b) = read_artefact(path, "thing", ["a.safetensors", "b.safetensors"])
    assert content["new"] == 2 and torch.equal(b["x"], torch.ones(1))
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_only_its_own_kind_is_replaced(tmp_path):
    path = written(tmp_path)
    assert "holds a thing, which this would replace" in refused(lambda: write_artefact(path, "other", {}))
    write_json(tmp_path / "mine.json", {"kind": "thing"})
    (tmp_path / "empty.json").touch()
    (tmp_path / "text.json").write_text("mine")
    for name in ("mine.json", "text.json"):
        assert "written by something else" in refused(
            lambda name=name: write_artefact(tmp_path / name, "thing", {})
        )
    assert read_artefact(path, "thing")[0]["name"] == "ä"
    path.write_bytes(path.read_bytes()[:80])
    for name in ("a.json", "empty.json"):  # damaged, or nothing to lose
        write_artefact(tmp_path / name, "thing", {"new": 1})
    assert read_artefact(path, "thing")[0]["new"] == 1 and (tmp_path / "text.json").read_text() == "mine"


def test_a_path_that_cannot_be_is_one_line():
    with pytest.raises(UserError, match="cannot be opened"):
        read_bytes(Path("a\0b"))
