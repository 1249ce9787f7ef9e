"""Models divided among two processes, over gloo: the same logits, gradients and tokens as in one."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the models that are divided are Hugging Face's")

from tests.parallel import checks, ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What two processes found, for all tests at once: to start them takes seconds."""
    return ranks.run("tests.parallel.checks", "CHECKS", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return ranks.run("tests.parallel.checks", "SLOW_CHECKS", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", checks.CHECKS)
def test_on_two_ranks(name: str, found: dict[str, list[str]]) -> None:
    assert_right(name, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.SLOW_CHECKS)
def test_on_two_ranks_slowly(name: str, found_slowly: dict[str, list[str]]) -> None:
    assert_right(name, found_slowly)


def assert_right(name: str, found: dict[str, list[str]]) -> None:
    if name not in found:
        pytest.fail("a check before this one failed", pytrace=False)
    if found[name]:
        pytest.fail("\n".join(found[name]), pytrace=False)
