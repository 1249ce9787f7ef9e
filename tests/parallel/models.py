"""The models that two ranks divide, and what they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from burnish import numerics
from burnish.parallel.shard import shard_of
from tests.parallel.ranks import RANKS
from tests.zoo.case import token_ids
from tests.zoo.hugging_face import gpt2, hugging_face, llama_like

IDS = token_ids(2, 8, 101)

SMALL: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": partial(llama_like, vocab_size=104, num_hidden_layers=1, use_cache=True),
    "llama_tied": partial(llama_like, vocab_size=104, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen3": partial(llama_like, "Qwen3", vocab_size=104),
    "gpt2": lambda: cached(gpt2(n_layer=1, n_positions=64)),
    "gpt2_of_two": gpt2,
    "phi3": partial(hugging_face, "Phi3ForCausalLM", "Phi3Config", "sdpa", pad_token_id=0, **SMALL),
    "gemma2": partial(hugging_face, "Gemma2ForCausalLM", "Gemma2Config", "eager", head_dim=16, **SMALL),
}


def cached(model: Any) -> Any:
    model.config.use_cache = model.generation_config.use_cache = True
    return model


class Whole:
    """A model on one process: its logits, its gradients, and both in float64."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.model = make()
        self.exact = copy.deepcopy(self.model).double()
        for model in (self.model, self.exact):
            model(IDS, labels=IDS).loss.backward()

    def check_logits(self, model: nn.Module, ids: Tensor = IDS) -> None:
        with torch.no_grad():
            numerics.assert_close(*(m(ids).logits for m in (model, self.model, self.exact)))

    def check_gradients(self, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(IDS, labels=IDS).loss.backward()
        eager, exact = (dict(m.named_parameters()) for m in (self.model, self.exact))
        assert model.state_dict().keys() == self.model.state_dict().keys()
        for name, parameter in model.named_parameters():
            shard, gradient = shard_of(parameter), parameter.grad
            assert gradient is not None, name
            whole = gradient if shard is None else shard.joined(gradient)
            verdict = numerics.check(whole, eager[name].grad, exact[name].grad)
            assert verdict.ok, f"{name}: {verdict.reason}"


def check_served(fast: Any) -> None:
    """By the optimized graph, all of it."""
    kept = [served.kept_original for served in fast.schedule.served]
    assert kept == [None] * len(kept), kept


def assert_alike(tensor: Tensor) -> None:
    """The same on all ranks."""
    found = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(found, tensor)
    assert all(torch.equal(tensor, other) for other in found)
