"""Divided models compute what whole ones do: as they are, optimized, and when they generate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.parallel import full_state_dict, tensor_parallel
from tests.parallel.models import IDS, MODELS, SMALL, Whole, assert_alike, check_served
from tests.parallel.ranks import RANKS
from tests.zoo.case import token_ids
from tests.zoo.hugging_face import hugging_face


def divided(name: str, rank: int, folder: Path) -> None:
    """A divided model computes what the whole one does, and tied weights stay tied."""
    whole, model = Whole(MODELS[name]), MODELS[name]()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensor_parallel(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert sum(p.numel() for p in model.parameters()) < 0.75 * sum(p.numel() for p in whole.model.parameters())
    whole.check_logits(model)
    whole.check_gradients(model)
    for key, tensor in full_state_dict(model).items():
        assert torch.equal(tensor, whole.model.state_dict()[key]), key


def optimized(name: str, rank: int, folder: Path) -> None:
    """So it does optimized, at another size, and when it generates."""
    whole, model = Whole(MODELS[name]), MODELS[name]()
    fast = burnish.optimize(tensor_parallel(model), (), {"input_ids": IDS}, cache="off")
    whole.check_logits(fast)
    whole.check_logits(fast, token_ids(1, 6, 101))
    check_served(fast)
    graph = fast.schedule.program.graph_module.graph
    assert not [node for node in graph.nodes if "copy_to_region" in str(node.target)], "of use to gradients alone"
    order = [node.name for node in graph.nodes if "burnish_parallel" in str(node.target)]
    assert order == [n.name for n in fast.schedule.program.captured.graph.nodes if n.name in order]
    slots = [s for s in fast.serving._prepared[0].executable.slots if s.op.name.startswith("all_reduce_add_")]
    assert len(slots) == 2 * whole.model.config.num_hidden_layers, "behind the rows"
    assert all(slot.in_place for slot in slots)
    assert {served.choices[slots[0].name].impl for served in fast.schedule.served} == {"torch"}

    prompt = IDS[:, :5]
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    expected = whole.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
    assert torch.equal(fast.generate(prompt, do_sample=False, **options), expected)
    heads = getattr(whole.model.config, "num_key_value_heads", whole.model.config.num_attention_heads)
    assert fast._session[1].cache.layers[0].keys.shape[1] == heads // RANKS
    assert_alike(fast.generate(prompt, do_sample=True, **options))
    decoding = fast.serving._prepared[1].executable.slots
    assert sum(s.op.name.startswith("all_reduce_add_") for s in decoding) == len(slots)
    with pytest.raises(ValueError, match="a model that is divided among ranks is not timed op by op"):
        fast.report((), {"input_ids": IDS})


def gradients_of_optimized(rank: int, folder: Path) -> None:
    """In eval mode, where inference leaves out what gradients need, and in train mode."""
    whole, model = Whole(MODELS["qwen3"]), MODELS["qwen3"]()
    fast = burnish.optimize(tensor_parallel(model), (), {"input_ids": IDS}, cache="off")
    whole.check_gradients(fast)
    fast.train()
    whole.check_gradients(fast)
    check_served(fast)
    inference, in_eval, in_train = fast.schedule.served
    assert "rms_norm" in str(inference.choices)
    assert "rms_norm" in str(in_train.choices)
    assert "rms_norm" not in str(in_eval.choices), "the graph as it was captured"


def note_length(seen: list[int], module: nn.Module, args: Any, result: Tensor) -> None:
    seen.append(result.shape[1])


def sequences_divided(rank: int, folder: Path) -> None:
    for name in ("qwen3", "gpt2_of_two"):
        whole, model = Whole(MODELS[name]), MODELS[name]()
        seen: list[int] = []
        tensor_parallel(model, sequence_parallel=True)
        path = "transformer.h.1.ln_1" if name == "gpt2_of_two" else "model.layers.1.input_layernorm"
        hook = partial(note_length, seen)
        handle = model.get_submodule(path).register_forward_hook(hook)
        whole.check_logits(model)
        assert set(seen) == {IDS.shape[1] // RANKS}
        whole.check_gradients(model)
    with torch.no_grad(), pytest.raises(ValueError, match="a size of 7 along axis 1 does not divide among 2 ranks"):
        model(IDS[:, :7])
    handle.remove()
    whole.check_logits(burnish.optimize(model, (), {"input_ids": IDS}, cache="off"))


def bert_by_the_names_of_its_layers(rank: int, folder: Path) -> None:
    config = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    make = partial(hugging_face, "BertForMaskedLM", "BertConfig", "sdpa", **config)
    whole, model = Whole(make), make()
    tensor_parallel(model)
    assert type(model.bert.encoder.layer[0].output.dense).__name__ == "RowParallelLinear"
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    whole.check_logits(model)
    whole.check_gradients(model)
