"""The one rule for seeds."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *keys: int | str) -> int:
    """A seed of 63 bits for one purpose: independent streams for different keys."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *keys))
