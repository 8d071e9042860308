"""The help of every command: its examples are understood, and it tells the defaults that the code has."""

import inspect
import re

import pytest

from torchcdm.cli import main
from torchcdm.cli.arguments import Parser
from torchcdm.cli.commands import add_commands
from torchcdm.compose.sampling import OF_VECTORS, SAMPLER, STEPS, WITH_MOVES
from torchcdm.likelihood import Scoring
from torchcdm.likelihood.log_z import SWEEPS
from torchcdm.samplers import SAMPLERS
from torchcdm.training.evaluation import evaluate

COMMANDS = Parser(prog="cdm").add_subparsers(parser_class=Parser)
add_commands(COMMANDS)
PARSERS = dict(COMMANDS.choices)


def help_of(command, flag):
    """What the help of a command says of a flag."""
    (action,) = (action for action in PARSERS[command]._actions if flag in action.option_strings)
    return action.help


@pytest.mark.parametrize("command", PARSERS)
def test_help_shows_an_example_that_the_parser_understands(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    examples = capsys.readouterr().out.split("example:")[1].strip().splitlines()
    for example in examples:
        words = re.sub(r"^.* -m torchcdm|^cdm", "", example.strip()).split()
        assert words[0] == command
        PARSERS[command].parse_args(words[1:])  # a UserError where one is not known


def test_the_help_of_sample_names_every_sampler_and_the_defaults():
    text = help_of("sample", "--sampler")
    names = re.findall(r"[a-z]+\d*\+*", text.split(": one evaluation")[0])
    assert {*names, "heun"} == set(SAMPLERS)
    assert text.endswith(f"({SAMPLER}; {OF_VECTORS} of tables; {WITH_MOVES} with moves)")
    assert f"({STEPS})" in help_of("sample", "--steps")


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [
        ("nll", "--draws", Scoring().draws),
        ("nll", "--flow-steps", Scoring().steps),
        ("nll", "--flow-probes", Scoring().probes),
        ("nll", "--sweeps", SWEEPS),
        ("evaluate", "--draws", inspect.signature(evaluate).parameters["draws"].default),
    ],
)
def test_numbers_in_the_help_are_the_defaults(command, flag, default):
    assert help_of(command, flag).endswith(f"({default})")
