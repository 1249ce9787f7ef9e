"""Compiles the launches of Triton Impls ahead of time, without a GPU, and reads what the compiler says of each.

Run as `python -m tests.kernels.aot [--everything] OP...` in a process of its own: the kernels must not be decorated for
the interpreter. Prints one JSON list of what was compiled; `--rows N...` instead what `kernels_for_rows`
finds, `--barriers`, `--shared-attention`, `--finishing` and `--vocabularies` what `barriers`, `shared_attention`,
`finishing` and `full_vocabularies` do.
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

from burnish.op import Impl, Op, find_op

CAPABILITIES = (80, 90, 100)
SMS = {80: 108, 90: 132, 100: 148}


def specialized(launch: Any, capability: int) -> tuple[Any, ...]:
    """What Triton makes of a launch's arguments: backend, options, signature, constants and what it knows of each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **launch.constants)
    return kernel._pack_args(backend, dict(launch.options), bound, specialization, None)  # type: ignore[no-any-return]


def compile_launch(launch: Any, capability: int) -> dict[str, Any]:
    """Registers, stack and local memory (spills), and shared memory, in bytes, of one launch's kernel."""
    compiled = _compile(launch, capability)
    per_sm = launch.constants.get("PER_SM", 1) if launch.kernel.is_gluon() else 1  # programs that share its memory
    memory = {"shared": compiled.metadata.shared, "per_sm": per_sm}
    return {"kernel": launch.kernel.__name__, **memory, **_resources(compiled.asm["cubin"])}


