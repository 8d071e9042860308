"""All systems that a comparison knows, by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from studies.compare.normflows_peers import Glow, IResNet, RealNVP, ResidualFlow
from studies.compare.own import OWN
from studies.compare.peer import Peer
from studies.compare.sklearn_peers import CLASSICAL
from studies.compare.torchcfm_peers import FlowMatchingPeer
from studies.compare.zuko_peers import FFJORD, MAF, NSF
from torchcdm import __version__
from torchcdm.data import DataSource
from torchcdm.errors import UserError, nearest

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        *OWN,
        RealNVP(),
        Glow(),
        ResidualFlow(),
        IResNet(),
        NSF(),
        MAF(),
        FFJORD(),
        FlowMatchingPeer(),
        *CLASSICAL,
    )
}
"""In the order of the table's making."""


def chosen_peers(names: Sequence[str] | None, source: DataSource) -> list[Peer]:
    """The peers of these names; all that suit the data when None.

    Raises:
        UserError: An unknown name, a peer that cannot model these data, or one whose library is not installed.
    """
    if names is None:
        peers = [peer for peer in PEERS.values() if peer.unsuited(source.shape) is None]
    else:
        peers = [_named(name, source) for name in dict.fromkeys(names)]
    missing = sorted({peer.library for peer in peers if peer.library and find_spec(peer.library) is None})
    if missing:
        needing = ", ".join(peer.name for peer in peers if peer.library in missing)
        raise UserError(
            f"{', '.join(missing)} not installed, which {needing} come from; pip install 'torchcdm[studies]', or "
            "leave them out of --peers"
        )
    return peers


def library_of(peer: Peer) -> tuple[str, str]:
    """Name and version of the library that a peer comes from."""
    if peer.library is None:
        return ("scikit-learn", version("scikit-learn")) if peer in CLASSICAL else ("torchcdm", __version__)
    try:
        return peer.library, version(peer.library)
    except PackageNotFoundError:
        return peer.library, "unknown"


def _named(name: str, source: DataSource) -> Peer:
    if name not in PEERS:
        raise UserError(f"unknown peer '{name}'; {nearest(name, PEERS)}")
    why = PEERS[name].unsuited(source.shape)
    if why is not None:
        raise UserError(f"{name} does not suit {source.name}: {why}")
    return PEERS[name]
