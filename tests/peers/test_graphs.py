"""Peers as CUDA graphs: right, launched once, and called where they cannot be captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.bench import Within
from burnish.peers.graphs import in_graphs


@pytest.mark.gpu
def test_what_can_be_captured_is_replayed() -> None:
    x, calls = torch.rand(64, device="cuda"), []

    def plain(x: Tensor) -> Tensor:
        calls.append("plain")
        return x + 1

    def reads_on_the_host(x: Tensor) -> Tensor:
        calls.append("host")
        return x * int(x.sum())

    variants = in_graphs({"plain": plain, "host": reads_on_the_host, "within": Within(plain, torch.no_grad)}, (x,))
    calls.clear()
    assert torch.equal(variants["plain"](x), x + 1)  # type: ignore[arg-type]
    assert torch.equal(variants["within"](x), x + 1)  # type: ignore[arg-type]
    assert not calls
    variants["host"](x)
    assert calls == ["host"]
