"""Finding patterns anywhere in a module's tree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, randn

from burnish.graph import find_in_module
from burnish.pattern import call_module


class SelfAttention(nn.Module):
    """Written like a tutorial's: the new shape comes from the tensor's own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.n_heads = 4

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[:-1] + (self.n_heads, -1)).permute(0, 2, 1, 3)  # noqa: RUF005 (people write it)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return F.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1) @ v


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = SelfAttention()
        self.dense = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.self_attn(x).transpose(1, 2).flatten(2)) + x


class Branching(nn.Module):
    """Cannot be traced: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) if self.gate(x).sum() > 0 else x


def projection(x):
    x = call_module(r"[qkv]_proj", x)
    return x.view(x.shape[:-1] + (4, -1)).permute(0, 2, 1, 3)  # noqa: RUF005 (so it is one more node)


def test_a3_projections_with_their_parents():
    found = find_in_module(Attention(), projection)
    assert [[parent for parent, _ in part] for part in found] == [["self_attn"] * 6] * 3
    assert [part[0][1].target for part in found] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert [part.match.modules[r"[qkv]_proj"] for part in found] == [part[0][1].target for part in found]


@pytest.mark.parametrize(
    ("root", "prefix"),
    [
        (SelfAttention(), ""),
        (Attention(), "self_attn"),
        (nn.Sequential(nn.Identity(), nn.Sequential(Attention())), "1.0.self_attn"),
        (Branching(), "attention.self_attn"),
        (nn.Sequential(nn.Identity(), Branching()), "1.attention.self_attn"),
        (nn.ModuleDict({"a": Attention()}), "a.self_attn"),
    ],
)
def test_a4_the_same_at_any_depth(root, prefix):
    found = find_in_module(root, projection)
    assert [[parent for parent, _ in part] for part in found] == [[prefix] * 6] * 3


def test_a_match_may_cross_module_borders():
    found = find_in_module(Attention(), lambda x, y: call_module("dense", x) + y)
    assert [[(parent, node.op) for parent, node in part] for part in found] == [
        [("", "call_module"), ("", "call_function")]
    ]
    found = find_in_module(Attention(), lambda p, v: (p @ v).transpose(1, 2).flatten(2))
    assert [[parent for parent, _ in part] for part in found] == [["self_attn", "", ""]]


def test_matches_come_in_order_of_computation():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = SelfAttention(), Branching(), SelfAttention()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).transpose(1, 2).flatten(2)
            return self.last(self.middle(x))

    found = find_in_module(Backwards(), projection)
    assert [part[0][0] for part in found] == ["first"] * 3 + ["middle.attention.self_attn"] * 3 + ["last"] * 3


def test_a_shared_module_is_searched_once_and_the_model_is_not_changed():
    block = Branching()
    model = nn.Sequential(block, block)
    x = randn(2, 3, 32)
    expected = model(x)
    assert len(find_in_module(model, projection)) == 3
    assert torch.equal(model(x), expected)
    with pytest.raises(TypeError, match="root must be a module"):
        find_in_module(lambda x: x, projection)
