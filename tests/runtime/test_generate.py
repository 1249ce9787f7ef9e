"""Text generation: the same tokens as Hugging Face's own, by whatever way they are asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import burnish
from burnish.runtime import generate as generation
from burnish.runtime.kv_cache import KVCache
from burnish.runtime.module import OptimizedModule
from burnish.runtime.session import Session
from tests.slow import slow

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON | more))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**COMMON | {"head_dim": 16})),
    "mistral-window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**COMMON | {"sliding_window": 9})
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, eos_token_id=None, bos_token_id=1, pad_token_id=0
        )
    ),
}


def built(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, OptimizedModule]:
    """A small Llama and what was made of a copy of it."""
    model = built(llama)
    return model, burnish.optimize(copy.deepcopy(model), cache="off")


def prompt(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def left_padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids * mask, mask


@pytest.mark.parametrize("tokens", [40, slow(200)])
@pytest.mark.parametrize("family", [slow(name) if name.startswith("qwen") else name for name in FAMILIES])
def test_greedy_tokens_are_hugging_faces(family: str, tokens: int) -> None:
    model = built(FAMILIES[family])
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    ids, mask = left_padded(prompt())
    for given in ({}, {"attention_mask": mask}):
        expected = model.generate(ids if given else prompt(), max_new_tokens=tokens, **given)
        assert torch.equal(fast.generate(ids if given else prompt(), max_new_tokens=tokens, **given), expected)
    reports = [served.kept_original for served in fast.schedule.served]  # type: ignore[attr-defined]
    assert not any(reason and "beat" not in reason for reason in reports), reports
    assert any("rope_append" in record.name or record.matches for record in fast.schedule.history)  # type: ignore[attr-defined]


def test_the_step_appends_in_place_and_attends_to_the_cache(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair
    fast.generate(prompt(), max_new_tokens=4)
    step = fast.schedule.programs[1].graph_module  # type: ignore[attr-defined]
    names = [str(node.target) for node in step.graph.nodes]
    assert sum("rope_append" in name for name in names) == 2
    assert sum("cached_attention" in name for name in names) == 2
    assert all(slot.in_place for slot in fast.serving._prepared[1].executable.slots if slot.op.donates)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 1},
        {"max_length": 20},
        {"suppress_tokens": list(range(5, 60))},
        {"begin_suppress_tokens": list(range(5, 60))},
        {"forced_eos_token_id": 9},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=7, pad_token_id=0)},
    ],
)
def test_options(pair: tuple[Any, OptimizedModule], options: dict[str, Any]) -> None:
    model, fast = pair
    more = {} if "generation_config" in options or "max_length" in options else {"max_new_tokens": 30}
    assert torch.equal(fast.generate(prompt(), **options, **more), model.generate(prompt(), **options, **more))


def test_rows_end_at_their_eos(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    eos = int(model.generate(prompt(), max_new_tokens=30)[0, 20])
    expected = model.generate(prompt(), max_new_tokens=60, eos_token_id=[eos, 96])
    assert torch.equal(fast.generate(prompt(), max_new_tokens=60, eos_token_id=[eos, 96]), expected)


def test_a_seed_gives_the_same_tokens_again_and_others_give_others(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair
    one, again, other = (fast.generate(prompt(), max_new_tokens=30, do_sample=True, seed=s) for s in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_scores(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    wanted = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    result, expected = (m.generate(prompt(), **wanted) for m in (fast, model))
    assert torch.equal(result.sequences, expected.sequences)
    assert result.scores is None
    for mine, theirs in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_streamer_hears_of_every_token(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair

    class Streamer:
        def __init__(self) -> None:
            self.heard: list[Tensor] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.heard.append(tokens)

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    out = fast.generate(prompt(1), max_new_tokens=6, streamer=streamer)
    assert torch.equal(torch.cat([tokens.flatten() for tokens in streamer.heard]), out[0])
    assert streamer.ended


class Digits:
    """A tokenizer whose text shows the tokens."""

    def decode(self, tokens: Any) -> str:
        return "".join(f"<{int(token)}>" for token in tokens)


def test_stop_strings(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    plain = model.generate(prompt(), max_new_tokens=20)
    stop = f"<{int(plain[0, 16])}><{int(plain[0, 17])}>"
    out = fast.generate(prompt(), max_new_tokens=20, stop_strings=[stop], tokenizer=Digits())
    assert torch.equal(out[0, :18], plain[0, :18])
    assert not out[0, 18:].any()
    assert torch.equal(out[1], plain[1])
    alone = fast.generate(prompt()[:1], max_new_tokens=20, stop_strings=stop, tokenizer=Digits())
    assert torch.equal(alone, plain[:1, :18])
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        fast.generate(prompt(), max_new_tokens=20, stop_strings=[stop])


def test_a_stop_string_in_the_last_token(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    plain = model.generate(prompt(), max_new_tokens=7)
    stop = f"<{int(plain[0, 13])}><{int(plain[0, 14])}>"
    out = fast.generate(prompt(), max_new_tokens=7, stop_strings=stop, tokenizer=Digits())
    assert not out[0, 15:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": -1.0}, "min_p"),
        ({"repetition_penalty": -1.0}, "penalty"),
    ],
)
def test_numbers_out_of_range_are_refused(
    pair: tuple[Any, OptimizedModule], options: dict[str, Any], message: str
) -> None:
    _, fast = pair
    with pytest.raises(ValueError, match=message):
        fast.generate(prompt(), max_new_tokens=3, do_sample=True, seed=1, **options)


def test_scores_are_what_the_token_was_chosen_by(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    wanted = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.5}
    result, expected = (m.generate(prompt(), **wanted) for m in (fast, model))
    for mine, theirs in zip(result.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs)
    one, theirs = (m.generate(prompt(), **wanted, do_sample=True, top_k=5).scores[0] for m in (fast, model))
    torch.testing.assert_close(one, theirs)


def test_pad_tokens_tell_where_the_padding_is(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    ids, _ = left_padded(prompt())
    assert torch.equal(fast.generate(inputs=ids, max_new_tokens=9), model.generate(ids, max_new_tokens=9))


def test_without_a_length_there_are_twenty_tokens(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    longer = prompt(length=25)
    assert torch.equal(fast.generate(longer), model.generate(longer))


def test_what_is_not_built_here_goes_to_hugging_face_and_says_so(pair: tuple[Any, OptimizedModule]) -> None:
    model, fast = pair
    expected = model.generate(prompt(), max_new_tokens=5, num_beams=2)
    with pytest.warns(UserWarning, match="left to Hugging Face, because of num_beams=2"):
        assert torch.equal(fast.generate(prompt(), max_new_tokens=5, num_beams=2), expected)


def test_bad_prompts_are_refused(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair
    right = torch.ones_like(prompt())
    right[0, -2:] = 0
    for ids, given, message in (
        (prompt()[0], {}, "must be \\(batch, length\\)"),
        (prompt(), {"attention_mask": right}, "padded on the left"),
        (prompt(), {"attention_mask": right[:, 1:]}, "must have the same"),
        (prompt(), {"max_length": 12}, "the prompt has 12 tokens already"),
    ):
        with pytest.raises(ValueError, match=message):
            fast.generate(ids, **{"max_new_tokens": None if "max_length" in given else 3} | given)


def test_no_new_token_is_an_error_and_no_cache_is_left_to_hugging_face(pair: tuple[Any, OptimizedModule]) -> None:
    _, fast = pair
    with pytest.raises(ValueError, match="max_new_tokens"):
        fast.generate(prompt(), max_new_tokens=0)
    with pytest.warns(UserWarning, match="use_cache=False"):
        fast.generate(prompt(), max_new_tokens=2, use_cache=False)


def test_weights_that_were_replaced_count_in_the_next_prompt() -> None:
    model = built(llama)
    fast = burnish.optimize(model, cache="off")
    before = fast.generate(prompt(), max_new_tokens=8)
    model.load_state_dict({name: t.flip(0).clone() for name, t in model.state_dict().items()}, assign=True)
    expected = copy.deepcopy(model).generate(prompt(), max_new_tokens=8)
    assert not torch.equal(before, expected)
    assert torch.equal(fast.generate(prompt(), max_new_tokens=8), expected)


def test_what_serves_the_steps_is_chosen_once(
    pair: tuple[Any, OptimizedModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is the model as it was, or nothing could be captured."""
    _, fast = pair
    prepared = []
    monkeypatch.setattr(Session, "_entry_of_step", lambda self: prepared.append(self))
    fast.generate(prompt(3), max_new_tokens=5)
    assert len(prepared) == 1


