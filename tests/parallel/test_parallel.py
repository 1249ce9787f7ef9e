"""Models that two processes divide, or train together, over gloo: the same logits, gradients and tokens as in one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the models that are divided are Hugging Face's")

from tests.parallel import ranks


@pytest.mark.parametrize(
    ("module", "checks"),
    [
        ("checks", "CHECKS"),
        pytest.param("checks", "SLOW_CHECKS", marks=pytest.mark.slow),
        ("check_compiled", "CHECKS"),
    ],
)
def test_two_ranks_find_nothing_wrong(module: str, checks: str, tmp_path: Path) -> None:
    """All checks in one test: to start the processes takes longer than most of them."""
    wrong = ranks.run(f"tests.parallel.{module}", checks, tmp_path)
    if wrong:
        pytest.fail("\n\n".join(f"{name}: {error}" for name, error in wrong), pytrace=False)
