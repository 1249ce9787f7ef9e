"""What the ranks of a divided model decide together.

A model with collectives in it runs on all ranks or on none. So whatever decides how often it is run has to come out
alike on each of them: what a check found, what a clock said, which Impl is fastest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from burnish.parallel.graphs import group_names

Data = TypeVar("Data")  # what JSON can say


class Agreement:
    """Between the ranks of the groups that a model is divided among; of one process with itself until it joins some."""

    def __init__(self) -> None:
        self._groups: list[str] = []

    @property
    def is_shared(self) -> bool:
        """Whether there are others to agree with."""
        return bool(self._groups)

    def join_model(self, model: nn.Module) -> None:
        """Joins the groups that the modules are divided among."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        from burnish.parallel.hooks import group_names_of

        self._join(group_names_of(model))

    def join_graph(self, graph: fx.Graph) -> None:
        """Joins the groups whose collectives a captured graph calls."""
        self._join(group_names(graph))

    def _join(self, names: Iterable[str]) -> None:
        self._groups.extend(name for name in dict.fromkeys(names) if name not in self._groups)

    def all_of(self, oks: Sequence[bool]) -> list[bool]:
        """Each one, where it is so on every rank. All ranks have to ask for as many."""
        if not self.is_shared or not oks:
            return list(oks)
        import torch.distributed as dist

        for group, device in self._places():
            bits = torch.tensor(oks, dtype=torch.int32, device=device)
            dist.all_reduce(bits, dist.ReduceOp.MIN, group=group)
            oks = [bool(bit) for bit in bits.tolist()]
        return list(oks)

    def all(self, ok: bool) -> bool:
        """Whether it is so on every rank."""
        return self.all_of([ok])[0]

    def first(self, value: Data) -> Data:
        """The first rank's value, of whatever JSON can say (no pickle goes over the wire)."""
        for group, device in self._places():
            sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
            value = json.loads(bytes(_from_first(sent, group).tolist()))
        return value

    def _places(self) -> list[tuple[torch.distributed.ProcessGroup, torch.device]]:
        """Each group, with where tensors have to be for it. Of a mesh's rows and columns, one after the other: so the
        corner's word reaches everyone."""
        if not self.is_shared:
            return []
        from burnish.parallel.group import device_of, named

        groups = [named(name) for name in self._groups]
        return [(group, device_of(group)) for group in groups]


def _from_first(sent: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The first rank's bytes."""
    import torch.distributed as dist

    length = torch.tensor([sent.numel()], device=sent.device)
    dist.broadcast(length, group=group, group_src=0)
    count = int(length)
    received = sent if dist.get_rank(group) == 0 else torch.empty(count, dtype=torch.uint8, device=sent.device)
    dist.broadcast(received, group=group, group_src=0)
    return received
