"""Compiles the launches of Triton Impls ahead of time, without a GPU, and reads what the compiler says of each.

Run as `python -m tests.kernels.aot [--everything] OP...` in a process of its own: the kernels must not be decorated for
the interpreter. Prints one JSON list of what was compiled.
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

from burnish.op import Impl, Op, find_op

CAPABILITIES = (80, 90, 100)
SMS = {80: 108, 90: 132, 100: 148}


def compile_launch(launch: Any, capability: int) -> dict[str, Any]:
    """Registers, stack and local memory (spills), and shared memory, in bytes, of one launch's kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **launch.constants)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return {"kernel": kernel.__name__, "shared": compiled.metadata.shared, **_resources(compiled.asm["cubin"])}


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["reg"], "spills": found["stack"] + found["local"]}


def launches_of(op: Op, impl: Impl, capability: int, everything: bool) -> Iterator[tuple[str, Any]]:
    """Launches of `impl` on the Op's samples, labelled: in bfloat16 every sample, the first one with each config, and
    in float32 the first; with `everything`, every sample in every dtype with every config."""
    from burnish.kernels.launch import Launch, Target, recording

    target = Target(divmod(capability, 10), SMS[capability])
    for dtype in (torch.bfloat16, torch.float32, *([torch.float16] if everything else [])):
        seen = 0
        for sample in op.samples("cpu", dtype):
            args = op.bind(*sample.args, **sample.kwargs)
            if [reason for reason in impl.why_not(*args) if "not on a CUDA device" not in reason]:
                continue  # it does not claim the case
            recorded: list[Launch] = []
            seen += 1
            if seen > 1 and dtype == torch.float32 and not everything:
                break
            with recording(recorded.append, target):
                configs = impl.configs(*args) if impl.configs is not None else [None]
                for config in configs if everything or (seen == 1 and dtype == torch.bfloat16) else configs[:1]:
                    recorded.clear()
                    impl.fn(*args) if config is None else impl.fn(*args, config=config)
                    for launch in recorded:
                        yield f"{op.name} {dtype} {sample.label} {config or ''}", launch


def compile_all(names: list[str], everything: bool) -> list[dict[str, Any]]:
    jobs: dict[Any, tuple[str, Any, int]] = {}
    for name in names:
        op = find_op(name)
        for impl in op.impls.values():
            if impl.name.startswith("triton"):
                for capability in CAPABILITIES:
                    for label, launch in launches_of(op, impl, capability, everything):
                        jobs.setdefault(_key(launch, capability), (label, launch, capability))
    return [_compiled(job) for job in jobs.values()]


def _compiled(job: tuple[str, Any, int]) -> dict[str, Any]:
    label, launch, capability = job
    try:
        return {"label": label, "capability": capability, **compile_launch(launch, capability)}
    except Exception as error:  # told by the test, with all others
        return {"label": label, "capability": capability, "error": f"{type(error).__name__}: {error}"}


def _key(launch: Any, capability: int) -> Any:
    """What makes a kernel a different one to the compiler: types, constants, options."""

    def kind(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return arg.dtype
        if type(arg).__name__ == "TensorDescriptor":
            return arg.base.dtype, tuple(arg.block_shape)
        if isinstance(arg, int) and not isinstance(arg, bool):
            return "1" if arg == 1 else ("aligned" if arg % 16 == 0 else "int")
        return (type(arg).__name__, arg if isinstance(arg, (str, bool)) else None)

    constants = tuple(sorted((name, repr(value)) for name, value in launch.constants.items()))
    options = tuple(sorted(launch.options.items()))
    return launch.kernel.__name__, tuple(map(kind, launch.args)), constants, options, capability


if __name__ == "__main__":
    wanted = sys.argv[1:]
    json.dump(compile_all([name for name in wanted if name != "--everything"], "--everything" in wanted), sys.stdout)
