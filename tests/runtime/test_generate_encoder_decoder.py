"""Generation by encoder-decoders: Hugging Face's tokens, whatever is asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import burnish
from burnish.runtime import generate as generation
from burnish.runtime.module import OptimizedModule
from tests.runtime.encoder_decoders import FAMILIES, built, padding, source
from tests.slow import slow

QUICK = ("t5", "bart")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, OptimizedModule]:
    """A small T5 and what was made of a copy of it."""
    model = built(FAMILIES["t5"])
    return model, burnish.optimize(copy.deepcopy(model), cache="off")


def same(pair: tuple[Any, OptimizedModule], *args: Any, **kwargs: Any) -> Tensor:
    """What both generate; nothing is left to Hugging Face."""
    model, fast = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out: Tensor = fast.generate(*args, **kwargs)
    assert torch.equal(out, model.generate(*args, **kwargs))
    return out


@pytest.mark.parametrize("family", [name if name in QUICK else slow(name) for name in FAMILIES])
def test_greedy_tokens_are_hugging_faces(family: str) -> None:
    model = built(FAMILIES[family])
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    out = same((model, fast), source(), attention_mask=padding(source()), max_new_tokens=200)
    assert len(out.unique()) > 4, "the test must tell tokens apart"
    assert not torch.equal(out, same((model, fast), source(), max_new_tokens=200)), "what is padded must not count"
    reports = [served.kept_original for served in fast.schedule.served]  # type: ignore[attr-defined]
    assert not any(reason and "beat" not in reason for reason in reports), reports


def test_a_step_attends_to_both_caches_and_runs_no_encoder(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair
    fast.generate(source(), max_new_tokens=4)
    prompt, step = (program.graph_module.graph for program in fast.schedule.programs[:2])  # type: ignore[attr-defined]
    count = {op: sum(f"burnish.{op}." in str(node.target) for node in step.nodes) for op in ("attention", "append_kv")}
    assert count == {"attention": 2, "append_kv": 2}
    cached = [node for node in step.nodes if "burnish.cached_attention." in str(node.target)]
    assert [node.args[7] is not None for node in cached] == [True, True]  # the bias of relative positions
    crossed = [node for node in step.nodes if "burnish.attention." in str(node.target)]
    biases = {str(node.args[3]) for node in crossed}
    assert all("padding_bias" in bias for bias in biases), "a bias of zeros costs time"
    assert not any("encoder.block" in str(node.target) for node in step.nodes)
    assert any("encoder.block" in str(node.target) for node in prompt.nodes)
    slots = fast.serving._prepared[1].executable.slots  # type: ignore[attr-defined]
    assert all(slot.in_place for slot in slots if slot.op.donates)


def test_a_session_serves_one_source_after_another(
    pair: tuple[Any, OptimizedModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    same(pair, source(), max_new_tokens=3)
    places = [tensor.data_ptr() for tensor in _session(pair[1]).cache.cross_attention_cache.tensors()]
    monkeypatch.setattr(generation, "EncoderDecoderSession", lambda *_: pytest.fail("the memory was not used again"))
    other = source(50, seed=2)
    same(pair, other, attention_mask=padding(other, 33), max_new_tokens=40)
    same(pair, source(), max_new_tokens=40)
    assert [tensor.data_ptr() for tensor in _session(pair[1]).cache.cross_attention_cache.tensors()] == places


def test_a_longer_source_and_another_batch(pair: tuple[Any, OptimizedModule]) -> None:
    same(pair, source(70, batch=3), max_new_tokens=40)
    same(pair, source(64, batch=1), max_new_tokens=40)


def test_padding_on_the_left(pair: tuple[Any, OptimizedModule]) -> None:
    same(pair, source(), attention_mask=padding(source()).flip(1), max_new_tokens=40)


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_input_ids": source(4)},
        {"decoder_input_ids": torch.cat([torch.zeros(2, 1, dtype=torch.int64), source(3)], dim=1)},
        {"decoder_start_token_id": 9},
        {"repetition_penalty": 1.4},
        {"do_sample": True, "top_k": 1},
        {"max_length": 20, "max_new_tokens": None},
        {"suppress_tokens": [4, 5, 6, *range(20, 40), 1000]},
        {"begin_suppress_tokens": list(range(10, 90))},
        {"forced_bos_token_id": 7},
        {"forced_bos_token_id": 7, "begin_suppress_tokens": list(range(10, 90))},
        {"forced_eos_token_id": [8, 9], "max_new_tokens": 12},
        {"forced_eos_token_id": 8, "eos_token_id": 8, "max_new_tokens": 1},
    ],
    ids=lambda options: ", ".join(options),
)
def test_options(pair: tuple[Any, OptimizedModule], options: dict[str, Any]) -> None:
    same(pair, source(), **{"max_new_tokens": 30} | options)


def test_the_options_of_tokens_make_a_difference(pair: tuple[Any, OptimizedModule]) -> None:
    plain = same(pair, source(), max_new_tokens=30)
    first, later = int(plain[0, 1]), int(plain[0, 12])
    for options in ({"suppress_tokens": [later]}, {"begin_suppress_tokens": [first]}, {"forced_bos_token_id": later}):
        assert not torch.equal(same(pair, source(), max_new_tokens=30, **options), plain)
    assert torch.equal(same(pair, source(), max_new_tokens=30), plain)


def test_rows_end_at_their_eos(pair: tuple[Any, OptimizedModule]) -> None:
    eos = int(same(pair, source(), max_new_tokens=30)[0, 15])
    out = same(pair, source(), max_new_tokens=60, eos_token_id=[eos, 96])
    assert out.shape[1] > 2


def test_return_dict(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    wanted = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    for options in ({}, {"suppress_tokens": [5, 6]}, {"forced_eos_token_id": 3}):
        result, expected = (m.generate(source(), **wanted | options) for m in (fast, model))
        assert type(result) is transformers.generation.utils.GenerateEncoderDecoderOutput
        assert torch.equal(result.sequences, expected.sequences)
        for mine, theirs in zip((*result.logits, *result.scores), (*expected.logits, *expected.scores), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_seed_gives_the_same_tokens_again_and_others_give_others(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair
    settings = {"max_new_tokens": 30, "do_sample": True, "temperature": 3.0}
    one, again, other = (fast.generate(source(), **settings, seed=s) for s in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_streamer_hears_of_every_token(pair: tuple[Any, OptimizedModule]) -> None:
    heard: list[Tensor] = []

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            heard.append(tokens)

        def end(self) -> None:
            heard.append(torch.tensor([-1]))

    out = pair[1].generate(source(batch=1), max_new_tokens=6, streamer=Streamer())
    assert torch.cat([tokens.flatten() for tokens in heard]).tolist() == [*out[0].tolist(), -1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": None}, "inputs: the prompts' token ids are needed"),
        ({"inputs": source()[0]}, "inputs has shape \\(11,\\); it must be \\(batch, length\\)"),
        ({"attention_mask": torch.ones(2, 10)}, "attention_mask has shape \\(2, 10\\)"),
        ({"decoder_input_ids": source()[:1]}, "decoder_input_ids has shape \\(1, 11\\); it must be \\(2, length\\)"),
        ({"decoder_input_ids": source(), "max_length": 11}, "max_length=11"),
    ],
)
def test_bad_input_is_refused(pair: tuple[Any, OptimizedModule], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair[1].generate(**{"inputs": source()} | given)


def test_more_than_there_are_positions_is_refused() -> None:
    fast = burnish.optimize(built(FAMILIES["bart"]), cache="off")
    with pytest.raises(ValueError, match="inputs has 300 tokens; the model has 256 positions"):
        fast.generate(source(300), max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens=256: with the prompt's 1"):
        fast.generate(source(250), max_new_tokens=256)


def _session(fast: OptimizedModule) -> Any:
    return fast.__dict__["_session"][1]
