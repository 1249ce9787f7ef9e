"""Cases that only the long matrices try (`make test-slow`)."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """These values of a parametrized test, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
