# SPDX-License-Identifier: Apache-2.0
"""The command ``stmoe`` in this process, for the tests of what it prints and refuses."""

from __future__ import annotations

import pytest

from stmoe import cli

__all__ = ["ended", "refused"]


def ended(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run it: status, standard output, standard error."""
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(outcome: tuple[int, str, str]) -> str:
    """The message of a command that ended with status 2 and one line."""
    status, out, err = outcome
    assert (status, out) == (2, "") and err.startswith("stmoe: ") and err.count("\n") == 1, outcome
    return err.removeprefix("stmoe: ").removesuffix("\n")
