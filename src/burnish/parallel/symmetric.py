"""Memory of each GPU that the others of its group write to over NVLink: where kernels exchange what they sum.

Few rows travel as words of which half is a flag (`kernels/all_reduce_norm.py`), many as they are, with a flag behind
each (`kernels/all_reduce_norm_rows.py`). Both count the same calls. A GPU keeps 64 MiB and a
little for it, among however many.

There is one room for each group and device, set up by all ranks together (`set_up` is a collective), of a size that
never changes: CUDA graphs hold its addresses. It goes with the process group. Calls that use it have to follow each
other on the device, as the collectives of one group have to anyway.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from burnish.parallel.group import Mesh

Made = TypeVar("Made")

MOST_RANKS = 8
"""The GPUs of one NVLink domain, in most machines."""

MOST_BYTES = 512 << 10
"""What a rank may send to all others in one call: each gets all of it, where NCCL's ring sends less the more there are.
Of 512 KiB between two ranks that is 2 us at 450 GB/s, with the flags 4; NCCL takes that long to begin."""

MOST_ROWS = 128
"""Programs that wait for each other have to run at the same time: an A100 has 108 multiprocessors, each with room for
several of them."""

MOST_ROW_BYTES = 16 << 10
"""Of a longer row threads have more words to hold than registers, and spill (of 32 KiB 64 bytes with 32 warps)."""

MOST_PUSHED_BYTES = 32 << 20
"""What a rank may push to all others in one call as plain rows, and what it keeps for each of odd and even calls: 2048
rows of 8192 numbers of two bytes between two ranks, 75 us at 450 GB/s."""

MOST_PUSHED_ROWS = 32 << 10
"""Each has a flag: of MOST_PUSHED_BYTES that is so for rows of 1 KiB and more."""

_WORD = 4  # bytes of a row beside each flag of as many
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@dataclass(frozen=True)
class Room:
    """One rank's share of a group's symmetric memory, with the way to the others'.

    Attributes:
        words: what arrives here, int64 (2, ranks, capacity): for odd and for even calls, from each rank. The upper half
            of a word says of which call the lower half is.
        addresses: where each rank's `words` begin, int64 (ranks,), on the device.
        state: int32 (2,), on the device: the number of the next call, and how many programs have begun it.
        rank: this process's in the group.
        pushed: what arrives here as plain rows, int32 (2, ranks - 1, MOST_PUSHED_ROWS + capacity): for odd and for even
            calls, from each other rank in their order. First come the rows' flags, which say of which call they are,
            then the rows themselves.
        pushed_addresses: where each rank's `pushed` begins, int64 (ranks,), on the device.
    """

    words: Tensor
    addresses: Tensor
    state: Tensor
    rank: int
    pushed: Tensor
    pushed_addresses: Tensor

    @property
    def ranks(self) -> int:
        return int(self.words.shape[1])

    @property
    def capacity(self) -> int:
        """Words that one rank can send to another in a call."""
        return int(self.words.shape[2])

    @property
    def pushed_share(self) -> int:
        """Words of one rank in `pushed`, flags among them."""
        return int(self.pushed.shape[2])


def capacity_of(ranks: int, most_bytes: int = MOST_BYTES) -> int:
    """Words for each rank: a multiple of 16, so that a warp's loads are aligned wherever a rank's share begins."""
    return most_bytes // _WORD // max(1, ranks - 1) // 16 * 16


def pushed_shape(ranks: int) -> tuple[int, int, int]:
    """The shape of `Room.pushed`."""
    return 2, ranks - 1, MOST_PUSHED_ROWS + capacity_of(ranks, MOST_PUSHED_BYTES)


_rooms: dict[tuple[str, torch.device], tuple[weakref.ref[torch.distributed.ProcessGroup], Room | str]] = {}


def find(group_name: str, device: torch.device) -> Room | None:
    """The room of a group on a device; None where there is none."""
    found = _known(group_name, device)
    return found if isinstance(found, Room) else None


def why_not(group_name: str, device: torch.device, rows: int, row_bytes: int) -> list[str]:
    """Reasons against exchanging `rows` rows of so many bytes by symmetric memory, as words that say of which call they
    are. Asks no other rank."""
    found = _room_or_reason(group_name, device)
    if isinstance(found, str):
        return [found]
    reasons = []
    if rows > MOST_ROWS:
        reasons.append(f"there are {rows} rows; up to {MOST_ROWS} programs wait for each other at the same time")
    reasons += _too_long(row_bytes)
    if row_bytes % _WORD:
        reasons.append(f"rows of {row_bytes} bytes are no multiple of {_WORD}")
    return reasons + _too_much(rows * row_bytes, found.capacity * _WORD, found.ranks)


def why_not_pushed(group_name: str, device: torch.device, rows: int, row_bytes: int) -> list[str]:
    """The same for rows that are pushed as they are, with a flag each behind them."""
    found = _room_or_reason(group_name, device)
    if isinstance(found, str):
        return [found]
    reasons = []
    if rows > MOST_PUSHED_ROWS:
        reasons.append(f"there are {rows} rows; {MOST_PUSHED_ROWS} have flags")
    capacity = (found.pushed_share - MOST_PUSHED_ROWS) * _WORD
    return reasons + _too_long(row_bytes) + _too_much(rows * row_bytes, capacity, found.ranks)


def _room_or_reason(group_name: str, device: torch.device) -> Room | str:
    if not group_name:
        return "this process is alone: there is nothing to exchange"
    return _known(group_name, device) or (
        "no symmetric memory is set up for the group; burnish.optimize() of a divided model does so, and "
        "burnish.parallel.set_up_symmetric_memory, which all ranks have to call"
    )


def _too_long(row_bytes: int) -> list[str]:
    if row_bytes <= MOST_ROW_BYTES:
        return []
    return [f"rows of {row_bytes} bytes do not fit a program's registers; {MOST_ROW_BYTES} do"]


def _too_much(sent: int, most: int, ranks: int) -> list[str]:
    if sent <= most:
        return []
    return [f"{sent} bytes are more than the {most} up to which each rank sends all that it has to each of {ranks - 1}"]


def set_up_symmetric_memory(mesh: Mesh = None) -> str | None:
    """Memory by which the ranks of a mesh exchange small tensors faster than by NCCL, on the current device of each;
    `burnish.optimize()` of a divided model sets it up by itself. All ranks have to call this. Returns why there can be
    none, or None. RuntimeError where no process group was initialized, ValueError for a mesh of several dimensions."""
    from burnish.parallel.group import device_of, group_of

    group = group_of(mesh)
    return set_up(group.group_name, device_of(group))


def set_up(group_name: str, device: torch.device) -> str | None:
    """Sets the room of a group up, where that was not tried yet; all ranks of the group have to call this, each with
    its own device. Returns why there is none, the same on all ranks in whether there is one.

    Not while a CUDA graph is being captured: then nothing is set up, and a later call tries again.
    """
    found = _known(group_name, device)
    if found is None:
        from burnish.parallel.group import named

        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "symmetric memory cannot be set up while a CUDA graph is being captured"
        group, key = named(group_name), (group_name, device)
        found = _set_up(group, device)
        _rooms[key] = weakref.ref(group), found
        weakref.finalize(group, _forget, key)
    return found if isinstance(found, str) else None


def _known(group_name: str, device: torch.device) -> Room | str | None:
    known = _rooms.get((group_name, device))
    if known is None:
        return None
    from burnish.parallel.group import named

    group, found = known
    try:
        same = group() is named(group_name)
    except (RuntimeError, ValueError):  # the group is gone
        same = False
    if not same:  # another one has the name now
        _rooms.pop((group_name, device), None)
    return found if same else None


def _forget(key: tuple[str, torch.device]) -> None:
    known = _rooms.get(key)
    if known is not None and known[0]() is None:
        del _rooms[key]


def _set_up(group: torch.distributed.ProcessGroup, device: torch.device) -> Room | str:
    """Each step by all ranks, or by none: whoever is alone in it would wait for ever."""
    reason = _why_not_here(group, device)
    if not _all(reason is None, group):
        return reason or "another rank of the group cannot set symmetric memory up"
    host = zlib.crc32(f"{socket.gethostname()} {_boot_id()}".encode())
    if not _same(host, group):
        return "the ranks are on different machines: they share no NVLink"
    memory = _tried(lambda: _allocate(group, device))
    if not _all(not isinstance(memory, str), group) or isinstance(memory, str):
        return memory if isinstance(memory, str) else "another rank of the group got no symmetric memory"
    made = _tried(lambda: _rendezvous(group, device, memory))
    if not _all(not isinstance(made, str), group):
        return made if isinstance(made, str) else "another rank of the group could not set symmetric memory up"
    return made


def _tried(step: Callable[[], Made]) -> Made | str:
    """What a step makes, or why it cannot: without driver support, memory, or a way between two GPUs."""
    try:
        return step()
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"torch could not set symmetric memory up: {str(error).splitlines()[0]}"


def _why_not_here(group: torch.distributed.ProcessGroup, device: torch.device) -> str | None:
    import torch.distributed as dist

    ranks = dist.get_world_size(group)
    if device.type != "cuda":
        return f"symmetric memory is for CUDA devices, not for {device.type}"
    if "nccl" not in str(dist.get_backend(group)):
        return f"the group's backend is {dist.get_backend(group)}, not nccl: its processes may share a GPU"
    if not 2 <= ranks <= MOST_RANKS:
        return f"the group has {ranks} ranks; symmetric memory is for 2 to {MOST_RANKS}"
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return f"torch {torch.__version__} has no symmetric memory"
    return None


def _allocate(group: torch.distributed.ProcessGroup, device: torch.device) -> list[Tensor]:
    """`words` and `pushed` of a room, of zeros. RuntimeError where there is no such memory."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import _SymmetricMemory

    ranks = dist.get_world_size(group)
    words = (2, ranks, capacity_of(ranks)), torch.int64
    # Allocations of their own, where `empty` may give a part of one: peers are told where allocations begin.
    with torch.cuda.device(device), _without_multicast():
        return [
            _SymmetricMemory.empty_strided_p2p(shape, (shape[1] * shape[2], shape[2], 1), dtype, device).zero_()
            for shape, dtype in (words, (pushed_shape(ranks), torch.int32))
        ]