def test_a_session_serves_one_prompt_after_another(
    pair: tuple[Any, OptimizedModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = pair
    fast.generate(prompt(), max_new_tokens=3)
    monkeypatch.setattr(generation, "Session", lambda *_: pytest.fail("the memory was not used again"))
    longer = prompt(length=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast.generate(longer, max_new_tokens=9), model.generate(longer, max_new_tokens=9))


class TestKVCache:
    def test_a_model_as_it_was_fills_it(self, pair: tuple[Any, OptimizedModule]) -> None:
        model, _ = pair
        ids = prompt(length=9)
        expected, cache = model(ids).logits, KVCache.of(model, 2, 16)
        assert cache.is_empty
        for begin, end in ((0, 4), (4, 8), (8, 9)):
            logits = model(ids[:, begin:end], past_key_values=cache).logits
            cache.advance(end - begin)
            torch.testing.assert_close(logits, expected[:, begin:end])
        assert (cache.filled, int(cache.lengths)) == (9, 9)

    def test_an_optimized_model_fills_it_in_place_and_advances_it(self, pair: tuple[Any, OptimizedModule]) -> None:
        model, fast = pair
        ids = prompt(length=9)
        expected, cache = model(ids).logits, KVCache.of(model, 2, 16)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        for begin, end in ((0, 4), (4, 8), (8, 9)):
            result = fast(input_ids=ids[:, begin:end], past_key_values=cache)
            torch.testing.assert_close(result.logits, expected[:, begin:end])
            assert result.past_key_values is cache
            assert cache.filled == end
        assert [layer.keys.data_ptr() for layer in cache.layers] == places

    def test_no_room_is_an_error_before_anything_runs(self, pair: tuple[Any, OptimizedModule]) -> None:
        model, fast = pair
        cache = KVCache.of(model, 2, 8)
        with pytest.raises(
            ValueError, match="holds 0 of at most 8 tokens: 9 more do not fit; make it with max_length=9"
        ):
            fast(input_ids=prompt(length=9), past_key_values=cache)
        assert not any(layer.keys.any() for layer in cache.layers)

    def test_it_grows(self, pair: tuple[Any, OptimizedModule]) -> None:
        model, fast = pair
        ids, cache = prompt(length=9), KVCache.of(model, 2, 8)
        fast(input_ids=ids[:, :8], past_key_values=cache)
        cache.grow(12)
        logits = fast(input_ids=ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 8:])
        with pytest.raises(ValueError, match="must be above the 12"):
            cache.grow(12)

    def test_sizes_below_one_are_refused(self, pair: tuple[Any, OptimizedModule]) -> None:
        with pytest.raises(ValueError, match="must be at least 1"):
            KVCache.of(pair[0], 0, 8)
