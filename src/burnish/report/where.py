"""Where in the user's code a node comes from: its module's path and class, its source line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in .*\n(?P<code>(?!\s*File ").*)?', re.MULTILINE)
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Source:
    """A line of code: `place` is "modeling_bert.py:175". Both are empty where it is not known."""

    place: str = ""
    code: str = ""


def modules_of(node: fx.Node) -> list[tuple[str, str]]:
    """The modules in whose forward the node was captured, outermost first: (path, class name); the model's path is
    ""."""
    stack = node.meta.get("nn_module_stack") or {}
    found = []
    for path, kind in stack.values():
        name = kind if isinstance(kind, str) else kind.__name__
        if not name.startswith("_empty_nn_module_stack"):  # what export says of nodes that it makes itself
            found.append((path.partition("@")[0], name.rpartition(".")[2]))  # "path@1" is a module's second call
    return found


def path_of(node: fx.Node) -> str:
    """The path of the innermost module, "" for the model itself."""
    modules = modules_of(node)
    return modules[-1][0] if modules else ""


def source_of(node: fx.Node) -> Source:
    """The innermost line outside of torch: where a model calls `self.query`, rather than where nn.Linear multiplies."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return Source()
    own = [frame for frame in frames if not frame["file"].startswith((_TORCH, "torch/"))]
    frame = own[-1] if own else frames[-1]
    return Source(f"{Path(frame['file']).name}:{frame['line']}", (frame["code"] or "").strip())
