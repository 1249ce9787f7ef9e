"""Runs recorded launches of Gluon kernels on the CPU, which Triton's interpreter cannot: each program as it stands in
Python, on `torch` tensors, the partitions of its warps as threads.

What a Hopper GPU promises is kept, and no more: shared memory starts as NaN, a barrier's wait tells only the parity of
its phase, and a wait that never ends fails, as does a copy that nobody waits for. Layouts mean nothing here.
"""

from __future__ import annotations

import builtins
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from burnish.kernels import (
    attention_wgmma,
    digits,
    gemv_mma,
    gemv_mma_append,
    linear_gelu_wgmma,
    linear_gelu_wgmma_finish,
    linear_norm_wgmma,
    matmul_wgmma,
    matmul_wgmma_fill,
    matmul_wgmma_finish,
    matmul_wgmma_pieces,
    rope_wgmma,
    widen,
)
from burnish.kernels.launch import Launch
from burnish.ops._activations import activate

MODULES: tuple[ModuleType, ...] = (
    matmul_wgmma,
    matmul_wgmma_fill,
    matmul_wgmma_finish,
    matmul_wgmma_pieces,
    linear_gelu_wgmma,
    linear_gelu_wgmma_finish,
    linear_norm_wgmma,
    rope_wgmma,
    attention_wgmma,
    digits,
    gemv_mma,
    gemv_mma_append,
    widen,
)
_PATIENCE = 20.0  # seconds until a wait counts as a deadlock


class Int(int):
    """An integer scalar of a kernel."""

    def to(self, dtype: torch.dtype) -> Int:
        return self


def _integer(name: str) -> Callable[[Any, Any], Any]:
    def operate(self: Int, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return Int(result) if type(result) is int else result

    return operate


for _name in ("add", "sub", "mul", "floordiv", "mod", "and"):
    setattr(Int, f"__{_name}__", _integer(f"__{_name}__"))
    setattr(Int, f"__r{_name}__", _integer(f"__r{_name}__"))


class Block:
    """A tensor of a kernel."""

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self.data, self.type = data, SimpleNamespace(layout=layout)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: torch.dtype | ElementType, bitcast: bool = False) -> Block:
        dtype = dtype.dtype if isinstance(dtype, ElementType) else dtype
        return Block(self.data.view(dtype) if bitcast else self.data.to(dtype), self.type.layout)

    def __getitem__(self, index: Any) -> Block:
        return Block(self.data[index], self.type.layout)

    def __bool__(self) -> bool:
        assert self.data.dim() == 0
        return bool(self.data)


def _blockwise(name: str) -> Callable[[Block, Any], Block]:
    return lambda self, other: Block(getattr(self.data, name)(_data(other)), self.type.layout)


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and", "or")
for _name in (*_OPERATORS, "lshift", "rshift"):
    setattr(Block, f"__{_name}__", _blockwise(f"__{_name}__"))
    if _name in ("add", "sub", "mul", "truediv"):
        setattr(Block, f"__r{_name}__", _blockwise(f"__r{_name}__"))


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Block) else value


class ElementType:
    """Of what a pointer points to."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.primitive_bitwidth = tensor.dtype, 8 * tensor.element_size()

    def __eq__(self, other: object) -> bool:
        return self.dtype == getattr(other, "dtype", other)

    __hash__ = None  # type: ignore[assignment]


class Pointer:
    """The memory of a tensor, and how far into it."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=ElementType(tensor))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, _data(other) + self.offset)

    def to(self, to: torch.dtype, bitcast: bool) -> Pointer:
        return Pointer(self.tensor.view(to), self.offset)

    def places(self) -> Tensor:
        """Where the offsets lead in the tensor's storage, which begins where the tensor does."""
        return torch.as_tensor(self.offset)

    def memory(self) -> Tensor:
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - self.tensor.storage_offset()
        return self.tensor.as_strided((size,), (1,))


class Barrier:
    """An mbarrier: a phase is over when so many have arrived and all expected bytes have come."""

    def __init__(self) -> None:
        self.changed, self.count, self.left, self.bytes, self.parity = threading.Condition(), 0, 0, 0, 0
        self.copied = False  # and not waited for since

    def note(self, arrivals: int = 0, nbytes: int = 0) -> None:
        with self.changed:
            self.left -= arrivals
            self.bytes += nbytes
            self.copied |= nbytes != 0
            assert self.left >= 0, "more arrived than the barrier is for"
            if self.left == 0 and self.bytes == 0:
                self.left, self.parity = self.count, 1 - self.parity
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.parity != parity, _PATIENCE), "deadlock"
            self.copied = False


