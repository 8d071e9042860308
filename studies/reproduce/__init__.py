"""The paper's tables and figures, and checks against known truth, by one command each."""

from studies.reproduce.registry import REPRODUCTIONS, reproduce
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.workspace import SCALES, Workspace

__all__ = ["REPRODUCTIONS", "SCALES", "Figure", "Result", "Table", "Workspace", "reproduce"]
