"""The cache of encoder-decoders, which Hugging Face's models fill as optimized ones do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import burnish
from burnish.runtime.encoder_decoder_cache import EncoderDecoderKVCache
from burnish.runtime.module import OptimizedModule
from tests.runtime.encoder_decoders import FAMILIES, audio, built, padding, source, whisper

Pair = tuple[Any, OptimizedModule, dict[str, Tensor], int]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["t5", pytest.param("whisper", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest) -> Pair:
    """A model, what was made of a copy of it, an encoder's inputs and the length of its output."""
    model = built(whisper if request.param == "whisper" else FAMILIES[request.param])
    inputs = {"input_features": audio()} if request.param == "whisper" else {"input_ids": source()}
    length = 20 if request.param == "whisper" else 11
    return model, burnish.optimize(copy.deepcopy(model), cache="off"), inputs, length


@pytest.mark.parametrize("which", [0, 1], ids=["as it was", "optimized"])
def test_a_model_fills_it_in_place(pair: Pair, which: int) -> None:
    model, inputs, length = pair[which], pair[2], pair[3]
    ids = source(9, seed=3)
    expected = pair[0](**inputs, decoder_input_ids=ids).logits
    cache = EncoderDecoderKVCache.of(model, 2, 16, length)
    places = [tensor.data_ptr() for tensor in pytree.tree_leaves(cache)]
    given = inputs
    for prompt in (1, 2):  # the second after a reset
        for begin, end in ((0, prompt), (prompt, 6), (6, 7), (7, 9)):
            result = model(**given, decoder_input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
            if which == 0:
                cache.advance(end - begin)
            torch.testing.assert_close(result.logits, expected[:, begin:end])
            assert result.past_key_values is cache
            assert cache.filled == end
            given = {"encoder_outputs": (torch.full_like(result.encoder_last_hidden_state, torch.nan),)}  # not read
        cache.reset()
        given = inputs
    assert [tensor.data_ptr() for tensor in pytree.tree_leaves(cache)] == places
    assert not any(cache.is_updated.values())


def test_what_does_not_fit_is_an_error(pair: Pair) -> None:
    model, fast, inputs, length = pair
    cache = EncoderDecoderKVCache.of(model, 2, 8, length)
    with pytest.raises(ValueError, match="holds 0 of at most 8 tokens: 9 more do not fit"):
        fast(**inputs, decoder_input_ids=source(9), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="source_length=0"):
        EncoderDecoderKVCache.of(model, 2, 8, 0)
    with pytest.raises(ValueError, match="batch=0"):
        EncoderDecoderKVCache.of(model, 0, 8, length)
    for which in (model, fast):
        other = EncoderDecoderKVCache.of(model, 2, 8, length + 1)
        with pytest.raises(
            ValueError, match=f"memory for {length + 1} positions .* make it with source_length={length}"
        ):
            which(**inputs, decoder_input_ids=source(2), past_key_values=other, use_cache=True)


def test_it_grows_and_reorders_where_it_is(pair: Pair) -> None:
    model, fast, inputs, length = pair
    ids = source(9, seed=3)
    cache = EncoderDecoderKVCache.of(model, 2, 8, length)
    call = {**inputs, "decoder_input_ids": ids[:, :8], "past_key_values": cache, "use_cache": True}
    encoded = fast(**call).encoder_last_hidden_state
    cache.grow(12)
    places = [tensor.data_ptr() for tensor in pytree.tree_leaves(cache)]
    cache.reorder_cache(torch.tensor([1, 0]))
    call = {"encoder_outputs": (encoded.flip(0),), "past_key_values": cache, "use_cache": True}
    logits = fast(decoder_input_ids=ids[:, 8:].flip(0), **call).logits
    expected = model(**inputs, decoder_input_ids=ids).logits[:, 8:].flip(0)
    torch.testing.assert_close(logits, expected)
    assert [tensor.data_ptr() for tensor in pytree.tree_leaves(cache)] == places


def test_the_decoder_alone_may_have_another_number_of_layers() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_heads=4, num_layers=1)
    config.num_decoder_layers = 3
    model = transformers.T5ForConditionalGeneration(config).eval()
    cache = EncoderDecoderKVCache.of(model, 2, 8, 11)
    assert len(cache) == 3
    mask, ids = padding(source()), source(2)
    logits = model(source(), attention_mask=mask, decoder_input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(source(), attention_mask=mask, decoder_input_ids=ids).logits)
