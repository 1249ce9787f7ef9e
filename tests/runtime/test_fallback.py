"""What is left to Hugging Face: its tokens, by the optimized forward, with a cache that stays where it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import burnish
from burnish.runtime.kv_cache import KVCache
from burnish.runtime.module import OptimizedModule
from tests.runtime import encoder_decoders
from tests.runtime.test_generate import built, left_padded, llama, prompt


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, OptimizedModule]:
    model = built(llama)
    return model, burnish.optimize(copy.deepcopy(model), cache="off")


@pytest.fixture(scope="module")
def encoder_decoder() -> tuple[Any, OptimizedModule]:
    model = encoder_decoders.built(encoder_decoders.FAMILIES["t5"])
    return model, burnish.optimize(copy.deepcopy(model), cache="off")


def quietly(model: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(*args, **kwargs)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}],
    ids=lambda options: ", ".join(options),
)
def test_tokens_are_hugging_faces(pair: tuple[Any, OptimizedModule], options: dict[str, Any]) -> None:
    model, fast = pair
    ids, mask = left_padded(prompt())
    for given in ({}, {"attention_mask": mask}):
        expected = model.generate(ids if given else prompt(), max_new_tokens=40, **options, **given)
        assert torch.equal(quietly(fast, ids if given else prompt(), max_new_tokens=40, **options, **given), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"no_repeat_ngram_size": 2}], ids=lambda o: ", ".join(o))
def test_tokens_of_encoder_decoders_are_hugging_faces(
    encoder_decoder: tuple[Any, OptimizedModule], options: dict[str, Any]
) -> None:
    model, fast = encoder_decoder
    source = encoder_decoders.source()
    given = {"attention_mask": encoder_decoders.padding(source), "max_new_tokens": 40, **options}
    expected = model.generate(source, **given)
    assert torch.equal(quietly(fast, source, **given), expected)
    assert not torch.equal(expected, quietly(fast, source, **given | {"attention_mask": torch.ones_like(source)}))


def test_every_length_has_one_graph_and_one_cache(pair: tuple[Any, OptimizedModule]) -> None:
    model, _ = pair
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    ids, mask = left_padded(prompt())
    quietly(fast, ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
    entries, cache = len(fast._entries), fast.__dict__["_fallback_cache"][1]
    places = [tensor.data_ptr() for tensor in cache.tensors()]
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=40, num_beams=2)
    assert torch.equal(quietly(fast, ids, attention_mask=mask, max_new_tokens=40, num_beams=2), expected)
    assert len(fast._entries) == entries == 2
    assert fast.__dict__["_fallback_cache"][1] is cache
    assert [tensor.data_ptr() for tensor in cache.tensors()] == places


def test_the_forward_is_the_optimized_one(pair: tuple[Any, OptimizedModule], monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair
    calls = []
    served = OptimizedModule._serve
    monkeypatch.setattr(
        OptimizedModule, "_serve", lambda self, args, kwargs: calls.append(kwargs) or served(self, args, kwargs)
    )
    quietly(fast, prompt(), max_new_tokens=7, num_beams=2)
    assert len(calls) == 7
    assert all(isinstance(call["past_key_values"], KVCache) for call in calls)


def test_a_tokenizer_for_stop_strings_does_not_keep_the_forward_from_being_optimized() -> None:
    fast = burnish.optimize(built(llama), cache="off")
    quietly(fast, prompt(), max_new_tokens=2, num_beams=2, tokenizer=object())
    assert len(fast.schedule.programs) == 2  # type: ignore[attr-defined]


def test_a_reason_is_told_once_for_a_model(pair: tuple[Any, OptimizedModule]) -> None:
    fast = burnish.optimize(copy.deepcopy(pair[0]), cache="off")
    with pytest.warns(UserWarning, match="left to Hugging Face, because of num_beams=2"):
        fast.generate(prompt(), max_new_tokens=2, num_beams=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.generate(prompt(), max_new_tokens=2, num_beams=3)
    with pytest.warns(UserWarning, match="because of no_repeat_ngram_size=2$"):
        fast.generate(prompt(), max_new_tokens=2, num_beams=3, no_repeat_ngram_size=2)


def test_what_the_optimized_forward_cannot_do_right_is_done_by_the_model_as_it_was(
    pair: tuple[Any, OptimizedModule],
) -> None:
    model, fast = pair
    expected = model.generate(prompt(1), max_new_tokens=9, prompt_lookup_num_tokens=2)
    with pytest.warns(UserWarning, match="with the model as it was, because of prompt_lookup_num_tokens=2"):
        assert torch.equal(fast.generate(prompt(1), max_new_tokens=9, prompt_lookup_num_tokens=2), expected)
    wanted = {"max_new_tokens": 3, "output_attentions": True, "return_dict_in_generate": True}
    result, theirs = quietly(fast, prompt(), **wanted), model.generate(prompt(), **wanted)
    for mine, other in zip(result.attentions[-1], theirs.attentions[-1], strict=True):
        torch.testing.assert_close(mine, other)


def test_a_result_that_shows_its_cache_keeps_it(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair
    wanted = {"max_new_tokens": 3, "num_beams": 2, "return_dict_in_generate": True}
    result = quietly(fast, prompt(), **wanted)
    before = result.past_key_values.layers[0].keys.clone()
    quietly(fast, prompt().flip(1), **wanted)
    assert torch.equal(result.past_key_values.layers[0].keys, before)


def test_logits_processors_of_ones_own(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair

    class Odd(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, torch.arange(0, scores.shape[1], 2), -torch.inf)

    processors = transformers.LogitsProcessorList([Odd()])
    out = quietly(fast, prompt(), max_new_tokens=9, logits_processor=processors)
    assert torch.equal(out, model.generate(prompt(), max_new_tokens=9, logits_processor=processors))
    assert (out[:, 12:] % 2 == 1).all()
