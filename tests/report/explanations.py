"""Explanations made by hand: GPT-2 small (124M), one text of 128 tokens in float16 on an H200, before and after.

The floors are what the H200's measured ceilings give; the times are of the size that a profile of this model has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from burnish.report.data import (
    CUDA_GRAPH,
    Block,
    Explanation,
    GraphPicture,
    Kernel,
    Opportunity,
    OpRow,
    Profile,
    Span,
)

BANDWIDTH_GBS, GFLOPS = 4200.0, {"float16": 776e3, "float32": 51e3}
BYTES_PER_US, FLOPS_PER_US = BANDWIDTH_GBS * 1e3, GFLOPS["float16"] * 1e3
LAUNCH_US = 1.6
LAYERS, TOKENS, WIDTH, VOCABULARY = 12, 128, 768, 50257

GEMM = "nvjet_hsh_64x32_64x16_4x1_v_bz_bias_TNN"
NORM = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float, false>(int, float)"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>(int)"
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false>>(Params)"

T = TypeVar("T")


def shape(*sizes: int) -> str:
    return f"float16[{', '.join(map(str, sizes))}]"


HIDDEN = shape(1, TOKENS, WIDTH)


def op_row(
    name: str,
    op: str,
    module: str,
    source: str,
    code: str,
    us: float,
    *,
    output: str = HIDDEN,
    flops: float = 0.0,
    elements: float = 0.0,
    kernel: str = "",
    launches: int = 1,
    impl: str | None = None,
) -> OpRow:
    """elements: how many float16 are read and written."""
    memory, compute = 2 * elements / BYTES_PER_US, flops / FLOPS_PER_US
    floor = max(memory, compute)
    kernels = (Kernel(kernel, launches, us, (96, 1, 1), (128, 1, 1)),) if us else ()
    return OpRow(
        name=name,
        op=op,
        module=module,
        source=source,
        code=code,
        inputs=(HIDDEN,),
        output=output,
        dtype="float16",
        flops=flops,
        bytes=2 * elements,
        floor_us=floor,
        predicted_us=max(floor * 1.2, LAUNCH_US),
        bound="launch" if floor < LAUNCH_US else "memory" if memory > compute else "compute",
        us=us,
        kernels=kernels,
        impl=impl,
    )


def product(name: str, op: str, module: str, line: int, us: float, n: int, k: int, **more: Any) -> OpRow:
    source = more.pop("source", f"pytorch_utils.py:{line}")
    return op_row(
        name,
        op,
        module,
        source,
        "x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)",
        us,
        output=shape(1, TOKENS, n),
        flops=2.0 * TOKENS * n * k,
        elements=float(n * k + TOKENS * (n + k)),
        kernel=more.pop("kernel", GEMM),
        **more,
    )


def layer_before() -> Block:
    wide, hidden = TOKENS * 4 * WIDTH, TOKENS * WIDTH
    gelu = "0.5 * input * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (input + 0.044715 * torch.pow(input, 3.0))))"

    def norm(name: str, module: str, line: int) -> OpRow:
        code = f"hidden_states = self.{module}(hidden_states)"
        source = f"modeling_gpt2.py:{line}"
        return op_row(name, "aten.layer_norm", module, source, code, 3.3, elements=2 * hidden, kernel=NORM)

    def act(name: str, op: str, us: float, reads: int = 1) -> OpRow:
        wide_shape = shape(1, TOKENS, 4 * WIDTH)
        elements = (reads + 1) * wide
        return op_row(
            name,
            f"aten.{op}",
            "mlp.act",
            "activations.py:47",
            gelu,
            us,
            output=wide_shape,
            elements=elements,
            kernel=ELEMENTWISE,
        )

    def view(name: str, op: str, module: str, line: int) -> OpRow:
        return op_row(name, f"aten.{op}", module, f"modeling_gpt2.py:{line}", "query = query.view(shape)", 0.0)

    add = "hidden_states = attn_output + residual"
    rows = [
        norm("layer_norm", "ln_1", 254),
        product("addmm", "aten.addmm", "attn.c_attn", 116, 5.4, 3 * WIDTH, WIDTH),
        view("split", "split", "attn", 201),
        view("view_3", "view", "attn", 203),
        view("transpose", "transpose", "attn", 203),
        op_row(
            "attention",
            "aten.scaled_dot_product_attention",
            "attn",
            "sdpa_attention.py:92",
            "attn_output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)",
            6.1,
            output=shape(1, 12, TOKENS, 64),
            flops=4.0 * TOKENS * TOKENS * WIDTH,
            elements=4.0 * hidden,
            kernel=FLASH,
        ),
        op_row(
            "reshape", "aten.reshape", "attn", "modeling_gpt2.py:225", "attn_output = attn_output.reshape(...)", 0.0
        ),
        product("addmm_1", "aten.addmm", "attn.c_proj", 116, 4.1, WIDTH, WIDTH),
        op_row("add_5", "aten.add", "", "modeling_gpt2.py:267", add, 2.1, elements=3 * hidden, kernel=ELEMENTWISE),
        norm("layer_norm_1", "ln_2", 289),
        product("addmm_2", "aten.addmm", "mlp.c_fc", 116, 6.0, 4 * WIDTH, WIDTH),
        act("mul_4", "mul", 2.2),
        act("pow_1", "pow", 2.4),
        act("mul_5", "mul", 2.2),
        act("add_6", "add", 2.3, reads=2),
        act("mul_6", "mul", 2.2),
        act("tanh", "tanh", 2.3),
        act("add_7", "add", 2.2),
        act("mul_7", "mul", 2.3, reads=2),
        product("addmm_3", "aten.addmm", "mlp.c_proj", 116, 8.3, WIDTH, 4 * WIDTH),
        op_row("add_8", "aten.add", "", "modeling_gpt2.py:296", add, 2.1, elements=3 * hidden, kernel=ELEMENTWISE),
    ]
    return Block("transformer.h.*", "GPT2Block", LAYERS, tuple(rows))


def layer_after() -> Block:
    hidden = TOKENS * WIDTH
    fused = {"source": "modeling_gpt2.py:289"}
    rows = [
        product("linear", "burnish.linear", "attn.c_attn", 116, 4.3, 3 * WIDTH, WIDTH, kernel="_linear", impl="triton"),
        op_row(
            "attention",
            "burnish.attention",
            "attn",
            "sdpa_attention.py:92",
            "attn_output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)",
            3.2,
            output=shape(1, 12, TOKENS, 64),
            flops=2.0 * TOKENS * TOKENS * WIDTH,
            elements=4.0 * hidden,
            kernel="_attention",
            impl="gluon",
        ),
        product(
            "linear_add_layer_norm",
            "burnish.linear_add_layer_norm",
            "attn.c_proj",
            116,
            4.0,
            WIDTH,
            WIDTH,
            kernel="_linear_norm",
            impl="triton",
            **fused,
        ),
        product("linear_1", "burnish.linear", "mlp.c_fc", 116, 4.6, 4 * WIDTH, WIDTH, kernel="_linear", impl="triton"),
        product(
            "linear_add_layer_norm_1",
            "burnish.linear_add_layer_norm",
            "mlp.c_proj",
            116,
            6.9,
            WIDTH,
            4 * WIDTH,
            kernel="_linear_norm",
            impl="triton",
            **fused,
        ),
    ]
    return Block("transformer.h.*", "GPT2Block", LAYERS, tuple(rows))


def ends(after: bool) -> tuple[Block, Block, Block]:
    """What stands before and after the layers."""
    hidden = float(TOKENS * WIDTH)
    head = product(
        "linear",
        "burnish.linear" if after else "aten.linear",
        "",
        0,
        27.6 if after else 29.4,
        VOCABULARY,
        WIDTH,
        source="modeling_gpt2.py:738",
        kernel="nvjet_hsh_256x128_64x4_2x1_v_bz_TNT",
        impl="torch" if after else None,
    )
    lookup = "inputs_embeds = self.wte(input_ids)"
    words = op_row(
        "embedding",
        "aten.embedding",
        "wte",
        "modeling_gpt2.py:571",
        lookup,
        2.4,
        elements=2 * hidden,
        kernel="indexSelect",
    )
    where = "position_embeds = self.wpe(position_ids)"
    places = op_row(
        "embedding_1",
        "aten.embedding",
        "wpe",
        "modeling_gpt2.py:577",
        where,
        2.3,
        elements=2 * hidden,
        kernel="indexSelect",
    )
    both = "hidden_states = inputs_embeds + position_embeds"
    add = op_row("add_1", "aten.add", "", "modeling_gpt2.py:578", both, 2.0, elements=3 * hidden, kernel=ELEMENTWISE)
    last = "hidden_states = self.ln_f(hidden_states)"
    norm = op_row("ln", "aten.layer_norm", "", "modeling_gpt2.py:640", last, 3.2, elements=2 * hidden, kernel=NORM)
    return (
        Block("transformer", "GPT2Model", 1, (words, places, add)),
        Block("transformer.ln_f", "LayerNorm", 1, (norm,)),
        Block("lm_head", "Linear", 1, (head,)),
    )


def profile(after: bool) -> Profile:
    first, norm, head = ends(after)
    blocks = (first, layer_after() if after else layer_before(), norm, head)
    version, us = ("optimized", 371.0) if after else ("as it was", 4620.0)
    return Profile(version, "NVIDIA H200", False, blocks, us, BANDWIDTH_GBS, GFLOPS)


ACTIVATION = ("mul_4", "pow_1", "mul_5", "add_6", "mul_6", "tanh", "add_7", "mul_7")


def opportunities(after: bool) -> tuple[Opportunity, ...]:
    def at(
        rewrite: str, op: str, nodes: Sequence[str], before: float, predicted: float, measured: float
    ) -> Opportunity:
        got = measured if after else None
        return Opportunity(rewrite, op, "transformer.h.*", LAYERS, tuple(nodes), before, predicted, got)

    blocked = "gelu_tanh: is burnish::gelu_tanh where the pattern has mul"
    return (
        at("add_layer_norm", "burnish.linear_add_layer_norm", ("addmm_1", "add_5", "layer_norm_1"), 9.5, 3.3, 4.0),
        at("linear + activation", "burnish.linear", ("addmm_2", *ACTIVATION), 24.1, 3.9, 4.6),
        at("attention", "burnish.attention", ("split", "view_3", "transpose", "attention", "reshape"), 6.1, 2.8, 3.2),
        at("add_layer_norm (next layer)", "burnish.linear_add_layer_norm", ("addmm_3", "add_8"), 10.4, 5.2, 6.9),
        Opportunity("gated_mlp", "burnish.gated_mlp", "transformer.h.*", LAYERS, (), 0.0, 0.0, None, blocked),
    )


def timeline(block: Block, gap: float) -> tuple[Span, ...]:
    spans, now = [], 0.0
    for row in block.rows:
        for kernel in row.kernels:
            spans.append(Span(kernel.name, row.name, now, kernel.us))
            now += kernel.us + gap
    return tuple(spans)


def pictures(after: bool) -> tuple[GraphPicture, ...]:
    groups = {
        "linear + activation": ("addmm_2", *ACTIVATION),
        "add_layer_norm": ("addmm_1", "add_5", "layer_norm_1"),
        "attention": ("split", "view_3", "transpose", "attention", "reshape"),
        "add_layer_norm (next layer)": ("addmm_3", "add_8"),
    }
    group_of = {node: group for group, nodes in groups.items() for node in nodes}
    rows = layer_before().rows
    chain = [row.name for row in rows]
    # GELU as it is written reads its input three times.
    skips = [("hidden", "add_5"), ("add_5", "add_8"), ("addmm_2", "pow_1"), ("addmm_2", "add_6"), ("mul_4", "mul_7")]
    edges = [*zip(["hidden", *chain], chain, strict=False), *skips]
    edges.remove(("mul_4", "pow_1"))
    nodes = [("hidden", "input", ""), *((row.name, row.op, group_of.get(row.name, "")) for row in rows)]
    before = GraphPicture("As it was", tuple(nodes), tuple(edges))
    if not after:
        return (before,)
    made = ("", "attention", "add_layer_norm", "linear + activation", "add_layer_norm (next layer)")
    rows = layer_after().rows
    chain = [row.name for row in rows]
    nodes = [("hidden", "input", ""), *((row.name, row.op, group) for row, group in zip(rows, made, strict=True))]
    skips = [("hidden", "linear_add_layer_norm"), ("linear_add_layer_norm", "linear_add_layer_norm_1")]
    edges = [*zip(["hidden", *chain], chain, strict=False), *skips]
    return (before, GraphPicture("Optimized", tuple(nodes), tuple(edges)))


CODE = """\
def forward(self, input_ids):
    embedding = torch.ops.aten.embedding.default(self.transformer.wte.weight, input_ids)
    add_layer_norm = torch.ops.burnish.add_layer_norm.default(embedding, positions, weight, bias, 1e-05, True)
    linear = torch.ops.burnish.linear.default(add_layer_norm[0], c_attn_weight, c_attn_bias, 'none', None)
    return linear
