"""Generation on a GPU: captured steps give Hugging Face's tokens, and hold the memory that they began with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import burnish
from burnish.numerics import assert_close, oracle
from burnish.runtime.kv_cache import KVCache
from tests.runtime import encoder_decoders
from tests.runtime.test_generate import FAMILIES, VOCABULARY, built, left_padded, prompt

pytestmark = pytest.mark.gpu


def fast_and_eager(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    model = built(FAMILIES[family]).to("cuda", dtype)
    return burnish.optimize(copy.deepcopy(model), cache="off"), model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_float32_are_hugging_faces(family: str) -> None:
    fast, model = fast_and_eager(family, torch.float32)
    ids, mask = (t.cuda() for t in left_padded(prompt()))
    plain = prompt().cuda()
    assert torch.equal(fast.generate(plain, max_new_tokens=200), model.generate(plain, max_new_tokens=200))
    padded = {"attention_mask": mask, "max_new_tokens": 100}
    assert torch.equal(fast.generate(ids, **padded), model.generate(ids, **padded))
    assert fast.__dict__["_session"][1]._graph is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_in_bfloat16_are_the_largest_within_rounding(family: str) -> None:
    fast, model = fast_and_eager(family, torch.bfloat16)
    out = fast.generate(prompt().cuda(), max_new_tokens=150)
    logits = model.double()(out).logits[:, 11:-1]
    chosen = logits.gather(-1, out[:, 12:, None])[..., 0]
    spread = logits.std()
    assert ((logits.amax(-1) - chosen) < 0.05 * spread).all()


@pytest.mark.parametrize("family", ["t5", "t5 gated", "bart"])
def test_greedy_tokens_of_encoder_decoders_are_hugging_faces(family: str) -> None:
    model = encoder_decoders.built(encoder_decoders.FAMILIES[family]).cuda()
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    graphs = []
    for length in (11, 50):
        source = encoder_decoders.source(length).cuda()
        given = {"attention_mask": encoder_decoders.padding(source), "max_new_tokens": 200}
        assert torch.equal(fast.generate(source, **given), model.generate(source, **given))
        graphs.append(fast.__dict__["_session"][1]._graph)
    assert graphs[0] is graphs[1] is not None


def test_whisper_transcribes_as_hugging_face_does() -> None:
    model = encoder_decoders.built(encoder_decoders.whisper).cuda()
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    suppressed = {"suppress_tokens": [4, 5, 6], "begin_suppress_tokens": list(range(50, 90))}
    for seed in (1, 2):
        given = {"input_features": encoder_decoders.audio(seed=seed).cuda(), "max_new_tokens": 200, **suppressed}
        assert torch.equal(fast.generate(**given), model.generate(**given))
    assert fast.__dict__["_session"][1]._graph is not None


def test_the_last_token_of_a_captured_step_can_be_forced() -> None:
    fast, model = fast_and_eager("llama", torch.float32)
    given = {"max_new_tokens": 40, "forced_eos_token_id": 9, "suppress_tokens": [3, 4]}
    for _ in range(2):
        assert torch.equal(fast.generate(prompt().cuda(), **given), model.generate(prompt().cuda(), **given))


def test_beams_are_hugging_faces() -> None:
    fast, model = fast_and_eager("llama", torch.float32)
    given = {"max_new_tokens": 60, "num_beams": 3}
    for _ in range(2):
        assert torch.equal(fast.generate(prompt().cuda(), **given), model.generate(prompt().cuda(), **given))


def test_rows_end_and_the_host_learns_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    fast, model = fast_and_eager("llama", torch.float32)
    ids = prompt().cuda()
    eos = int(model.generate(ids, max_new_tokens=30)[0, 20])
    expected = model.generate(ids, max_new_tokens=300, eos_token_id=[eos, 96, 95, 94])
    assert torch.equal(fast.generate(ids, max_new_tokens=300, eos_token_id=[eos, 96, 95, 94]), expected)


def test_sampling_draws_from_the_models_distribution() -> None:
    fast, model = fast_and_eager("llama", torch.float32)
    ids = prompt(1).cuda().expand(512, -1).contiguous()
    first = fast.generate(ids, max_new_tokens=2, do_sample=True, top_k=0, temperature=0.05, seed=1)[:, 12]
    expected = (model(ids[:1]).logits[0, -1] / 0.05).softmax(-1) * 512
    found = torch.bincount(first, minlength=VOCABULARY).float()
    enough = expected > 5
    chi2 = ((found - expected)[enough] ** 2 / expected[enough]).sum()
    assert chi2 < 3 * max(int(enough.sum()), 3)


def test_two_thousand_tokens_hold_the_memory() -> None:
    fast, _ = fast_and_eager("llama", torch.bfloat16)
    ids = prompt(1).cuda()
    fast.generate(ids, max_new_tokens=2000)
    before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    fast.generate(ids, max_new_tokens=2000)
    assert (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) <= before


def test_a_cache_elsewhere_is_captured_anew() -> None:
    fast, model = fast_and_eager("llama", torch.float32)
    ids = prompt(length=20).cuda()
    expected = model(ids).logits
    true = oracle(copy.deepcopy(model).double(), input_ids=ids).logits
    caches = [KVCache.of(model, 2, 32) for _ in range(2)]
    for cache in caches:
        fast(input_ids=ids[:, :17], past_key_values=cache)
    for i in range(17, 20):
        for cache in caches:
            logits = fast(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
            assert_close(logits[:, 0], expected[:, i], true[:, i])
