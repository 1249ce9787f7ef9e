"""Compiles the launches of Triton Impls ahead of time, without a GPU, and reads what the compiler says of each.

Run as `python -m tests.kernels.aot OP...` in a process of its own: the kernels must not be decorated for the
interpreter. Prints one JSON list of what was compiled; `--barriers`, `--attention`, `--shared-attention`,
`--finishing`, `--gelu`, `--vocabularies`, `--shared-memory`, `--pushed-rows` and `--tokens` instead what `barriers`,
`attention_at_models_sizes`, `shared_attention`, `finishing`, `around_gelu`, `full_vocabularies`,
`shared_memory_of_gpus`, `rows_pushed_between_gpus` and `tokens_of_padded_batches` find with everything, and `--few` a
little of each, as one JSON object.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from burnish.op import OPS, Impl, Op, find_op

import burnish.ops  # noqa: F401 isort: skip

CAPABILITIES = (90, 80, 100)
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
    return {"kernel": launch.kernel.__name__, "capability": capability, **memory, **_resources(compiled.asm["cubin"])}


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


def launches_of(op: Op, impl: Impl, capability: int, dtype: torch.dtype) -> Generator[tuple[str, Any], None, None]:
    """Launches of `impl` on every sample of the Op in `dtype` with every config, labelled."""
    from burnish.kernels.launch import Launch, Target, recording

    target = Target(divmod(capability, 10), SMS[capability])
    for sample in op.samples("cpu", dtype):
        args = op.bind(*sample.args, **sample.kwargs)
        if [reason for reason in impl.why_not(*args) if "not on a CUDA device" not in reason]:
            continue  # it does not claim the case
        recorded: list[Launch] = []
        with recording(recorded.append, target):
            for config in impl.configs(*args) if impl.configs is not None else [None]:
                recorded.clear()
                impl.fn(*args) if config is None else impl.fn(*args, config=config)
                for launch in recorded:
                    yield f"{op.name} {dtype} {sample.label} {config or ''}", launch


def impls_of(op: Op) -> Iterator[tuple[Impl, tuple[int, ...]]]:
    """The Impls that are kernels of ours, and the generations of GPUs that each is for: Hopper first."""
    for impl in op.impls.values():
        if "triton" in impl.name or impl.name.startswith("gluon"):
            hopper = impl.name.startswith("gluon") and impl.name != "gluon_gemv"
            yield impl, CAPABILITIES[:1] if hopper else CAPABILITIES


def compile_all(names: list[str]) -> list[dict[str, Any]]:
    """Everything that these Ops may launch on their samples."""
    jobs: dict[str, Job] = {}
    for op in map(find_op, names):
        for (impl, capabilities), dtype in itertools.product(
            impls_of(op), (torch.bfloat16, torch.float32, torch.float16)
        ):
            for capability in capabilities:
                for label, launch in launches_of(op, impl, capability, dtype):
                    jobs.setdefault(_key(launch, capability), (label, launch, capability))
    return [_compiled(job) for job in jobs.values()]


def compile_first() -> list[dict[str, Any]]:
    """Of every Impl its first launches, on Hopper in bfloat16; in float32, and on the other generations, those of them
    that are of kernels which were not compiled so yet."""
    jobs: dict[str, Job] = {}
    seen: set[tuple[str, int, torch.dtype]] = set()
    for capability, dtype in ((90, torch.bfloat16), (90, torch.float32), (80, torch.bfloat16), (100, torch.bfloat16)):
        for op in OPS.values():
            for impl in (impl for impl, capabilities in impls_of(op) if capability in capabilities):
                with contextlib.closing(launches_of(op, impl, capability, dtype)) as found:
                    first = [list(group) for _, group in itertools.islice(itertools.groupby(found, itemgetter(0)), 1)]
                for label, launch in itertools.chain(*first):
                    kind = launch.kernel.__name__, capability, dtype
                    if (capability, dtype) == (90, torch.bfloat16) or kind not in seen:
                        jobs.setdefault(_key(launch, capability), (label, launch, capability))
                    seen.add(kind)
    return [_compiled(job) for job in jobs.values()]


Job = tuple[str, Any, int]
"""A label, a launch and what it is compiled for."""


def _compiled(job: Job) -> dict[str, Any]:
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
        ("gate", "triton"): lambda n: (tensor(1, n, 192),),
        ("gate_backward", "triton"): lambda n: (tensor(1, n, 96), tensor(1, n, 192)),
        ("linear_gelu_backward", "gluon"): lambda n: (tensor(1, n, 64), tensor(64, 192), tensor(1, n, 192)),
        ("linear_with_preactivation", "gluon"): lambda n: (tensor(1, n, 64), weight, vector),
        ("linear_gelu_backward", "torch_triton"): lambda n: (tensor(1, n, 64), tensor(64, 192), tensor(1, n, 192)),
        ("linear_add_layer_norm", "triton"): lambda n: (tensor(1, n, 64), weight, vector, tensor(1, n, 192), vector),
        ("add_rms_norm", "triton"): lambda n: (tensor(1, n, 64), tensor(1, n, 64), None),
        ("rms_norm_backward", "triton"): lambda n: (tensor(1, n, 64), tensor(1, n, 64), tensor(64), 1e-6),
        ("layer_norm_backward", "triton"): lambda n: (
            tensor(1, n, 64), tensor(1, n, 64), tensor(64), tensor(64), 1e-5, tensor(1, n, 64)
        ),
        ("attention", "triton"): lambda n: (*[tensor(1, 4, n, 64)] * 3, None, torch.ones(1, n, dtype=torch.int64)),
        ("attention", "gluon"): lambda n: (*[tensor(1, 4, n, 64)] * 3, None, torch.ones(1, n, dtype=torch.int64)),
        ("cross_entropy_with_gradient", "triton"): lambda n: (tensor(n, 5000), torch.zeros(n, dtype=torch.int64)),
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
        ("embedding_backward", "triton"): lambda n: (
            tensor(1, n, 64), torch.zeros(1, n, dtype=torch.int64), 192, weight
        ),
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


def barriers(everything: bool) -> list[dict[str, Any]]:
    """Of Gluon kernels as BERT-base has them: where in shared memory their barriers are initialized, and at which of
    these places something else is stored. Of every Op with its first config or, with `everything`, with each."""
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
            for config in impl.configs(*bound)[: None if everything else 1]:
                impl.fn(*bound, config=config)
        found += [_synchronization(launch) for launch in launches if launch.kernel.is_gluon()]
    return found


def full_vocabularies(everything: bool) -> list[dict[str, Any]]:
    """What `compile_launch` says of sampling from the largest vocabularies, with each config; on Hopper and with the
    first one only, or, with `everything`, with each and on every generation."""
    from burnish.kernels.launch import Launch, Target, recording

    op, number = find_op("sample_token"), torch.tensor(0)
    impl = op.impls["triton"]
    assert impl.configs is not None
    jobs: dict[str, Job] = {}
    for capability, (dtype, shape), choice in itertools.product(
        CAPABILITIES if everything else CAPABILITIES[:1],
        ((torch.bfloat16, (1, 128256)), (torch.float32, (16, 262144))),
        ({"do_sample": False}, {}, {"top_k": 50, "top_p": 0.9, "min_p": 0.1}),
    ):
        bound = op.bind(torch.empty(shape, dtype=dtype), number, number, **choice)
        launches: list[Launch] = []
        with recording(launches.append, Target(divmod(capability, 10), SMS[capability])):
            for config in impl.configs(*bound)[: None if dtype == torch.bfloat16 and everything else 1]:
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
    it, with bias and residual; with `everything`, also without, and each activation also where columns are not
    aligned."""
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
                matmul_wgmma(x, weight, bias, activation, residual, gated, config)
                if everything:
                    matmul_wgmma(x, weight, None, activation, None, gated, config)
    return [compile_launch(launch, 90) | _synchronization(launch) for launch in launches]


