"""Whom a model's parts are divided among: the ranks of one process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Mesh: TypeAlias = "DeviceMesh | dist.ProcessGroup | None"
"""A mesh of one dimension, a process group, or None for all processes."""


def group_of(mesh: Mesh) -> dist.ProcessGroup:
    """The process group of a mesh.

    RuntimeError where no process group was initialized, ValueError for a mesh of several dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialized: start the processes with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if mesh is None:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if mesh.ndim != 1:
        raise ValueError(f"mesh: one dimension is needed, not {mesh.ndim}; choose one, such as mesh['tp']")
    return mesh.get_group()


def named(group_name: str) -> dist.ProcessGroup:
    """The process group of that name; graphs know groups by name."""
    return torch._C._distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]


def rank_and_size(group_name: str) -> tuple[int, int]:
    """This process's rank in the group of that name, and how many there are."""
    group = named(group_name)
    return dist.get_rank(group), dist.get_world_size(group)


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors may be that this group sends: the current GPU, where both have one."""
    is_cuda = torch.cuda.is_available() and any(device.type == "cuda" for device in group._device_types)
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
