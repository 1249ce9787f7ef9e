"""Events of a trace, as Kineto writes them, made by hand."""

from __future__ import annotations

from typing import Any


def host(category: str, name: str, start: float, us: float, thread: int = 7, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": us, "tid": thread, "args": args}


def on_device(name: str, start: float, us: float, correlation: int, category: str = "kernel", **args: Any) -> Any:
    return host(category, name, start, us, thread=20, correlation=correlation, **args)
