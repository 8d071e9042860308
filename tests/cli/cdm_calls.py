"""Calls of ``cdm`` that succeed, and that are refused."""

from torchcdm.cli import main


def succeed(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refuse(capsys, *words):
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("cdm: "), error
    return error
