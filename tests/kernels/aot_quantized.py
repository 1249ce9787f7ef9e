"""Compiles ahead of time what the products of quantized weights launch at Llama's sizes, by every config.

Run as `python -m tests.kernels.aot_quantized` in a process of its own, as `tests.kernels.aot` is. Prints one JSON list.
`moved` are blocks that go through shared memory from one layout to another in the loop; `per_byte` is how many
instructions of the loop a thread issues for each byte of weight that it reads, on Hopper.
"""

from __future__ import annotations

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

KINDS = (("int8", False), ("fp8", False), ("int4", False), ("int4", True))


def _weight(rows: int, columns: int, kind: str, zeros: bool, group: int) -> tuple[Any, ...]:
    """What stands for such a weight, of random bits: only shapes and dtypes count."""
    if kind != "int4":
        data = torch.empty(rows, columns, dtype=torch.int8 if kind == "int8" else torch.uint8)
        return data, torch.empty(rows), None, kind
    groups = (rows, columns // group)
    data, scales = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(groups, dtype=torch.bfloat16)
    return data, scales, torch.empty(groups, dtype=torch.uint8) if zeros else None, kind


def calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    linear, gated = "quantized_linear", "quantized_gated_product"
    for kind, zeros in KINDS:
        x = torch.empty(1, 1, 4096, dtype=torch.bfloat16)
        yield linear, "triton_gemv", (x, *_weight(6144, 4096, kind, zeros, 128))
        yield gated, "triton_gemv", (x, *_weight(28672, 4096, kind, zeros, 128))
        yield linear, "triton_gemv", (torch.empty(1, 1, 14336), *_weight(4096, 14336, kind, zeros, 32))
        if kind == "int4" and not zeros:
            continue  # with zeros there is more of everything
        for rows in (2, 4):
            yield gated, "triton_gemv", (x.new_empty(1, rows, 4096), *_weight(28672, 4096, kind, zeros, 64))
        yield linear, "triton_gemv", (torch.empty(1, 4, 4096), *_weight(6144, 4096, kind, zeros, 64))
        many = torch.empty(1, 16, 4096, dtype=torch.bfloat16)
        yield linear, "triton_skinny", (many, *_weight(6144, 4096, kind, zeros, 128))
        yield gated, "triton_skinny", (many, *_weight(28672, 4096, kind, zeros, 128))
        yield linear, "triton_skinny", (many, *_weight(6144, 4096, kind, zeros, 32))


def launches(capability: int) -> Iterator[tuple[str, Any, int]]:
    from burnish.kernels.launch import Launch, Target, recording

    for name, impl_name, args in calls():
        op = find_op(name)
        impl, bound, recorded = op.impls[impl_name], op.bind(*args), list[Launch]()
        assert not [reason for reason in impl.why_not(*bound) if "not on a CUDA device" not in reason]
        with recording(recorded.append, Target(divmod(capability, 10), SMS[capability])):
            for config in impl.configs(*bound):  # type: ignore[misc]
                recorded.clear()
                impl.fn(*bound, config=config)
                x, _, scales, zeros, kind = args
                what = f"{kind}{'' if zeros is None else ' zeros'} {tuple(scales.shape)}"
                yield f"{name} {impl_name} {x.dtype} {tuple(x.shape)} {what} {config}", recorded[0], capability


def _compiled(label: str, launch: Any, capability: int) -> dict[str, Any]:
    try:
        compiled = _compile(launch, capability)
    except Exception as error:
        return {"label": label, "capability": capability, "error": f"{type(error).__name__}: {error}"}
    loop = compiled.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    found = {"label": label, "capability": capability, "shared": compiled.metadata.shared}
    found |= {"moved": len(re.findall(r"ttg\.local_alloc %", loop)), **_resources(compiled.asm["cubin"])}
    if capability == 90:
        constants = launch.constants
        halves = 2 if constants["GATED"] else 1
        words = (
            constants["BLOCK_N"]
            * halves
            * (constants["BLOCK_C"] * 4 if "BLOCK_C" in constants else constants["BLOCK_W"])
        )
        found |= _loop(compiled.asm["cubin"], words * 4 / (32 * launch.options["num_warps"]))
    return found


def _loop(cubin: bytes, nbytes: float) -> dict[str, Any]:
    """Of the longest loop: its instructions for each of `nbytes`, and its barriers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    longest: list[str] = []
    for at, what in code:
        target = re.search(r"\bBRA\b.* (0x[0-9a-f]+)", what)
        if target and int(target[1], 16) < at:
            body = [instruction for place, instruction in code if int(target[1], 16) <= place <= at]
            longest = max(longest, body, key=len)
    return {"per_byte": round(len(longest) / nbytes, 2), "barriers": sum("BAR.SYNC" in line for line in longest)}


if __name__ == "__main__":
    wanted = [int(argument) for argument in sys.argv[1:]] or CAPABILITIES
    jobs = {_key(job[1], job[2]): job for capability in wanted for job in launches(capability)}
    json.dump([_compiled(*job) for job in jobs.values()], sys.stdout)