def around_gelu(everything: bool) -> list[dict[str, Any]]:
    """What `compile_launch` and `barriers` say of the products around GELU in GPT-2, with each config; with
    `everything` in each dtype, with each activation, and also where rows are aligned to 16 bytes only."""
    from burnish.kernels.launch import Launch, Target, recording
    from burnish.kernels.linear_gelu_wgmma import (
        linear_gelu_backward,
        linear_gelu_wgmma_configs,
        linear_with_preactivation,
    )

    launches: list[Launch] = []
    dtypes, activations, sizes = (torch.bfloat16,), ("gelu",), ((3072, 768),)
    if everything:
        dtypes, activations, sizes = (torch.bfloat16, torch.float16), ("gelu", "gelu_tanh"), ((3072, 768), (456, 136))
    with recording(launches.append, Target((9, 0), SMS[90])):
        for dtype, activation, (columns, depth) in itertools.product(dtypes, activations, sizes):
            grad, weight = torch.zeros(4096, depth, dtype=dtype), torch.zeros(depth, columns, dtype=dtype)
            x = torch.zeros(4096, columns, dtype=dtype)
            for config in linear_gelu_wgmma_configs(3072 * 768, backward=False):
                for bias in (x[0], None) if everything else (x[0],):
                    linear_with_preactivation(grad, weight.t().contiguous(), bias, activation, config)
            for config in linear_gelu_wgmma_configs(3072 * 768, backward=True):
                for keep in (True, False) if everything else (True,):
                    linear_gelu_backward(grad, weight, x, activation, keep, config)
    gluon = [launch for launch in launches if launch.kernel.is_gluon()]
    return [compile_launch(launch, 90) | _synchronization(launch) for launch in gluon]


