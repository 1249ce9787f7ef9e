"""Hashes of the kernels' code: what was measured of one version says nothing of the next."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

from burnish.op import Op

_PACKAGE = Path(__file__).parent
_FSTRING_MIDDLE = getattr(tokenize, "FSTRING_MIDDLE", None)  # since Python 3.12, which takes f-strings apart


@functools.cache
def kernels_hash(op: Op) -> str:
    """Of the kernels that the Op's Impls may run: of what is compiled in every file of `burnish.kernels` that its files
    import, and those import, wherever the import stands. Other Ops' kernels can change without it, and so can what
    launches them."""
    seen: set[Path] = set()
    to_visit = [file for impl in op.impls.values() if (file := _file(impl.fn.__module__))]
    while to_visit:
        file = to_visit.pop()
        if file not in seen:
            seen.add(file)
            to_visit += _imported(file)
    kernels = sorted(file for file in seen if file.parent.name == "kernels")
    return hashlib.sha256("".join(map(_code, kernels)).encode()).hexdigest()[:12]


@functools.cache
def _imported(file: Path) -> list[Path]:
    """The files of `burnish.ops` and `burnish.kernels` that a file imports."""
    statements = (
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
    )
    return [found for node in statements for found in _named(node)]


def _named(node: ast.ImportFrom) -> Iterator[Path]:
    module = node.module or ""
    if file := _file(module):
        yield file
    else:
        yield from (file for alias in node.names if (file := _file(f"{module}.{alias.name}")))


def _file(module: str) -> Path | None:
    package, *path = module.split(".")
    if package != "burnish" or path[:1] not in (["ops"], ["kernels"]):
        return None
    file = _PACKAGE.joinpath(*path).with_suffix(".py")
    return file if file.is_file() else None


@functools.cache
def _code(file: Path) -> str:
    return code_of(compiled_parts(file.read_text(encoding="utf-8")))


def compiled_parts(source: str) -> str:
    """The functions that are compiled for a GPU, which have a decorator called jit, and the constants that they may
    read, which are constexpr."""
    parts = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min((decorator.lineno for decorator in node.decorator_list), default=node.lineno)
            taken = any(_is_jit(decorator) for decorator in node.decorator_list)
        else:
            first, taken = node.lineno, isinstance(node, ast.Assign | ast.AnnAssign) and "constexpr" in ast.dump(node)
        if taken:
            parts += source.splitlines()[first - 1 : node.end_lineno]
    return "\n".join(parts) + "\n"


def _is_jit(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return (called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")) == "jit"


def code_of(source: str) -> str:
    """The source without comments, docstrings and white space: what is measured does not depend on them. Of what is
    indented only where it begins (>) and ends (<) is kept."""
    kept, starts_statement = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            kept.append(">" if token.type == tokenize.INDENT else "<")
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            continue
        if not (starts_statement and token.type == tokenize.STRING):
            kept.append("".join(_text(token).split()))
        starts_statement = token.type == tokenize.NEWLINE
    return "".join(kept)


def _text(token: tokenize.TokenInfo) -> str:
    """As it stands in the source, with every Python: a table of measured times has to hold for all of them."""
    if token.type == _FSTRING_MIDDLE:
        return token.string.replace("{", "{{").replace("}", "}}")
    return token.string
