"""The tables of rotary embedding: found in every spelling, once for all layers, and nothing that only looks alike."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from burnish.capture import capture
from burnish.lower import op_of
from burnish.rewrites import apply
from burnish.rewrites.raise_rope_tables import ROPE_TABLES
from burnish.runtime.kv_cache import KVCache
from burnish.verify import verify

from .conftest import normal

aten = torch.ops.aten

HALF, LENGTH = 5, 4


def frequencies(dtype: torch.dtype = torch.float32) -> Tensor:
    return (100.0 ** (-torch.arange(HALF) / HALF)).to(dtype)


def position_ids(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape or (2, LENGTH)).numel()).view(shape or (2, LENGTH))


def finish(angles: Tensor, dtype: torch.dtype = torch.float32, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def llama(positions: Tensor, inv_freq: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return finish(positions[..., None].float() * inv_freq.float(), *how)


def by_matmul(positions: Tensor, inv_freq: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """transformers until 4.5x."""
    column = inv_freq[None, :, None].float().expand(positions.shape[0], -1, 1)
    return finish((column.float() @ positions[:, None, :].float()).transpose(1, 2), *how)


def converted_first(positions: Tensor, inv_freq: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return finish(inv_freq[None, None, :] * positions.float().unsqueeze(-1), *how)


def unconverted(positions: Tensor, inv_freq: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """Integers times float32 are float32."""
    return finish(positions[..., None] * inv_freq, *how)


SPELLINGS = [llama, by_matmul, converted_first, unconverted]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_spellings(
    spelling: Callable[..., Any], dtype: torch.dtype, scaling: float, rewrite: Callable[..., Any]
) -> None:
    found = rewrite(lambda p, f: spelling(p, f, dtype, scaling), position_ids(), frequencies())
    assert found.ops == Counter(rope_tables=1)
    ((positions, inv_freq, *rest),) = found.calls
    assert [positions.op, inv_freq.op, *rest] == ["placeholder"] * 2 + [str(dtype)[6:], scaling]
    assert set(found.targets) == {torch.ops.burnish.rope_tables.default, operator.getitem}
    assert len(found.verification.units) == 2


@pytest.mark.parametrize("shape", [(LENGTH,), (1, LENGTH), (3, 1)])
def test_shapes_of_positions(shape: tuple[int, ...], rewrite: Callable[..., Any]) -> None:
    assert rewrite(llama, position_ids(*shape), frequencies()).ops == Counter(rope_tables=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_kept_in_half_precision_are_taken_unconverted(
    dtype: torch.dtype, rewrite: Callable[..., Any]
) -> None:
    found = rewrite(lambda p, f: llama(p, f, dtype), position_ids(), frequencies(dtype))
    assert found.calls[0][1].op == "placeholder"
    assert not found.targets[aten.to.dtype]


def test_frequencies_of_float64_stay_converted(rewrite: Callable[..., Any]) -> None:
    """The Op would compute in float64, where the model does not."""
    found = rewrite(llama, position_ids(), frequencies(torch.float64))
    assert found.ops == Counter(rope_tables=1)
    assert found.calls[0][1].meta["val"].dtype == torch.float32


def test_type_as(rewrite: Callable[..., Any]) -> None:
    def like(positions: Tensor, inv_freq: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(table.type_as(x) for table in llama(positions, inv_freq))

    found = rewrite(like, position_ids(), frequencies(), normal(2, dtype=torch.bfloat16))
    assert found.calls[0][2] == "bfloat16"


def test_what_only_one_of_both_has_stays_behind(rewrite: Callable[..., Any]) -> None:
    def apart(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = llama(positions, inv_freq)
        return cos * 2.0, sin * 3.0

    found = rewrite(apart, position_ids(), frequencies())
    assert found.calls[0][2:] == ("float32", 1.0)
    assert found.targets[aten.mul.Tensor] == 2


def test_a_table_that_is_also_read_unconverted(rewrite: Callable[..., Any]) -> None:
    def twice(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, ...]:
        cos, sin = llama(positions, inv_freq)
        return cos.bfloat16(), sin.bfloat16(), cos + 1

    found = rewrite(twice, position_ids(), frequencies())
    assert found.calls[0][2:] == ("float32", 1.0)
    assert found.targets[aten.to.dtype] == 2


def test_a_sine_before_its_cosine(rewrite: Callable[..., Any]) -> None:
    def reversed_order(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        sin = angles.sin().bfloat16() + 1
        return sin, angles.cos().bfloat16()

    assert rewrite(reversed_order, position_ids(), frequencies()).ops == Counter(rope_tables=1)


def test_two_sets_of_tables(rewrite: Callable[..., Any]) -> None:
    """Gemma 3 has one for its windows and one for all keys."""
    found = rewrite(lambda p, f, g: (*llama(p, f), *llama(p, g)), position_ids(), frequencies(), frequencies() / 8)
    assert found.ops == Counter(rope_tables=2)


def doubled(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def product(positions: Tensor, inv_freq: Tensor) -> Tensor:
    return positions[..., None].float() * inv_freq


NEAR: dict[str, tuple[Callable[..., Any], str]] = {
    "interleaved": (
        lambda p, f: doubled(torch.repeat_interleave(product(p, f), 2, dim=-1)),
        "is not the same angles twice side by side",
    ),
    "below each other": (
        lambda p, f: doubled(torch.cat((product(p, f), product(p, f)), dim=1)),
        "is not the same angles twice side by side",
    ),
    "different halves": (
        lambda p, f: doubled(torch.cat((product(p, f), product(p, f) + 1), dim=-1)),
        "is not the same angles twice side by side",
    ),
    "three times": (
        lambda p, f: doubled(torch.cat([product(p, f)] * 3, dim=-1)),
        "is not the same angles twice side by side",
    ),
    "no sine": (lambda p, f: torch.cat([product(p, f)] * 2, dim=-1).cos(), "there is no sine"),
    "angles in bfloat16": (
        lambda p, f: finish(p[..., None].bfloat16() * f.bfloat16()),
        "the angles are torch.bfloat16, not torch.float32",
    ),
    "shifted angles": (lambda p, f: finish(product(p, f) + 1), "is not the product of positions and a vector"),
    "frequencies for each row": (
        lambda p, f: finish(p[..., None].float() * torch.stack((f, f + 1))[:, None]),
        "is not the product of positions and a vector",
    ),
    "repeated": (
        lambda p, f: finish(p[:1, :, None].float() * f.expand(2, 1, HALF)),
        "repeats positions of shape (1, ",
    ),
    "not transposed": (
        lambda p, f: finish(f[None, :, None].expand(2, -1, 1) @ p[:, None, :].float()),
        "is not the product of positions and a vector",
    ),
}


@pytest.mark.parametrize(("near", "reason"), NEAR.values(), ids=NEAR)
def test_what_are_no_tables(near: Callable[..., Any], reason: str, rewrite: Callable[..., Any]) -> None:
    found = rewrite(near, position_ids(), frequencies())
    assert not found.ops
    assert reason in found.reasons


FAMILIES: dict[str, dict[str, int]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16},
    "Mistral": {},
    "Phi": {},
    "GPTNeoX": {},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def model_of(family: str, dtype: torch.dtype, **settings: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4} | ({} if family == "GPTNeoX" else {"num_key_value_heads": 2})
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=2, **sizes, **heads, **settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family: str, dtype: torch.dtype, rewrite: Callable[..., Any]) -> None:
    ids = torch.randint(100, (2, 7), generator=torch.Generator().manual_seed(0))
    found = rewrite(model_of(family, dtype, **FAMILIES[family]), ids)
    assert found.ops["rope_tables"] == 1
    assert not {aten.cos.default, aten.sin.default} & set(found.targets)


def test_yarns_scaling(rewrite: Callable[..., Any]) -> None:
    model = model_of("Llama", torch.bfloat16, rope_parameters=YARN)
    found = rewrite(model, torch.randint(100, (2, 7), generator=torch.Generator().manual_seed(0)))
    (call,) = [call for call in found.calls if "bfloat16" in call]
    assert call[2:] == ("bfloat16", model.model.rotary_emb.attention_scaling)


def test_a_step_with_a_cache() -> None:
    model, ids = model_of("Llama", torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64)
    cache, mask = KVCache.of(model, 2, 32), torch.ones(2, 32, dtype=torch.int64)
    with torch.no_grad():
        model(ids, past_key_values=cache, attention_mask=mask[:, :1])
        cache.advance(1)
        given = {"input_ids": ids, "past_key_values": cache, "attention_mask": mask}
        program = capture(model, (), given)
    captured = len(program.graph_module.graph.nodes)
    record = apply("tables", ROPE_TABLES, program.graph_module)
    assert record.matches == {"rope_tables": 1}
    assert (captured, record.nodes_before - record.nodes_after) == (record.nodes_before, 6)
    targets = {node.target for node in program.graph_module.graph.nodes}
    assert not targets & {aten.cos.default, aten.sin.default}
    verified = verify(
        program.graph_module,
        program.captured,
        pytree.tree_leaves(((), given)),
        lambda node: op_of(node.target).impls["torch"].fn,  # type: ignore[union-attr]
    )
    assert [unit.verdict.ok for unit in verified.units if unit.verdict and "rope_tables" in unit.ops] == [True] * 2
