"""Graphs are dropped before a process group ends that may wait for them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from burnish.parallel import shutdown


class Holder:
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def drop(self) -> None:
        self.said.append("graph")


def group_of(device: str, said: list[str]) -> type:
    class Group:
        _device_types = (torch.device(device),)

        def shutdown(self, how: str = "slowly") -> str:
            said.append("group")
            return how

    return Group


def test_graphs_go_before_the_group() -> None:
    said: list[str] = []
    holder = Holder(said)
    shutdown._holders.add(holder)
    group = group_of("cuda", said)
    shutdown._wrap(group, "shutdown")
    assert group().shutdown(how="at once") == "at once"
    assert said == ["graph", "group"]
    del holder
    group().shutdown()
    assert said == ["graph", "group", "group"]


def test_a_group_of_cpus_waits_for_no_graph() -> None:
    said: list[str] = []
    holder = Holder(said)
    shutdown._holders.add(holder)
    group = group_of("cpu", said)
    shutdown._wrap(group, "shutdown")
    group().shutdown()
    assert said == ["group"]
    del holder


def test_torchs_groups_are_watched_from_the_first_graph_on() -> None:
    alone = Holder([])
    shutdown.drop_before_shutdown(alone)
    assert alone not in shutdown._holders
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shutdown.drop_before_shutdown(alone)
    assert alone in shutdown._holders
    assert hasattr(dist.ProcessGroup.shutdown, "__wrapped__")
    dist.destroy_process_group()
    assert not dist.is_initialized()
