"""Spares what torch does while it traces and nobody asks for: it takes longer than running the model's own code.

What is exchanged are torch's private parts. Where a version has one no longer, capture works, and takes its time.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from traceback import FrameSummary, StackSummary
from types import CodeType
from typing import Any

from torch import fx
from torch.fx import proxy

_ONE_AT_A_TIME = threading.RLock()  # what is exchanged here is the process's


@contextlib.contextmanager
def little_overhead() -> Iterator[None]:
    """Within the `with`, tracing makes the same graphs in less time."""
    with _ONE_AT_A_TIME, _garbage_kept(), _frames_remembered(), _code_when_called(), _cache_not_filled():
        yield


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """No collector: it would go over the growing graph again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _code_when_called() -> contextlib.AbstractContextManager[None]:
    """Graphs get code when they are called: export makes half a dozen that never are."""
    recompile: Any = getattr(fx.GraphModule, "recompile", None)

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        recompile(self)  # which replaces this
        return self(*args, **kwargs)

    def postpone(self: fx.GraphModule) -> None:
        type(self).forward = forward

    return replaced(fx.GraphModule, "recompile", postpone)


def _frames_remembered() -> contextlib.AbstractContextManager[None]:
    """The Python stack that is noted at every node, some hundred frames, is not described anew each time."""
    return replaced(proxy, "CapturedTraceback", _Frames())


def _cache_not_filled() -> contextlib.AbstractContextManager[None]:
    """The results of operators are looked up before torch's own cache is asked; it only takes its time to fill."""
    from torch._dynamo import config  # a second, which whoever captures spends anyway

    known = hasattr(config, "fake_tensor_cache_enabled")
    return config.patch(fake_tensor_cache_enabled=False) if known else contextlib.nullcontext()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the `with`, the attribute `name` of a module or class is `value`. Where it has no such attribute, nothing
    is changed."""
    if not hasattr(owner, name):
        yield
        return
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _Frames:
    """In place of the `CapturedTraceback` of `torch.fx.proxy`."""

    _OWN = os.path.join(os.path.dirname(__file__), "capture_")

    def __init__(self) -> None:
        # By the code's identity: its hash goes over all of the code.
        self._known: dict[tuple[int, int], tuple[FrameSummary, CodeType]] = {}

    def extract(self, **kwargs: Any) -> _Frames:
        return self

    def summary(self) -> StackSummary:
        """The frames of whoever asks, the outermost first."""
        found = []
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            key = (id(code), frame.f_lasti)
            if key not in self._known:
                self._known[key] = FrameSummary(code.co_filename, frame.f_lineno, code.co_name), code
            if not code.co_filename.startswith(self._OWN):
                found.append(self._known[key][0])
            frame = frame.f_back  # type: ignore[assignment]
        return StackSummary(reversed(found))