class Shared:
    """Shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype, self.shape, self.layout = data, data.dtype, list(data.shape), None

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def store(self, value: Block) -> None:
        self.data.copy_(value.data)

    def load(self, layout: Any) -> Block:
        return Block(self.data.clone(), layout)


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.all[i]


class Descriptor:
    """What tensor memory access copies boxes of; zeros where a box hangs over."""

    def __init__(self, descriptor: Any) -> None:
        self.block_shape, self.layout, self.dtype = list(descriptor.block_shape), None, descriptor.base.dtype
        self._tensor = descriptor.base.as_strided(
            [*descriptor.shape], [*descriptor.strides], descriptor.base.storage_offset()
        )
        nbytes = descriptor.base.element_size()
        for size in self.block_shape:
            nbytes *= size
        self.block_type = SimpleNamespace(nbytes=nbytes)

    def box(self, place: Sequence[int]) -> Tensor:
        inside = self._tensor[tuple(slice(start, start + n) for start, n in zip(place, self.block_shape, strict=True))]
        box = torch.zeros(self.block_shape, dtype=self.dtype)
        box[tuple(slice(0, n) for n in inside.shape)] = inside
        return box


def async_load(desc: Descriptor, place: Sequence[int], barrier: Barrier, buffer: Shared, pred: Any = True) -> None:
    if pred:
        buffer.data.copy_(desc.box(place))
        barrier.note(nbytes=-desc.block_type.nbytes)


def warpgroup_mma(a: Any, b: Shared, acc: Block, use_acc: bool = True, is_async: bool = False) -> Block:
    product = a.data.float() @ b.data.float()
    return Block(acc.data + product if use_acc else product, acc.type.layout)


def mma_v2(a: Block, b: Block, acc: Block) -> Block:
    if a.dtype == torch.int8:
        return Block(acc.data + (a.data.double() @ b.data.double()).to(torch.int32), acc.type.layout)
    return Block(acc.data + a.data.float() @ b.data.float(), acc.type.layout)


def activate_with_slope(x: Block, name: str) -> tuple[Block, Block]:
    approximate = "tanh" if name == "gelu_tanh" else "none"
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x.data), x.data, approximate=approximate)
    return Block(activate(x.data, name.removesuffix("_half")), x.type.layout), Block(slope, x.type.layout)


def _bits(entries: Tensor, asm: str) -> Block:
    return Block(entries.to(torch.bfloat16 if "bf16x2" in asm else torch.float16).view(torch.int16))


def four_of(octets: Block, asm: str) -> Block:
    """What the instructions that `widen` is written in make of bytes."""
    if asm in (_text(widen.FP8_BFLOAT16), _text(widen.FP8_FLOAT16)):
        entries = octets.data.contiguous().view(torch.float8_e4m3fn).float()
    else:
        entries = octets.data / (64 if "bf16x2" in asm else 1)
    return _bits(entries.unflatten(-1, (-1, 4))[..., (0, 2, 1, 3)].flatten(-2), asm)


def eight_of(octets: Block, asm: str) -> tuple[Block, Block]:
    halves = torch.stack((octets.data & 15, octets.data >> 4 & 15), -1).unflatten(-2, (-1, 4)).flatten(-2) - 8
    parts = ((0, 4, 1, 5), (2, 6, 3, 7))
    first, last = (_bits(halves[..., part].flatten(-2) / (4 if "bf16x2" in asm else 1), asm) for part in parts)
    return first, last


def two_of(octets: Block, asm: str) -> tuple[Block, Block]:
    low, high = (((half & 15) - 8) * 16 for half in (octets.data, octets.data >> 4))
    return Block(low), Block(high)


def three_of(x: Block, scale: Block, asm: str) -> tuple[Block, ...]:
    """What the instructions that `digits` is written in make of columns."""
    int8 = asm in (_text(digits.INT8_BFLOAT16), _text(digits.INT8_FLOAT16))
    order = digits.INT8_ORDER if int8 else digits.INT4_ORDER
    exact = (x.data.double() * scale.data.double()).nan_to_num(0, 0, 0)
    rest = exact.unflatten(-1, (-1, 8))[..., order].flatten(-2).round().long()
    assert not (rest.abs() > 1 << 21).any()
    parts = []
    for _ in range(3):
        digit = (rest + 128) % 256 - 128
        parts.append(Block(digit.to(torch.int8)))
        rest = (rest - digit) // 256
    return tuple(reversed(parts))


def _text(asm: Any) -> str:
    return str(getattr(asm, "value", asm))


def warpgroup_mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    return deps if len(deps) > 1 else deps[0]


_counting = threading.Lock()


def leave(counter: Pointer) -> Int:
    with _counting:
        before = int(counter.memory()[counter.offset])
        counter.memory()[counter.offset] = before + 1
        return Int(before)


def last_to_leave(counter: Pointer, before: int, count: int) -> Int:
    if before + 1 == count:
        counter.memory()[counter.offset] = 0
    return Int(before + 1 == count)


class Gluon:
    """`triton.experimental.gluon.language`, as far as the kernels use it."""

    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32
    int8, int16, int32, int64 = torch.int8, torch.int16, torch.int32, torch.int64
    static_range, constexpr, pointer_type = builtins.range, None, builtins.staticmethod(lambda dtype: dtype)

    def __init__(self, programs: int, num_warps: int) -> None:
        self._programs, self._num_warps = programs, num_warps
        self._began = time.monotonic()
        self._here = threading.local()  # which program a thread is of, and that one's barriers

    def begin(self, program: int, barriers: list[Barrier] | None = None) -> None:
        """This thread is a program from now on, or one of its partitions."""
        self._here.program, self._here.barriers = program, [] if barriers is None else barriers

    @staticmethod
    def static_assert(condition: bool) -> None:
        assert condition

    def program_id(self, axis: int) -> Int:
        return Int(self._here.program)

    def num_programs(self, axis: int) -> Int:
        return Int(self._programs)

    def num_warps(self) -> int:
        return self._num_warps

    def __getattr__(self, name: str) -> Any:
        assert name.endswith("Layout"), name
        return lambda *args: (name, args)

    @staticmethod
    def cdiv(a: int, b: int) -> Int:
        return Int(-(-a // b))

    def allocate_shared_memory(
        self, dtype: torch.dtype, shape: Sequence[int], layout: Any, value: Block | None = None
    ) -> Any:
        if layout == "barriers":
            barriers = Barriers(shape[0])
            self._here.barriers += barriers.all
            return barriers
        if value is not None:
            assert (value.shape, value.dtype) == (tuple(shape), dtype)
            return Shared(value.data.clone())
        return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))

    @staticmethod
    def arange(start: int, end: int, layout: Any) -> Block:
        return Block(torch.arange(start, end), layout)

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: torch.dtype, layout: Any) -> Block:
        return Block(torch.full(tuple(shape), value, dtype=dtype), layout)

    @staticmethod
    def zeros_like(x: Block) -> Block:
        return Block(torch.zeros_like(x.data))

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Block:
        return cls.full(shape, 0, dtype, layout)

    def load(self, pointer: Pointer, mask: Block | None = None, other: float = 0, volatile: bool = False) -> Any:
        assert not volatile or time.monotonic() < self._began + _PATIENCE, "deadlock"
        places, memory = pointer.places(), pointer.memory()
        if places.dim() == 0 and mask is None and memory.dtype == torch.int32:
            return Int(memory[places])
        shown = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.data.expand(places.shape)
        loaded = torch.full(places.shape, other, dtype=memory.dtype)
        loaded[shown] = memory[places[shown]]
        return Block(loaded)

    @staticmethod
    def store(pointer: Pointer, value: Block, mask: Block) -> None:
        places = pointer.places().expand(value.data.shape)
        shown = mask.data.expand(value.data.shape)
        pointer.memory()[places[shown]] = value.data[shown]

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not isinstance(condition, Block):
            return a if condition else b
        return Block(torch.where(condition.data, _data(a), _data(b)))

    @staticmethod
    def broadcast(a: Block, b: Block) -> tuple[Block, Block]:
        return Block(torch.broadcast_tensors(a.data, b.data)[0], a.type.layout), b

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        if not isinstance(a, Block):
            return Int(min(a, b))
        return Block(a.data.clamp(max=b), a.type.layout)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        if not isinstance(a, Block):
            return Int(max(a, b))
        return Block(torch.maximum(a.data, torch.as_tensor(_data(b), dtype=a.dtype)), a.type.layout)

    @staticmethod
    def max(x: Block, axis: int) -> Block:
        return Block(x.data.amax(axis))

    @staticmethod
    def sum(x: Block, axis: int) -> Block:
        return Block(x.data.sum(axis))

    @staticmethod
    def rsqrt(x: Block) -> Block:
        return Block(torch.rsqrt(x.data))

    @staticmethod
    def exp2(x: Block) -> Block:
        return Block(torch.exp2(x.data))

    @staticmethod
    def reshape(x: Block, shape: Sequence[int]) -> Block:
        return Block(x.data.reshape(tuple(shape)))

    @staticmethod
    def permute(x: Block, order: Sequence[int]) -> Block:
        return Block(x.data.permute(*order))

    @staticmethod
    def expand_dims(x: Block, axis: int) -> Block:
        return Block(x.data.unsqueeze(axis))

    @staticmethod
    def split(x: Block) -> tuple[Block, Block]:
        return Block(x.data[..., 0]), Block(x.data[..., 1])

    @staticmethod
    def join(a: Block, b: Block) -> Block:
        return Block(torch.stack((a.data, b.data), -1))

    @staticmethod
    def convert_layout(x: Block, layout: Any) -> Block:
        return Block(x.data, layout)

    def warp_specialize(self, partitions: Any, num_warps: Sequence[int], registers: Sequence[int]) -> None:
        program, barriers = self._here.program, self._here.barriers

        def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
            self.begin(program, barriers)
            function(*args)

        at_once([functools.partial(run, *partition) for partition in partitions])
        assert not any(barrier.copied for barrier in barriers), "a copy that nobody waited for"


def at_once(functions: Sequence[Callable[[], None]]) -> None:
    faults: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=lambda barrier, count: barrier.__dict__.update(count=count, left=count),
    expect=lambda barrier, nbytes, pred=True: barrier.note(1, nbytes) if pred else None,
    arrive=lambda barrier, count, pred=True: barrier.note(count) if pred else None,
    wait=lambda barrier, parity, pred=True: barrier.wait(parity) if pred else None,
)


@contextmanager
def _as_python(gluon: Gluon) -> Iterator[None]:
    """Within the `with`, what the kernels' modules call is Python and means the CPU."""
    before = {module: dict(vars(module)) for module in MODULES}
    ours = {
        "gl": gluon,
        "mbarrier": MBARRIER,
        "async_load": async_load,
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
        "mma_v2": mma_v2,
        "four_of": four_of,
        "eight_of": eight_of,
        "two_of": two_of,
        "three_of": three_of,
        "reinterpret": lambda buffer, dtype, shape, layout: buffer.reshape(shape),
        "activate_with_slope": activate_with_slope,
        "leave": leave,
        "last_to_leave": last_to_leave,
        "activate": lambda x, name: Block(activate(x.data, name.removesuffix("_half")), x.type.layout),
    }
    try:
        for module, names in before.items():
            for name, value in names.items():
                if name in ours:
                    setattr(module, name, ours[name])
                elif hasattr(value, "fn"):  # jit functions, Triton's too
                    setattr(module, name, value.fn)
                elif type(value).__name__ == "constexpr":
                    setattr(module, name, value.value)
        yield
    finally:
        for module, names in before.items():
            vars(module).update(names)


def emulate(launch: Launch) -> None:
    """Runs a launch: a Gluon kernel here, another in Triton's interpreter."""
    constants = {**launch.constants, "PDL": False}
    if not getattr(launch.kernel, "is_gluon", bool)():
        launch.kernel[launch.grid](*launch.args, **constants)
        return
    args = [_argument(arg) for arg in launch.args]
    gluon = Gluon(launch.grid[0], launch.options["num_warps"])

    def run(program: int) -> None:
        gluon.begin(program)
        launch.kernel.fn(*args, **constants)

    programs = [functools.partial(run, program) for program in range(launch.grid[0])]
    wait_for_each_other = launch.kernel is linear_norm_wgmma.linear_norm_wgmma_kernel
    with _as_python(gluon):
        if wait_for_each_other:
            at_once(programs)
        else:
            for program in programs:
                program()


def _argument(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Pointer(arg)
    if hasattr(arg, "block_shape"):
        return Descriptor(arg)
    return Int(arg) if type(arg) is int else arg
