"""Proxies that know what the graph knows about their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


class ValueProxy(fx.Proxy):
    """A proxy that answers questions about its value as the graph knows it, instead of recording them."""

    def _known(self) -> torch.Tensor | None:
        value = self.node.meta.get("val")
        return value if isinstance(value, torch.Tensor) else None

    @property
    def shape(self) -> Any:
        value = self._known()
        if value is None:
            return fx.proxy.Attribute(self, "shape")
        return tuple(self._size(i, s) for i, s in enumerate(value.shape))

    def _size(self, dim: int, size: Any) -> Any:
        if isinstance(size, int):
            return size
        return self.tracer.create_proxy("call_function", torch.ops.aten.sym_size.int, (self, dim), {})

    def size(self, dim: int | None = None) -> Any:
        if self._known() is None:
            return fx.proxy.Attribute(self, "size")(*(() if dim is None else (dim,)))
        return self.shape if dim is None else self.shape[dim]

    @property
    def dtype(self) -> Any:
        value = self._known()
        return fx.proxy.Attribute(self, "dtype") if value is None else value.dtype

    @property
    def device(self) -> Any:
        value = self._known()
        return fx.proxy.Attribute(self, "device") if value is None else value.device

    @property
    def ndim(self) -> Any:
        value = self._known()
        return fx.proxy.Attribute(self, "ndim") if value is None else value.dim()

    def dim(self) -> Any:
        value = self._known()
        return fx.proxy.Attribute(self, "dim")() if value is None else value.dim()
