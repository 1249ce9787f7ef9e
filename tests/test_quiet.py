"""What libraries say while they export does not reach the user, and afterwards they may talk again."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from burnish._quiet import quiet


def test_nothing_is_heard_within(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.talkative")
    logger.setLevel(logging.INFO)

    def talk() -> None:
        with quiet("tests.talkative"):
            logger.error("a shape")
            warnings.warn("deprecated", stacklevel=1)
            print("the partial graph", file=sys.stderr)
            raise ZeroDivisionError

    with warnings.catch_warnings(record=True) as warned, pytest.raises(ZeroDivisionError):
        talk()
    assert (caplog.records, warned, capfd.readouterr().err) == ([], [], "")
    assert logger.level == logging.INFO
    print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"
