"""Run the command in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from burnish.cli import app


def run(*args: str) -> str:
    """The command's stdout; it must succeed."""
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def run_json(*args: str) -> Any:
    return json.loads(run(*args, "--json"))


def fails(*args: str) -> str:
    """The command's error: one line on stderr, nothing on stdout, exit code 2."""
    result = CliRunner().invoke(app, args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("burnish: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("burnish: ").rstrip("\n")
