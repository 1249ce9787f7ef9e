"""`isolate`: the inputs that a submodule really gets, and a model that is afterwards as it was."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import burnish
from tests import zoo


class Attend(nn.Module):
    """Takes nested inputs, the same tensor twice, and changes one of them in place."""

    def forward(self, q: Tensor, k: Tensor, *, tables: tuple[Tensor, Tensor], flag: bool = False) -> Tensor:
        assert q is k
        out: Tensor = q * tables[0] + tables[1]
        q.zero_()
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.layers = nn.ModuleList([Attend(), Attend()])
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, x, tables=(x + 1, x + 2), flag=True)
        raise AssertionError("the pass ends at the submodule")


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(
    ("case", "path"),
    [
        ("llama-sdpa-mask", "model.layers.1"),
        ("llama-sdpa-mask", "model.layers.1.self_attn"),
        ("llama-eager", "model.layers.0.mlp"),
        ("t5-sdpa", "decoder.block.1.layer.1"),
        ("whisper-sdpa", "decoder.layers.1"),
    ],
)
def test_it_computes_alone_what_it_computes_in_the_model(case: str, path: str) -> None:
    """With caches that the model makes (Llama, T5, Whisper), several inputs, masks and rotary tables."""
    model = zoo.CASES[case].build()
    kwargs = zoo.CASES[case].inputs(2, 16, torch.float32)
    module, own_args, own_kwargs = burnish.isolate(model, (), path, kwargs)
    assert module is model.get_submodule(path)
    inside: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: inside.append(output))
    with torch.no_grad():
        model(**kwargs)
        handle.remove()
        alone = module(*own_args, **own_kwargs)
    assert all(map(torch.equal, tensors(alone), tensors(inside[0])))


@pytest.mark.parametrize(("case", "path"), [("llama-sdpa", "model.layers.1"), ("t5-sdpa", "decoder.block.1")])
def test_a_cache_that_the_model_makes_is_left_out(case: str, path: str) -> None:
    """Or each call would find the keys and values of those before."""
    model = zoo.CASES[case].build()
    kwargs = {**zoo.CASES[case].inputs(1, 4, torch.float32), "use_cache": True}
    module, own_args, own_kwargs = burnish.isolate(model, (), path, kwargs)
    assert own_kwargs["past_key_values"] is None
    with torch.no_grad():
        first, second = (tensors(module(*own_args, **own_kwargs)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_inputs_of_the_first_call_are_copies() -> None:
    model = Model().eval()
    x = torch.randn(3, 4)
    module, args, kwargs = burnish.isolate(model, (x,), "layers.0")
    assert module is model.layers[0]
    q, k = args
    assert q is k
    with torch.no_grad():
        assert torch.equal(q, model.norm(x))
    assert torch.equal(kwargs["tables"][1], q + 2)
    assert kwargs["flag"] is True
    assert not any(tensor.requires_grad for tensor in tensors((args, kwargs)))
    assert burnish.isolate(model, (x,), "layers.1").args[0].count_nonzero()  # what layer 0 zeroed was the pass' own


def test_nothing_of_the_model_is_changed() -> None:
    model = Model().train()
    x = torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict()), x.clone(), torch.random.get_rng_state()
    burnish.isolate(model, (x,), "layers.0")
    after = model.state_dict(), x, torch.random.get_rng_state()
    assert all(map(torch.equal, tensors(before), tensors(after)))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_hooks_are_gone_after_an_error() -> None:
    model = Model().eval()
    with pytest.raises(RuntimeError):
        burnish.isolate(model, (torch.randn(3, 5),), "layers.0")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_of_the_users_run_when_the_module_is_called_alone() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    module, args, _ = burnish.isolate(model, (torch.zeros(2),), "1")
    assert (args[0].sum(), module(*args).sum()) == (0, 2)


@pytest.mark.parametrize(
    ("args", "path", "said"),
    [
        (
            (torch.randn(3, 4),),
            "layers.two.q",
            "path='layers.two.q': layers is a ModuleList, which has 0, 1",
        ),
        ((torch.randn(3, 4),), "", "path='': this is a Model, which has norm, dropout, layers, after"),
        ((torch.randn(3, 4),), "after.x", "after is a Linear, which has no submodules"),
        ((torch.randn(3, 4),), "layers", "a ModuleList is never called itself; it has 0, 1"),
    ],
)
def test_paths_that_lead_nowhere(args: Any, path: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        burnish.isolate(Model().eval(), args, path)


def test_a_submodule_that_is_not_reached() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    with pytest.raises(ValueError, match="path='unused': these inputs do not reach this Linear"):
        burnish.isolate(Half(), (torch.randn(1, 2),), "unused")


def test_bad_arguments() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(TypeError, match=r"write \(x,\) for one input"):
        burnish.isolate(model, torch.randn(1, 2), "0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nn\.Module is needed, not function"):
        burnish.isolate(lambda x: x, (), "0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="this one is optimized"):
        burnish.isolate(burnish.optimize(model), (torch.randn(1, 2),), "0")


def test_a_cache_among_the_inputs_is_refused() -> None:
    model = zoo.CASES["llama-sdpa"].build()
    kwargs = zoo.CASES["llama-sdpa"].inputs(1, 4, torch.float32)
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="the inputs hold a DynamicCache, which each call would lengthen"):
        burnish.isolate(model, (), "model.layers.0", {**kwargs, "past_key_values": DynamicCache()})