def _rendezvous(group: torch.distributed.ProcessGroup, device: torch.device, memory: Sequence[Tensor]) -> Room:
    """RuntimeError where some GPU cannot write to another's memory."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory

    rank = dist.get_rank(group)
    with torch.cuda.device(device), _without_multicast():
        handles = [_symmetric_memory.rendezvous(mine, group.group_name) for mine in memory]
        found = [list(map(int, handle.buffer_ptrs)) for handle in handles]
        if not all(at[rank] == mine.data_ptr() and all(at) for at, mine in zip(found, memory, strict=True)):
            raise RuntimeError("not every GPU of the group can write to each other's memory")
        (words, pushed), addresses = memory, [torch.tensor(at, dtype=torch.int64, device=device) for at in found]
        state = torch.tensor([1, 0], dtype=torch.int32, device=device)  # not 0, which fresh words say they are of
        torch.cuda.synchronize(device)  # all is 0 before anyone hears that this rank is ready
    return Room(words, addresses[0], state, rank, pushed, addresses[1])


@contextlib.contextmanager
def _without_multicast() -> Iterator[None]:
    """Plain addresses are all that is used. Torch would set NVLink multicast up as well, which some machines (H20)
    answer with an error."""
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before


def _boot_id() -> str:
    """What tells machines of one name apart."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _all(ok: bool, group: torch.distributed.ProcessGroup) -> bool:
    return bool(_least(int(ok), group))


def _same(number: int, group: torch.distributed.ProcessGroup) -> bool:
    return _least(number, group) == -_least(-number, group)


def _least(number: int, group: torch.distributed.ProcessGroup) -> int:
    import torch.distributed as dist

    from burnish.parallel.group import device_of

    numbers = torch.tensor([number], dtype=torch.int64, device=device_of(group))
    dist.all_reduce(numbers, dist.ReduceOp.MIN, group=group)
    return int(numbers)
