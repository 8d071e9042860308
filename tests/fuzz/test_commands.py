"""Every option of every command with values that nobody meant."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from endings import ending
from hypothesis import HealthCheck, given, settings, strategies as st
from small_runs import small_config, small_flags

from torchcdm.cli.arguments import Parser
from torchcdm.cli.commands import add_commands
from torchcdm.training.loop import train

TEXTS = (
    "", " ", "-", "null", "no", "~", "2020", "1e3", "0", "1", "2", "-1", "3.5", "nan", "inf", "-inf", "1e39", "10**9",
    "99999999999999999999", "²", "a: b", "photos #1", "[1, 2", "{a: 1}", "*x", "!!python/object:os.system", "💥",
    "a\nb", "a\0b", "x" * 5000, "/dev/null", "/dev/full", "/proc/self/mem", "%s", "true", "cpu", "cuda:99", "meta",
    "8x8", "0x0", "-3x4", "single,elbo", ",", "single,single", "ddim", "balanced",
)  # fmt: skip
"""For options of any kind."""

PLACES = ("absent", "empty-file", "folder", "fifo", "loop", "text.csv", "noise.npy", "broken.png", "run/config.json")
"""Files and folders of the fixture, for options that take a path and those that don't."""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    root = Parser(prog="cdm")
    commands = root.add_subparsers(parser_class=Parser)
    add_commands(commands)
    return dict(commands.choices)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, small data, and things that are no data."""
    folder = tmp_path_factory.mktemp("fuzz")
    train(small_config(train__steps="2", sampling__n="0"), folder / "run", device="cpu", progress=False)
    shutil.copytree(folder / "run", folder / "kept")
    rng = np.random.default_rng(0)
    np.save(folder / "noise.npy", rng.integers(0, 17, (12, 1, 8, 8)).astype(np.float32))
    np.save(folder / "one.npy", rng.integers(0, 17, (1, 1, 8, 8)).astype(np.float32))
    np.save(folder / "a.npy", rng.normal(size=(40, 2)))
    np.save(folder / "b.npy", rng.normal(size=(40, 2)))
    (folder / "text.csv").write_text("a,b\n1,2\n3,x\n")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "empty-file").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def valid(place: Path) -> dict[str, list[str]]:
    """A call of each command that does as little as possible."""
    run, quick = str(place / "run"), ["--device", "cpu"]
    return {
        "train": ["digits", "--out", str(place / "new"), "--quiet", *quick,
                  *small_flags(train__steps="1", sampling__n="0", report__methods="[single]", report__limit="2")],
        "presets": [],
        "sample": [run, "--n", "1", "--steps", "1", "--out", str(place / "samples"), "--quiet", *quick],
        "nll": [run, "--limit", "2", "--methods", "single", "--quiet", *quick],
        "evaluate": [run, "--limit", "2", "--draws", "1", *quick],
        "score": [run, str(place / "noise.npy"), "--limit", "20", *quick],
        "ratio": [str(place / "a.npy"), str(place / "b.npy"), str(place / "a.npy"), "--steps", "1", "--quiet", *quick],
        "denoise": [run, str(place / "noise.npy"), "--level", "1", "--out", str(place / "clean"), *quick],
        "restore": [run, str(place / "one.npy"), "--blur", "1", "--n", "1", "--particles", "2", "--quiet",
                    "--out", str(place / "restored"), *quick],
        "info": [run],
        "convert": [str(place / "noise.npy"), str(place / "converted"), "--preset", "cifar10"],
    }  # fmt: skip


def options() -> list[tuple[str, str]]:
    """Every option that takes a value, and every place of an argument without a name."""
    found = []
    for name, parser in parsers().items():
        for action in parser._actions:
            if action.nargs != 0 and not isinstance(action, argparse._HelpAction):
                found.append((name, action.option_strings[0] if action.option_strings else action.dest))
    return found


def call(place: Path, command: str, option: str, value: str) -> list[str]:
    """The valid call with one value in the place of another."""
    words = valid(place).get(command, [])
    parser = parsers()[command]
    positional = [action.dest for action in parser._actions if not action.option_strings]
    if option in positional:
        index = positional.index(option)
        words = [*words[:index], value, *words[index + 1 :]]
    else:
        words = [*words, f"{option}={value}"]
    return [command, *words]


def check(place: Path, command: str, option: str, value: str) -> None:
    """Runs one case in a folder whose run is whole before and after."""
    before = os.getcwd()
    os.chdir(place)
    try:
        ending(call(place, command, option, value))
    finally:
        os.chdir(before)
        if command in ("train", "convert"):
            shutil.rmtree(place / "run")
            shutil.copytree(place / "kept", place / "run")
            shutil.rmtree(place / "new", ignore_errors=True)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=st.sampled_from(options()), value=st.sampled_from((*TEXTS, *PLACES)) | st.text(max_size=20))
def test_a_value_that_nobody_meant(place: Path, case: tuple[str, str], value: str) -> None:
    check(place, *case, value)


@pytest.mark.slow
@pytest.mark.parametrize("case", options(), ids="".join)
def test_every_value_for_every_option(place: Path, case: tuple[str, str]) -> None:
    for value in (*TEXTS, *PLACES):
        check(place, *case, value)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.sampled_from((*parsers(), *TEXTS, "--json", "--n", "--", "--help", "--x.y")), max_size=6))
def test_words_in_any_order(place: Path, words: list[str]) -> None:
    before = os.getcwd()
    os.chdir(place)
    try:
        ending(words)
    finally:
        os.chdir(before)
