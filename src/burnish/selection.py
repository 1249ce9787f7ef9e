"""What holds while a call runs: the Impls that `use()` names, and that autocast keeps its hands off an Op's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_chosen: ContextVar[Mapping[str, str]] = ContextVar("burnish_use")
_NONE: Mapping[str, str] = {}
_OFF: AbstractContextManager[None] = nullcontext()


def chosen_impls() -> Mapping[str, str]:
    """Impl names by Op name, as the `use()` around this call gives them."""
    return _chosen.get(_NONE)


@contextmanager
def choosing(impls: Mapping[str, str]) -> Iterator[None]:
    """Within the `with`, these Impls are chosen, and no others."""
    token = _chosen.set(impls)
    try:
        yield
    finally:
        _chosen.reset(token)


def without_autocast(args: Iterable[Any]) -> AbstractContextManager[Any]:
    """torch.autocast off, for the device that the tensors among `args` are on."""
    if not torch._C._is_any_autocast_enabled():
        return _OFF
    return torch.autocast(next(a.device.type for a in args if isinstance(a, Tensor)), enabled=False)