def attention_at_models_sizes(everything: bool) -> list[dict[str, Any]]:
    """What `compile_launch` says of plain attention as models have it, with the config that is tried first or, with
    `everything`, with each."""
    from burnish.kernels.attention import attention_forward
    from burnish.kernels.attention_configs import configs_for
    from burnish.kernels.launch import Launch, Target, recording

    launches: list[Launch] = []
    with recording(launches.append, Target((9, 0), SMS[90])):
        for b, h, s, d, is_causal in ((1, 12, 128, 64, False), (8, 32, 1024, 32, False), (1, 32, 4096, 128, True)):
            q = torch.empty(b, s, h, d, dtype=torch.bfloat16).transpose(1, 2)
            for config in configs_for(q, q, q, None, None)[: None if everything else 1]:
                attention_forward(q, q, q, None, None, is_causal, None, None, config=config)
    return [compile_launch(launch, 90) for launch in launches]


def shared_memory_of_gpus(everything: bool) -> list[dict[str, Any]]:
    """What `compile_launch` says of rows that are summed by memory that GPUs share, and how they are sent and awaited:
    of Llama 8B on two GPUs with the first config; with `everything` others too, with each config."""
    from burnish.kernels.all_reduce_norm import all_reduce_add_norm, all_reduce_norm_configs

    def configs(rows: int, N: int, itemsize: int) -> list[Any]:
        return all_reduce_norm_configs(N, itemsize)

    return _exchanged(all_reduce_add_norm, configs, 1, everything)


def rows_pushed_between_gpus(everything: bool) -> list[dict[str, Any]]:
    """The same of the kernel for many rows."""
    from burnish.kernels.all_reduce_norm_rows import all_reduce_add_norm_rows, all_reduce_norm_rows_configs

    return _exchanged(all_reduce_add_norm_rows, all_reduce_norm_rows_configs, 2048, everything)


