"""Training on a GPU: gradients by the rule and the same bits each time, compiled, under autocast, as CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import burnish
from burnish.numerics import assert_close
from burnish.runtime.module import OptimizedModule
from tests.zoo.case import seeded, token_ids
from tests.zoo.hugging_face import llama_like
from tests.zoo.plain import NanoGPT

pytestmark = pytest.mark.gpu
VOCAB = 512


class GPT(nn.Module):
    """A GPT of two blocks with its loss. `recompute` runs each block under activation checkpointing."""

    def __init__(self, recompute: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.gpt = NanoGPT(2, 256, 4, 256, VOCAB, bias=True, sdpa=True, dropout=0.0)
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gpt.wte(ids) + self.gpt.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.gpt.h:
            x = block(x) if self.recompute is None else self.recompute(block, x)
        logits = self.gpt.lm_head(self.gpt.ln_f(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Llama(nn.Module):
    """A Llama of two layers with its loss, as Hugging Face computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama_like(vocab_size=VOCAB, hidden_size=256, intermediate_size=512, head_dim=64)

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


MODELS = {"gpt": GPT, "llama": Llama, "checkpointed": partial(GPT, partial(checkpoint, use_reentrant=False))}
WAYS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "compile": partial(torch.compile, backend="burnish"),
    "graphs": partial(torch.compile, backend="burnish", mode="reduce-overhead"),
    "optimize": burnish.optimize,
}


def grads(run: Callable[..., Tensor], model: nn.Module, ids: Tensor, autocast: bool) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = run(ids)
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients(way: str, name: str, precision: str) -> None:
    torch._dynamo.reset()
    model: Any = seeded(MODELS[name]()).cuda().train()
    exact = copy.deepcopy(model).double()
    model = model.bfloat16() if precision == "bfloat16" else model
    exact.load_state_dict(model.state_dict())
    run = WAYS[way](model)
    for size in ((4, 128), (3, 100)):
        ids = token_ids(*size, VOCAB).cuda()
        first, second = (grads(run, model, ids, precision == "autocast") for _ in range(2))
        assert all(map(torch.equal, first, second)), "not the same bits"
        assert_close(second, grads(model, model, ids, precision == "autocast"), grads(exact, exact, ids, False))
    if isinstance(run, OptimizedModule):
        assert run.serving.served[-1].kept_original is None
