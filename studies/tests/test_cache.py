"""The cache of results: made once, of these settings alone, and never read where it is damaged."""

import pytest
import torch

from studies import cache
from torchcdm.errors import UserError

SETTINGS = {"data": {"name": "digits", "size": (8, 8)}, "steps": 3}


def made():
    return {"value": 1.5, "missing": float("nan")}, {"x": torch.arange(6.0).reshape(2, 3)}


def test_a_result_is_made_once_and_is_as_it_will_be_read(tmp_path):
    first = cache.kept(tmp_path / "a.json", SETTINGS, made)
    again = cache.kept(tmp_path / "a.json", SETTINGS, lambda: pytest.fail("made again"))
    assert first[0] == again[0] == {"value": 1.5, "missing": None}
    assert torch.equal(first[1]["x"], again[1]["x"]) and torch.equal(again[1]["x"], made()[1]["x"])
    assert cache.read(tmp_path / "b.json", SETTINGS) is None
    assert cache.kept(None, SETTINGS, lambda: ({"n": 1}, {})) == ({"n": 1}, {})


def test_other_settings_are_refused(tmp_path):
    cache.numbers(tmp_path / "a.json", SETTINGS, lambda: {"value": 1})
    with pytest.raises(UserError, match=r"a\.json: was made with data.size = \[8, 8\], not \[8, 9\]; remove it"):
        cache.read(tmp_path / "a.json", SETTINGS | {"data": {"name": "digits", "size": (8, 9)}})


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_a_flipped_bit_is_found(tmp_path, name):
    cache.kept(tmp_path / "a.json", SETTINGS, made)
    content = bytearray((tmp_path / name).read_bytes())
    content[-8] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: damaged, .*; restore it from a copy, or make it again"):
        cache.read(tmp_path / "a.json", SETTINGS)
