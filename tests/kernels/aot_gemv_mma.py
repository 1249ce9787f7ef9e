"""Compiles ahead of time what `gluon_gemv` launches for products of a few rows at Llama's sizes, by every config.

Run as `python -m tests.kernels.aot_gemv_mma [CAPABILITY...]` in a process of its own, as `tests.kernels.aot` is. Prints
one JSON list. `stores` are those to shared memory, `loops` the jumps back, and `per_byte` is how many instructions a
thread has for each byte of weight that it reads: the code has no loops, so that is how many it issues.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from burnish.op import find_op
from tests.kernels.aot import CAPABILITIES, SMS, _compile, _key, _resources

KINDS = ("none", "int8", "fp8", "int4")
DTYPES = (torch.bfloat16, torch.float16)


def _weight(rows: int, columns: int, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """What stands for such a weight, not filled: only shapes and dtypes count."""
    if kind == "none":
        return (torch.empty(rows, columns, dtype=dtype),)
    if kind != "int4":
        data = torch.empty(rows, columns, dtype=torch.int8 if kind == "int8" else torch.uint8)
        return data, torch.empty(rows), None, kind
    scales = torch.empty(rows, columns // 128, dtype=dtype)
    return torch.empty(rows, columns // 2, dtype=torch.uint8), scales, None, kind


def appending(
    weight: tuple[Any, ...],
    dtype: torch.dtype,
    batch: int,
    bias: torch.Tensor | None = None,
    heads: int = 8,
    d: int = 128,
) -> tuple[Any, ...]:
    """Arguments after x of one new token each, without tables for heads of 64, as GPT-2 has them."""
    tables = [None if d == 64 else torch.empty(batch, 1, d, dtype=dtype) for _ in range(2)]
    caches = [torch.empty(batch, heads, 1024, d, dtype=dtype) for _ in range(2)]
    return *weight, bias, *tables, *caches, torch.tensor(7)


def calls(capability: int) -> Iterator[tuple[str, torch.dtype, str, tuple[Any, ...]]]:
    """Kind, dtype, Op and arguments: what takes most registers, and on Hopper the plain products too."""
    for kind, dtype in itertools.product(KINDS, DTYPES):
        linear, deep = "linear" if kind == "none" else "quantized_linear", torch.empty(1, 16, 14336, dtype=dtype)
        one, many, vector = deep[:, :1, :4096], deep[..., :4096], deep[0, 0, :4096]
        if capability == 90:
            yield kind, dtype, linear, (one, *_weight(6144, 4096, kind, dtype))
            if kind == "int4":
                yield (
                    kind,
                    dtype,
                    linear,
                    (deep[:, :1], *_weight(4096, 14336, kind, dtype), vector, "gelu", many[:, :1]),
                )
            if kind == "none":  # rows that do not begin at multiples of 16 bytes
                yield kind, dtype, linear, (deep[..., :14340], *_weight(4096, 14340, kind, dtype))
            yield kind, dtype, f"{linear}_rope_append", (one, *appending(_weight(6144, 4096, kind, dtype), dtype, 1))
        if dtype == torch.bfloat16:
            both = appending(_weight(6144, 4096, kind, dtype), dtype, 16, many.new_empty(6144))
            yield kind, dtype, f"{linear}_rope_append", (many.transpose(0, 1), *both)
            if kind == "none":
                gpt2 = appending(_weight(2304, 768, kind, dtype), dtype, 16, many.new_empty(2304), heads=12, d=64)
                yield kind, dtype, f"{linear}_rope_append", (many[..., :768].transpose(0, 1), *gpt2)
            yield kind, dtype, linear, (deep, *_weight(4096, 14336, kind, dtype), vector, "gelu", many)
            gated, down = _weight(28672, 4096, kind, dtype), vector.new_empty(4096, 14336)
            if kind == "none":
                yield kind, dtype, "gated_mlp", (many, *gated, down)
            else:
                yield kind, dtype, "quantized_gated_product", (many, *gated)


def launches(capability: int) -> Iterator[tuple[dict[str, Any], Any, int]]:
    from burnish.kernels.launch import Launch, Target, recording

    for kind, dtype, name, args in calls(capability):
        op = find_op(name)
        impl, bound, recorded = op.impls["gluon_gemv"], op.bind(*args), list[Launch]()
        assert not [reason for reason in impl.why_not(*bound) if "not on a CUDA device" not in reason]
        with recording(recorded.append, Target(divmod(capability, 10), SMS[capability])):
            for config in impl.configs(*bound):  # type: ignore[misc]
                recorded.clear()
                impl.fn(*bound, config=config)
                x = args[0]
                told = {"kind": kind, "op": name, "dtype": str(dtype), "x": tuple(x.shape), "config": str(config)}
                yield told, recorded[0], capability  # of two the first, to whose configs the second adds nothing


def _compiled(told: dict[str, Any], launch: Any, capability: int) -> dict[str, Any]:
    found = {**told, "capability": capability}
    try:
        compiled = _compile(launch, capability)
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {error}"}
    cubin, constants = compiled.asm["cubin"], launch.constants
    units = 16 if constants["KIND"] != "none" else 32
    steps = -(-constants["UNITS"] // (units * launch.options["num_warps"]))
    return {**found, "shared": compiled.metadata.shared, **_resources(cubin), **_code(cubin, steps * 32)}


def _code(cubin: bytes, nbytes: int) -> dict[str, Any]:
    """What there is in the machine's instructions, and how many for each of `nbytes`."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    jumps = [(at, int(target[1], 16)) for at, what in code if (target := re.search(r"\bBRA\b.* (0x[0-9a-f]+)", what))]
    end = min((at for at, target in jumps if target == at), default=code[-1][0])  # then come fillers
    return {
        "stores": sum(bool(re.search(r"\bSTS\b", what)) for _, what in code),
        "loops": sum(target < at for at, target in jumps),
        "per_byte": round(sum(at < end for at, _ in code) / nbytes, 2),
    }


if __name__ == "__main__":
    wanted = [int(argument) for argument in sys.argv[1:]] or CAPABILITIES
    jobs = {_key(job[1], job[2]): job for capability in wanted for job in launches(capability)}
    json.dump([_compiled(*job) for job in jobs.values()], sys.stdout)