"""


def gpt2(after: bool = True) -> Explanation:
    """after: with the optimized version beside; otherwise what `explain` finds before any change."""
    return Explanation(
        model="GPT2LMHeadModel",
        inputs=("input_ids int64[1, 128]",),
        before=profile(after=False),
        after=profile(after=True) if after else None,
        opportunities=opportunities(after),
        pictures=pictures(after),
        timeline=timeline(layer_after(), 0.4) if after else timeline(layer_before(), 9.0),
        code=CODE,
        notes=("One call takes 4.62 ms with the profiler off and 7.9 ms with it on; times are scaled to the first.",),
    )


def with_graph(explanation: Explanation) -> Explanation:
    """With what a CUDA graph saves, or has saved."""
    waits, after = explanation.before.unattributed_us, explanation.after
    left = None if after is None else after.unattributed_us
    graph = Opportunity(CUDA_GRAPH, "one launch", "", 1, (), waits, 8.0, left)
    return replace(explanation, opportunities=(graph, *explanation.opportunities))


def predicted() -> Explanation:
    """For a device that is not here: nothing is measured, so there are no kernels and no timeline."""
    block = layer_before()
    rows = tuple(replace(row, us=None, kernels=()) for row in block.rows)
    blocks = (replace(block, rows=rows),)
    us = sum(row.predicted_us for row in rows) * LAYERS
    found = Profile("as it was", "NVIDIA A100", True, blocks, us, BANDWIDTH_GBS, GFLOPS)
    possible = tuple(replace(o, before_us=o.before_us / 3, after_us=o.after_us / 3) for o in opportunities(False))
    return Explanation("GPT2LMHeadModel", ("input_ids int64[1, 128]",), found, opportunities=possible)


def with_strings(value: T, change: Callable[[str], str]) -> T:
    """A copy with every string changed, the field `bound` left as it is."""
    made: Any = value
    if isinstance(value, str):
        made = change(value)
    elif isinstance(value, tuple):
        made = tuple(with_strings(each, change) for each in value)
    elif is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.name != "bound"]
        made = replace(value, **{name: with_strings(getattr(value, name), change) for name in names})
    return made
