"""The one writer: whole files or none, and nothing replaced that is not ours."""

import os
import stat
import threading
from contextlib import suppress

import pytest

from torchcdm.errors import UserError
from torchcdm.runtime.files import TEMPORARY, check_output, check_output_folder, write_file, write_json


def refused(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_devices_and_pipes_are_written_to_and_stay(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    assert "cannot be written" in refused(lambda: write_file(pipe, "nobody reads"))
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    while not read:
        with suppress(UserError):
            write_file(pipe, b"x" * 200_000)
            break
    reader.join()
    assert read == [b"x" * 200_000] and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    check_output(tmp_path / "null")
    write_json(tmp_path / "null", [1])
    assert (tmp_path / "null").is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_links_are_followed_and_planted_ones_are_not(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    write_file(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"{TEMPORARY}o.json").symlink_to(victim)
    write_file(tmp_path / "o.json", "new")
    assert victim.read_text() == "mine" and (tmp_path / "o.json").read_text() == "new"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(lambda: write_file(tmp_path / "loop", "new"))
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))


def test_paths_that_cannot_be_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("x" * 300, "a\0b", "", "file/below"):
        refused(lambda name=name: write_file(tmp_path / name, "x"))
        refused(lambda name=name: check_output(tmp_path / name))
    write_file(tmp_path / ("ö" * 120), "a name as long as they get")
    write_file(tmp_path / "names.csv", "f\udcff.png\n")
    assert (tmp_path / "names.csv").read_bytes() == b"f\xff.png\n"


def test_a_file_that_is_read_only_stays(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    assert "kept is read-only" in refused(lambda: write_file(path, "new"))
    assert path.read_text() == "mine"


def test_outputs_do_not_replace_inputs(tmp_path):
    images, table = tmp_path / "images", tmp_path / "table.csv"
    (images / "inner").mkdir(parents=True)
    table.write_text("a\n1\n")
    (tmp_path / "other.csv").symlink_to(table)
    for path in (table, tmp_path / "other.csv", tmp_path / "images" / ".." / "table.csv"):
        for given in (table, f"table:{table}"):
            assert "is one of the inputs" in refused(lambda path=path, given=given: check_output(path, [given]))
    check_output(tmp_path / "new" / "scores.csv", [table, "digits", "a\0b"])
    refused(lambda: check_output(images / "made" / "x.csv", [images]))
    refused(lambda: check_output_folder(images / "made", [images]))
    assert not (images / "made").exists()
    for folder, given in ((images, images), (images / "inner", images), (tmp_path, table)):
        refusal = refused(lambda folder=folder, given=given: check_output_folder(folder, [given]))
        assert "holds inputs, which the outputs could replace" in refusal
    check_output_folder(tmp_path / "clean", [images, table, "digits"])
    check_output_folder(tmp_path, [images])
