"""Launches kernels as on a Hopper GPU, without one: they are compiled, and what should run them writes down what it
gets.

Run as `python -m tests.kernels.aot_launches` in a process of its own: the kernels must not be decorated for the
interpreter. Prints one JSON object.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

from burnish.kernels import launch as launching
from burnish.kernels.attention import attention_forward
from burnish.kernels.attention_configs import configs_for
from burnish.kernels.launch import Target, kinds_of
from burnish.kernels.matmul_configs import Product
from burnish.kernels.matmul_wgmma import matmul_wgmma
from burnish.kernels.matmul_wgmma_configs import matmul_wgmma_configs
from burnish.kernels.norms_backward import layer_norm_backward
from burnish.numerics import randn
from burnish.op import OPS
from tests.kernels.aot import impls_of, launches_of, specialized

import burnish.ops  # noqa: F401 isort: skip

HOPPER = Target((9, 0), 132)

_launched: list[Any] = []


class _Launcher:
    """What Triton makes for each compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._name = metadata.name

    def __call__(self, *args: Any) -> None:
        (*grid, stream, _, _, _, _, _), given = args[:9], args[9:]
        _launched.append([self._name, grid, stream, [_shown(a) for a in given]])


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 0, 0, 1024

    def unload_module(self, _: Any) -> None:
        pass

    def get_device_properties(self, _: Any) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}


class _Driver:
    launcher_cls, utils = _Launcher, _Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _shown(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return str(arg.dtype), [*arg.shape]
    if hasattr(arg, "block_shape"):
        return type(arg).__module__, [*arg.shape], [*arg.strides], [*arg.block_shape]
    return arg if isinstance(arg, int | float | str | None) else str(arg)


def launched_again() -> dict[str, Any]:
    """By kernel: what is launched by a first call, and by a second one, which Triton is not asked about; and how often
    it is asked by calls that need other kernels."""
    asked: list[str] = []
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self.__name__)
        return run(self, *args, **kwargs)

    JITFunction.run = counted

    def of(call: Callable[[], Any]) -> tuple[list[Any], int]:
        _launched.clear(), asked.clear()
        call()
        return list(_launched), len(asked)

    half = torch.bfloat16
    memory, weight = randn(6, 68, dtype=half), randn(64, dtype=half)
    x, moved = memory[:, :64], memory[:, 1:65]
    q, k = (randn(1, 128, heads, 64, dtype=half).transpose(1, 2) for heads in (4, 2))
    tma = next(c for c in configs_for(q, k, k, None, None, training=True, dropout=False) if c["TMA"])
    rows, product = randn(128, 64, dtype=half), Product(128, 192, 64, half, HOPPER)
    roles = matmul_wgmma_configs(product)[0]
    calls: dict[str, list[Callable[[], Any]]] = {  # the first twice, then others that need another kernel
        "norm": [
            lambda: layer_norm_backward(x, x, weight, None, 1e-5),
            lambda: layer_norm_backward(moved, moved, weight, None, 1e-5),
            lambda: layer_norm_backward(x, x, None, None, 1e-5),
        ],
        "attention": [
            lambda: attention_forward(q, k, k, None, None, True, None, None, training=True, config=tma),
            lambda: attention_forward(q, k, k, None, None, False, None, None, training=True, config=tma),
        ],
        "product": [lambda: matmul_wgmma(rows, randn(192, 64, dtype=half), config=roles)],
    }
    found = {}
    for name, (call, *others) in calls.items():
        first, second = of(call), of(call)
        found[name] = {"first": first, "second": second, "others": [of(other)[1] for other in others]}
    JITFunction.run = run
    return found


def distinguished() -> dict[str, Any]:
    """How many launches on the Ops' samples were looked at, and which of them `kinds_of` takes for launches of one
    kernel where Triton compiles two."""
    count, mistaken = 0, []
    kernels: dict[Any, str] = {}
    for op in OPS.values():
        for impl, _ in impls_of(op):
            for label, launch in launches_of(op, impl, 90, torch.bfloat16):
                kinds = kinds_of(launch.args)
                key = launch.kernel, kinds, repr(launch.constants), repr(launch.options)
                _, *compiled = specialized(launch, 90)
                positional = launch.kernel.params[: len(launch.args)]
                if kinds is None or any(p.is_constexpr for p in positional):
                    mistaken.append(f"{label}: never quick")
                elif kernels.setdefault(key, repr(compiled)) != repr(compiled):
                    mistaken.append(label)
                count += 1
    return {"count": count, "mistaken": mistaken}


@triton.jit
def _one(argument):
    pass


def one_by_one() -> dict[str, Any]:
    """Arguments that `kinds_of` takes for the same where Triton does not, of those at the ends of what it tells apart;
    and how many kinds of small integers there are."""
    ends = [0, 1, 2**31, 2**32, 2**63]
    near = {sign * end + step for end in ends for sign in (1, -1) for step in (-16, -15, -1, 0, 1, 15, 16)}
    integers = sorted(n for n in near if -(2**63) <= n < 2**64)
    memory = torch.zeros(64, dtype=torch.uint8)
    tensors = [memory[i : i + 16].view(d) for d in (torch.float16, torch.bfloat16, torch.int32) for i in (0, 4, 16)]
    bind = create_function_from_signature(_one.signature, _one.params, make_backend(GPUTarget("cuda", 90, 32)))
    values: list[Any] = [*integers, 0.0, 1.0, 2.5, None, *tensors]
    known = [(kinds_of((v,)), bind(v)[1]) for v in values]
    mistaken = [f"{a} {b}" for a, b in itertools.combinations(known, 2) if a[0] == b[0] and a[1] != b[1]]
    return {"mistaken": mistaken, "small": len({kinds_of((n,)) for n in range(-(2**15), 2**15)})}


if __name__ == "__main__":
    found = {"distinguished": distinguished(), "one by one": one_by_one()}
    driver.set_active(_Driver())
    launching.INTERPRETED = HOPPER  # for which tensors on the CPU are launched on
    json.dump(found | {"again": launched_again()}, sys.stdout)
