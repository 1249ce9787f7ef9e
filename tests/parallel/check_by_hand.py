"""Modules that are divided by hand, and what cannot be divided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import burnish
from burnish import numerics
from burnish.parallel import missing_syncs, shard_parameter, sync, tensor_parallel
from tests.parallel.models import MODELS
from tests.zoo.case import hidden, seeded
from tests.zoo.hugging_face import gpt2, llama_like


def mlp() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    seeded(layers)
    return layers


def divided_by_hand(rank: int, folder: Path) -> None:
    """Columns, then rows; the bias behind the sum is added once, and what is left out is named."""
    whole, model, x = mlp(), mlp(), hidden(2, 4, 16, torch.float32)
    exact = copy.deepcopy(whole).double()
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        shard_parameter(model, name, axis)
    assert str(model[2]) == "Linear(in_features=16, out_features=16, bias=True)"
    with torch.no_grad():
        assert not numerics.check(model(x), whole(x), exact(x.double())).ok
    assert [line.partition(":")[0] for line in missing_syncs(model)] == ["0", "2"]
    assert [line.partition(":")[0] for line in missing_syncs(model, training=False)] == ["2"]
    with pytest.raises(ValueError, match="it is divided among ranks"):  # each would run it as often as its clock says
        burnish.explain(model, (x,))
    sync(model[0], "bwd_post", "all_reduce")
    sync(model[2], "fwd_post", "all_reduce")
    assert not list(missing_syncs(model))
    with pytest.raises(ValueError, match="all_reduce at fwd_post is there already"):
        sync(model[2], "fwd_post", "all_reduce")
    inputs = [x.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float32, torch.float64)]
    results = [m(i) for m, i in zip((model, whole, exact), inputs, strict=True)]
    numerics.assert_close(*(result.detach() for result in results))
    for result in results:
        result.square().sum().backward()
    numerics.assert_close(*(i.grad for i in inputs))
    numerics.assert_close(*(m[2].bias.grad for m in (model, whole, exact)))
    with torch.no_grad():
        numerics.assert_close(burnish.optimize(model, (x,), cache="off")(x), whole(x), exact(x.double()))


def heads(queries: int, keys: int) -> Callable[[], Any]:
    return partial(llama_like, vocab_size=104, num_attention_heads=queries, num_key_value_heads=keys)


def what_does_not_fit_is_refused(rank: int, folder: Path) -> None:
    """With names and numbers, and the model stays as it was."""
    refused: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
        (llama_like, {}, "model.embed_tokens.weight: its size of 101 along axis 0 does not divide among 2 ranks"),
        (MODELS["llama"], {"plan": {"model.layers.*.mlp.act_fn": "colwise"}}, "act_fn is to be 'colwise', for which"),
        (MODELS["llama"], {"plan": {"lm_head": "diagonal"}}, "lm_head is to be 'diagonal'; there are: colwise, "),
        (MODELS["llama"], {"plan": {"head": "colwise"}}, "no module has the name 'head'"),
        (heads(1, 1), {}, "model.layers.0.self_attn: 1 heads do not divide among 2 ranks"),
        (heads(4, 1), {}, "model.layers.0.self_attn: 1 key heads do not divide among 2 ranks"),
        (
            partial(gpt2, add_cross_attention=True),
            {},
            "crossattention: what is merged there is not 4 heads",
        ),
        (lambda: tensor_parallel(MODELS["gpt2"]()), {}, "model: it is divided already"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "plan: Sequential has none, and none of its layers"),
    ]
    for make, options, message in refused:
        model = make()
        before = [(name, id(p), p.shape) for name, p in model.named_parameters()]
        with pytest.raises(ValueError) as error:
            tensor_parallel(model, **options)
        assert message in str(error.value), error.value
        assert [(name, id(p), p.shape) for name, p in model.named_parameters()] == before
    layers = mlp()
    for arguments, message in (
        (("0.weigth", 0), "0.weigth: Sequential has no parameter of that name"),
        (("0.weight", 2), "0.weight: axis=2 is none of its 2"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_parameter(layers, *arguments)
    with pytest.raises(ValueError, match=r"2\.bias: its size of 3 along axis 0 does not divide among 2 ranks"):
        shard_parameter(nn.Sequential(layers[0], layers[1], nn.Linear(2, 3)), "2.bias", 0)
    with pytest.raises(ValueError, match="there is no 'all_reduce' at 'fwd_pre'; there are: fwd_pre all_gather"):
        sync(layers[0], "fwd_pre", "all_reduce")
