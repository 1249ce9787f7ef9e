"""The hash under which measured times are kept changes with the kernels that were measured, and with no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from burnish import sources
from burnish.ops import gated_mlp, linear, rms_norm
from burnish.sources import code_of, compiled_parts, kernels_hash


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that the hashes are taken of."""
    copy = tmp_path / "burnish"
    shutil.copytree(sources._PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "_PACKAGE", copy)
    _forget()
    yield copy
    _forget()


def _forget() -> None:
    for cached in (sources.kernels_hash, sources._imported, sources._code):
        cached.cache_clear()


def test_another_ops_kernels_count_for_nothing(package: Path) -> None:
    before = {op.name: kernels_hash(op) for op in (linear, gated_mlp, rms_norm)}
    with (package / "kernels" / "gated.py").open("a") as file:
        file.write("\nANOTHER = tl.constexpr(1)\n")
    _forget()
    assert kernels_hash(gated_mlp) != before["gated_mlp"]
    assert kernels_hash(rms_norm) == before["rms_norm"]
    with (package / "kernels" / "launch.py").open("a") as file:  # what all of them import
        file.write("\nANOTHER: tl.constexpr = 1\n")
    _forget()
    assert kernels_hash(linear) != before["linear"]
    assert kernels_hash(rms_norm) != before["rms_norm"]


def test_what_launches_kernels_may_change(package: Path) -> None:
    before = kernels_hash(linear)
    with (package / "kernels" / "launch.py").open("a") as file:
        file.write("\nANOTHER = 1\n\n\ndef another() -> int:\n    return 1\n")
    _forget()
    assert kernels_hash(linear) == before


def test_compiled_parts_are_kernels_and_their_constants() -> None:
    source = """import triton
SIZE = tl.constexpr(4)
MOST = 5

@triton.jit(do_not_specialize=["rows"])
def kernel(rows):
    pass

def run():
    kernel[1](2)
@jit
def part():
    return SIZE
"""
    taken = ["SIZE = tl.constexpr(4)", '@triton.jit(do_not_specialize=["rows"])', "def kernel(rows):", "    pass"]
    assert compiled_parts(source).splitlines() == [*taken, "@jit", "def part():", "    return SIZE"]


def test_the_hash_of_kernels_is_that_of_their_code() -> None:
    source = '''"""Adds."""

def add(a, b):
    """Adds two."""
    return f"{a} and {b}", a + b  # the sum
'''
    same = 'def add(a, b):\n  # another comment\n\n  return f"{a} and {b}", a +   b\n'
    assert code_of(source) == code_of(same) == 'defadd(a,b):>returnf"{a}and{b}",a+b<'
    assert code_of(source) != code_of(source.replace("a + b", "a - b"))
    assert code_of('x = f"{{{a} {b!r:>{width}}}}"') == 'x=f"{{{a}{b!r:>{width}}}}"'  # Python 3.12 has two tokens for {{
    inside, after = (f"for i in x:\n    f(i)\n{indent}g(i)\n" for indent in ("    ", ""))
    assert code_of(inside) != code_of(after)
