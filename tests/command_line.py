"""The command line run in the test's process: exit code, standard output, standard error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import pytest
import typer

from heterokd.cli.app import app, main


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        """The JSON object that is all of stdout."""
        (line,) = self.out.splitlines()
        content = json.loads(line)
        assert isinstance(content, dict)
        return content


Run: TypeAlias = Callable[..., Done]


def run_command(capfd: pytest.CaptureFixture[str], *arguments: object, commands: typer.Typer = app) -> Done:
    """Run `heterokd ARGUMENTS`, or other commands."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments], commands)
    out, err = capfd.readouterr()
    code = left.value.code
    return Done(code if isinstance(code, int) else 0, out, err)