def _exchanged(sums: Any, configs: Any, rows: int, everything: bool) -> list[dict[str, Any]]:
    from burnish.kernels.launch import Launch, Target, recording
    from burnish.parallel.symmetric import Room

    found = []
    sizes = [(2, 4096, torch.bfloat16), (4, 768, torch.float16), (8, 4096, torch.float32)]
    for ranks, N, dtype in sizes if everything else sizes[:1]:
        addresses, state = torch.zeros(ranks, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
        words, pushed = (torch.zeros(2, n, 16, dtype=d) for n, d in ((ranks, torch.int64), (ranks - 1, torch.int32)))
        room = Room(words, addresses, state, 1, pushed, addresses)
        x, vector = torch.empty(rows, N, dtype=dtype), torch.empty(N, dtype=dtype)
        for capability in CAPABILITIES if everything else CAPABILITIES[:1]:
            launches: list[Launch] = []
            with recording(launches.append, Target(divmod(capability, 10), SMS[capability])):
                for config in configs(rows, N, dtype.itemsize)[: None if everything else 1]:
                    rms = ranks == 2
                    vectors = (vector, None) if rms else (vector, vector)
                    sums(x, None if rms else vector, x, *vectors, 1e-5, rms, rms, room, config)
            for launch in launches:
                ptx = _compile(launch, capability).asm["ptx"]
                ways = {"exchange": _exchange(ptx), "steps": _steps(ptx)}
                found.append(compile_launch(launch, capability) | ways)
    return found


def tokens_of_padded_batches(everything: bool) -> list[dict[str, Any]]:
    """What `compile_launch` says of finding the real tokens of a padded batch, of taking what is theirs, of what is
    told how many there are, and of putting them back; with `everything` also of masks of bool, and for every
    generation."""
    from burnish.kernels.launch import Launch, Target, recording
    from burnish.kernels.tokens import put_back, take
    from burnish.ragged.tokens import TokenMemory
    from tests.kernels.aot_live_rows import launch_told

    found = []
    for capability in CAPABILITIES if everything else CAPABILITIES[:1]:
        launches: list[Launch] = []
        with recording(launches.append, Target(divmod(capability, 10), SMS[capability])):
            for dtype in (torch.int64, torch.bool) if everything else (torch.int64,):
                mask = torch.ones(32, 128, dtype=dtype)
                memory = TokenMemory(mask)
                assert memory.found is not None
                memory.found.zero_()
                for ask_contiguous in (False, True):
                    memory.find(mask, ask_contiguous)
            vectors = [torch.empty(4096, dtype=torch.int64) for _ in range(3)]
            take(memory.nearest[:2176], memory.columns[:2176], vectors, (False, False, True))
            put_back(torch.empty(2176, 768, dtype=torch.float16), memory.sources)
            all_places = TokenMemory(mask, None)
            all_places.find(mask, False)
            launch_told(all_places.cu_seqlens[-1:], capability, everything)
        found += [{"label": "tokens", **compile_launch(launch, capability)} for launch in launches]
    return found


def _exchange(ptx: str) -> list[str]:
    """The kinds of instruction that store to, and load from, what other GPUs load from and store to."""
    return sorted(set(re.findall(r"\b(?:st\.relaxed\.sys|ld\.volatile)\S*", ptx)))


def _steps(ptx: str) -> list[str]:
    """What orders memory between GPUs, with the loads and stores around it, in the order of the code; runs of the same
    kind are one."""
    kinds = (
        r"st\.relaxed\.sys|fence\.acq_rel\.sys|ld\.acquire\.sys|bar\.sync|griddepcontrol\.wait"
        r"|st\.global\.v4|ld\.global\.cg\.v4|ld\.global\.nc"
    )
    return [kind for kind, _ in itertools.groupby(re.findall(kinds, ptx))]


def few() -> dict[str, Any]:
    """A little of all, in one process."""
    rows = [kernels_for_rows(rows) for rows in ([384], [384, 390, 600, 1000])]
    return {"first": compile_first(), "rows": rows, **{kind: of_kind(False) for kind, of_kind in OF_ONE_KIND.items()}}


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


OF_ONE_KIND = {
    "--barriers": barriers,
    "--attention": attention_at_models_sizes,
    "--shared-attention": shared_attention,
    "--finishing": finishing,
    "--gelu": around_gelu,
    "--vocabularies": full_vocabularies,
    "--shared-memory": shared_memory_of_gpus,
    "--pushed-rows": rows_pushed_between_gpus,
    "--tokens": tokens_of_padded_batches,
}

if __name__ == "__main__":
    kind, *_ = wanted = sys.argv[1:]
    if kind == "--few":
        json.dump(few(), sys.stdout)
    else:
        json.dump(OF_ONE_KIND[kind](True) if kind in OF_ONE_KIND else compile_all(wanted), sys.stdout)
