"""The kernels of known sizes are found, with inputs that lie in memory as those of a real call would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from burnish.ahead import _calls, _like
from burnish.capture import capture
from burnish.choose import Seen
from burnish.op import Op
from burnish.prepare import Preparer
from burnish.runtime.module import Call
from burnish.tuning import Choice, Tuner, key_of
from tests import zoo


@pytest.mark.parametrize(
    "view",
    [
        lambda b, s: torch.empty(b, s, 96),
        lambda b, s: torch.empty(b, s, 3, 4, 8)[:, :, 1].transpose(1, 2),
        lambda b, s: torch.empty(b, s, 96)[..., 32:64],
        lambda b, s: torch.empty(1, s, 96).expand(b, s, 96),
        lambda b, s: torch.empty(b, 1, 1, s).expand(b, 4, s, s),
    ],
)
def test_an_input_of_another_size_lies_in_memory_as_a_real_one(view: Callable[[int, int], Tensor]) -> None:
    real = view(3, 50)
    like = _like(view(2, 7), real.shape)
    assert (like.shape, like.dtype) == (real.shape, real.dtype)
    assert like.stride() == real.stride()


def test_known_sizes_are_asked_for_as_a_call_would(monkeypatch: pytest.MonkeyPatch) -> None:
    case, tuner = zoo.CASES["bert-sdpa-mask"], Tuner("off")
    model = case.build()

    def call_of(batch: int, seq: int) -> Call:
        inputs = case.inputs(batch, seq, torch.float32)
        leaves, spec = pytree.tree_flatten(((), inputs))
        return Call((), inputs, leaves, spec)

    first = call_of(2, 16)
    prepared = Preparer(model, tuner).prepare(capture(model, (), first.kwargs))
    seen, other = Seen(prepared, first), Seen(prepared, call_of(3, 24))
    for key in (*seen.arguments, *other.arguments):
        of_another_model = tuple(size + 1 for size in key.sizes)
        for sizes in (key.sizes, of_another_model):
            tuner._disk.setdefault(key.family, {})[",".join(map(str, sizes))] = {"triton a": 1.0}

    asked: list[tuple[Op, tuple[Any, ...]]] = []

    def choose(op: Op, args: tuple[Any, ...], *, budget_us: float, in_place: bool) -> tuple[Callable[..., Any], Choice]:
        assert budget_us == 0
        asked.append((op, args))
        return op.reference, Choice("triton", config="a")

    monkeypatch.setattr(tuner, "choose", choose)
    calls = list(_calls(prepared, seen, tuner))
    assert len(calls) == len(asked)
    assert {key_of(op, args) for op, args in asked} == set(other.arguments) - set(seen.arguments)
    for op, args in asked:
        real = other.arguments[key_of(op, args)][0]
        assert list(map(compiled_for, args)) == list(map(compiled_for, real))


def compiled_for(arg: Any) -> Any:
    """What of an argument Triton compiles for."""
    if not isinstance(arg, Tensor):
        return arg
    strides = [stride for stride, size in zip(arg.stride(), arg.shape, strict=True) if size > 1]
    return arg.dtype, [(stride == 1, stride % 16 == 0) for stride in strides]