def _compile(launch: Any, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    options, signature, constants, attributes = specialized(launch, capability)
    source = (GluonASTSource if launch.kernel.is_gluon() else ASTSource)(
        launch.kernel, signature, constants, attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)


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
            if "triton" in impl.name or impl.name.startswith("gluon"):
                hopper = impl.name.startswith("gluon") and impl.name != "gluon_gemv"
                for capability in (90,) if hopper else CAPABILITIES:
                    found = launches_of(op, impl, capability, everything)
                    if impl.name == "gluon_gemv" and capability != 90 and not everything:
                        found = itertools.islice(found, 1)  # one kernel, of which `aot_gemv_mma` tries most
                    for label, launch in found:
                        jobs.setdefault(_key(launch, capability), (label, launch, capability))
    return [_compiled(job) for job in jobs.values()]


def _compiled(job: tuple[str, Any, int]) -> dict[str, Any]:
    label, launch, capability = job
    try:
        return {"label": label, "capability": capability, **compile_launch(launch, capability)}
    except Exception as error:  # told by the test, with all others
        return {"label": label, "capability": capability, "error": f"{type(error).__name__}: {error}"}


def _key(launch: Any, capability: int) -> str:
    """The same for launches that share a compiled kernel."""
    return repr((launch.kernel.__name__, capability, *specialized(launch, capability)))


def kernels_for_rows(rows: list[int]) -> list[list[str]]:
    """For each kind of call the kernels, by their keys, that these numbers of tokens need with one config."""
    from burnish.kernels.launch import Launch, Target, recording
    from burnish.numerics import randn

    def tensor(*shape: int) -> torch.Tensor:
        return randn(*shape, dtype=torch.bfloat16)

    weight, vector = tensor(192, 64), tensor(192)
    calls: dict[tuple[str, str], Any] = {
        ("linear", "triton"): lambda n: (tensor(1, n, 64), weight, vector, "gelu", tensor(1, n, 192)),
        ("linear", "triton_tma"): lambda n: (tensor(1, n, 64), weight, vector, "none", tensor(1, n, 192)),
        ("linear", "gluon"): lambda n: (tensor(1, n, 64), weight, vector, "gelu", tensor(1, n, 192)),
        ("linear_add_layer_norm", "gluon"): lambda n: (tensor(1, n, 64), weight, vector, tensor(1, n, 192), vector),
        ("gated_mlp", "triton_tma_gate"): lambda n: (tensor(1, n, 64), weight, tensor(64, 96)),
        ("linear_add_layer_norm", "triton"): lambda n: (tensor(1, n, 64), weight, vector, tensor(1, n, 192), vector),
        ("add_rms_norm", "triton"): lambda n: (tensor(1, n, 64), tensor(1, n, 64), None),
        ("attention", "triton"): lambda n: (*[tensor(1, 4, n, 64)] * 3, None, torch.ones(1, n, dtype=torch.int64)),
        ("attention", "gluon"): lambda n: (*[tensor(1, 4, n, 64)] * 3, None, torch.ones(1, n, dtype=torch.int64)),
        ("rope", "triton"): lambda n: (tensor(1, 4, n, 64), tensor(1, n, 64), tensor(1, n, 64)),
        ("rope_append", "triton"): lambda n: (
            *[tensor(1, 4, n, 64)] * 3, *[tensor(1, n, 64)] * 2, *[tensor(1, 4, 1024, 64)] * 2, torch.tensor([0])
        ),
        ("linear_rope", "torch_triton"): lambda n: (
            tensor(1, n, 64), weight, None, tensor(1, n, 64), tensor(1, n, 64), 64, 128
        ),
        ("linear_rope", "gluon"): lambda n: (
            tensor(1, n, 64), weight, None, tensor(1, n, 64), tensor(1, n, 64), 64, 128
        ),
        ("embedding", "triton"): lambda n: (torch.zeros(n, 1, dtype=torch.int64), weight) * 2,
        ("embedding_layer_norm", "triton"): lambda n: (
            *(torch.zeros(1, n, dtype=torch.int64), weight) * 2, *(torch.zeros(1, n, dtype=torch.int64), weight)
        ),
    }  # fmt: skip
    needed = []
    for (op_name, impl_name), arguments in calls.items():
        op = find_op(op_name)
        impl = op.impls[impl_name]
        launches: list[Launch] = []
        with recording(launches.append, Target((9, 0), SMS[90])):
            assert impl.configs is not None
            config = impl.configs(*op.bind(*arguments(rows[0])))[0]
            for n in rows:
                impl.fn(*op.bind(*arguments(n)), config=config)
        needed.append(sorted({f"{op_name} {impl_name}: {_key(launch, 90)}" for launch in launches}))
    return needed


def barriers() -> list[dict[str, Any]]:
    """Of Gluon kernels as BERT-base has them: where in shared memory their barriers are initialized, and at which of
    these places something else is stored."""
    from burnish.kernels.launch import Launch, Target, recording
    from burnish.numerics import randn

    def tensor(*shape: int) -> torch.Tensor:
        return randn(*shape, dtype=torch.float16)

    x, vector = tensor(1, 128, 768), tensor(768)
    calls: dict[str, tuple[Any, ...]] = {
        "linear": (x, tensor(768, 768), vector, "gelu"),
        "linear_add_layer_norm": (x, tensor(768, 768), vector, x, vector, vector),
        "attention": tuple(tensor(1, 2, 128, 64) for _ in range(3)),
    }
    found = []
    for name, arguments in calls.items():
        op = find_op(name)
        bound, impl = op.bind(*arguments), op.impls["gluon"]
        assert impl.configs is not None
        launches: list[Launch] = []
        with recording(launches.append, Target((9, 0), SMS[90])):
            for config in impl.configs(*bound):
                impl.fn(*bound, config=config)
        found += [_synchronization(launch) for launch in launches if launch.kernel.is_gluon()]
    return found


def full_vocabularies() -> list[dict[str, Any]]:
    """What `compile_launch` says of sampling from the largest vocabularies, with each config."""
    from burnish.kernels.launch import Launch, Target, recording

    op, number = find_op("sample_token"), torch.tensor(0)
    impl = op.impls["triton"]
    assert impl.configs is not None
    jobs: dict[str, tuple[str, Any, int]] = {}
    for capability, (dtype, shape), choice in itertools.product(
        CAPABILITIES,
        ((torch.bfloat16, (1, 128256)), (torch.float32, (16, 262144))),
        ({"do_sample": False}, {}, {"top_k": 50, "top_p": 0.9, "min_p": 0.1}),
    ):
        bound = op.bind(torch.empty(shape, dtype=dtype), number, number, **choice)
        launches: list[Launch] = []
        with recording(launches.append, Target(divmod(capability, 10), SMS[capability])):
            for config in impl.configs(*bound)[: None if dtype == torch.bfloat16 else 1]:
                impl.fn(*bound, config=config)
        for launch in launches:
            jobs.setdefault(_key(launch, capability), (f"{op.name} {shape} {choice}", launch, capability))
    return [_compiled(job) for job in jobs.values()]


def shared_attention(everything: bool) -> list[dict[str, Any]]:
    """What `compile_launch` and `barriers` say of attention by teams that share queries, with each config of it; with
    causality and padding, where most registers are needed, or, with `everything`, with and without in every dtype."""
    from burnish.kernels.attention_wgmma import attention_wgmma, attention_wgmma_configs
    from burnish.kernels.launch import Launch, Target, recording

    dtypes, switches = ((torch.bfloat16, torch.float16), (True, False)) if everything else ((torch.bfloat16,), (True,))
    launches: list[Launch] = []
    with recording(launches.append, Target((9, 0), SMS[90])):
        for d, dtype, padded, causal in itertools.product((64, 128), dtypes, switches, switches):
            q, real = torch.zeros(1, 12, 384, d, dtype=dtype), torch.ones(1, 384, dtype=torch.int64)
            for config in attention_wgmma_configs(d, 2):
                if config["SPLIT"] > 1:
                    attention_wgmma(q, q, q, real if padded else None, causal, None, config=config)
    return [compile_launch(launch, 90) | _synchronization(launch) for launch in launches]


def finishing(everything: bool) -> list[dict[str, Any]]:
    """What `compile_launch` and `barriers` say of products whose tiles a team of its own finishes, with each config of
    it, with bias and residual and without; with `everything`, each activation also where columns are not aligned."""
    from burnish.kernels.launch import Launch, Target, recording
    from burnish.kernels.matmul_configs import Product
    from burnish.kernels.matmul_wgmma import matmul_wgmma
    from burnish.kernels.matmul_wgmma_configs import finishes, matmul_wgmma_configs

    activations, widths = ("gelu",), (3072,)
    if everything:
        activations, widths = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh"), (3072, 450)
    launches: list[Launch] = []
    target, dtype = Target((9, 0), SMS[90]), torch.float16
    with recording(launches.append, target):
        for activation, columns, gated in itertools.product(activations, widths, (False, True)):
            height = columns * (2 if gated else 1)
            x, weight = (torch.zeros(rows, 768, dtype=dtype) for rows in (4096, height))
            bias, residual = torch.zeros(height, dtype=dtype), torch.zeros(4096, columns, dtype=dtype)
            for config in filter(finishes, matmul_wgmma_configs(Product(4096, columns, 768, dtype, target, gated))):
                for optional in ((bias, activation, residual), (None, activation, None)):
                    matmul_wgmma(x, weight, *optional, gated, config)
    return [compile_launch(launch, 90) | _synchronization(launch) for launch in launches]


def _synchronization(launch: Any) -> dict[str, Any]:
    ptx = _compile(launch, 90).asm["ptx"]
    initialized, overwritten = _places(ptx)
    return {
        "kernel": f"{launch.kernel.__name__} {launch.constants}",
        "barriers": sorted(initialized), "overwritten": sorted(overwritten), "early": _early_arrivals(ptx),
    }  # fmt: skip


def _early_arrivals(ptx: str) -> list[str]:
    """Arrivals at barriers that follow stores to shared memory, or loads from it, without a barrier of the team's warps
    in between: one thread arrives for all, whose stores and loads it would not wait for. What precedes a label may be
    either."""
    early, unordered = [], True
    for line in ptx.splitlines():
        if re.search(r"\b(st|ld)\.shared|\b(st|ld)matrix|^\$L__BB", line):
            unordered = True
        elif re.search(r"\bbar\.sync\s+\d+, (128|256);", line):
            unordered = False
        elif unordered and "mbarrier.arrive.shared" in line:
            early.append(line.strip())
    return early


def _places(ptx: str) -> tuple[set[int], set[int]]:
    """Offsets in shared memory at which barriers are initialized, and those of them at which, by constant addresses,
    values are stored."""
    starts = set(re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx))
    sums = re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", ptx)
    offsets = dict.fromkeys(starts, 0) | {to: int(offset) for to, start, offset in sums if start in starts}
    initialized = {offsets[register] for register in re.findall(r"mbarrier\.init\S*\s+\[(%r\d+)\]", ptx)}
    overwritten: set[int] = set()
    for wide, bits, offset in re.findall(r"st\.shared\.(?:v(\d)\.)?\w(\d+)\s+\[global_smem(?:\+(\d+))?\]", ptx):
        start = int(offset or 0)
        overwritten |= {place for place in initialized if start - 8 < place < start + int(wide or 1) * int(bits) // 8}
    return initialized, overwritten


if __name__ == "__main__":
    wanted = sys.argv[1:]
    if wanted == ["--barriers"]:
        json.dump(barriers(), sys.stdout)
        sys.exit()
    if wanted[0] == "--shared-attention":
        json.dump(shared_attention("--everything" in wanted), sys.stdout)
        sys.exit()
    if wanted == ["--vocabularies"]:
        json.dump(full_vocabularies(), sys.stdout)
        sys.exit()
    if wanted[0] == "--finishing":
        json.dump(finishing("--everything" in wanted), sys.stdout)
        sys.exit()
    if wanted[0] == "--rows":
        json.dump(kernels_for_rows([int(n) for n in wanted[1:]]), sys.stdout)
        sys.exit()
    json.dump(compile_all([name for name in wanted if name != "--everything"], "--everything" in wanted), sys.stdout)
