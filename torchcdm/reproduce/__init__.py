"""The paper's tables and figures, and checks against known truth, by one command each."""

from torchcdm.reproduce.registry import REPRODUCTIONS, reproduce
from torchcdm.reproduce.result import Figure, Result, Table
from torchcdm.reproduce.workspace import SCALES, Workspace

__all__ = ["REPRODUCTIONS", "SCALES", "Figure", "Result", "Table", "Workspace", "reproduce"]
