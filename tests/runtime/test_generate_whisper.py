"""Whisper: what Hugging Face transcribes, of one segment without timestamps."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import burnish
from burnish.runtime.module import OptimizedModule
from tests.runtime.encoder_decoders import FRAMES, audio, built, whisper

LANGUAGES = {"lang_to_id": {"<|en|>": 90, "<|de|>": 91}, "task_to_id": {"transcribe": 92, "translate": 93}}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, OptimizedModule]:
    model = built(whisper)
    return model, burnish.optimize(copy.deepcopy(model), cache="off")


@pytest.fixture(scope="module")
def multilingual() -> tuple[Any, OptimizedModule]:
    model = built(whisper)
    own = {"is_multilingual": True, "no_timestamps_token_id": 94, "suppress_tokens": [*range(3, 20), 95, 96]}
    for name, value in (LANGUAGES | own).items():
        setattr(model.generation_config, name, value)
    return model, burnish.optimize(copy.deepcopy(model), cache="off")


def same(pair: tuple[Any, OptimizedModule], **kwargs: Any) -> Tensor:
    model, fast = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out: Tensor = fast.generate(**kwargs)
    assert torch.equal(out, model.generate(**kwargs))
    return out


def test_greedy_tokens_are_hugging_faces(pair: tuple[Any, OptimizedModule]) -> None:
    out = same(pair, input_features=audio(), max_new_tokens=200)
    assert len(out.unique()) > 5, "the test must tell tokens apart"
    assert not torch.equal(out, same(pair, input_features=audio(seed=2), max_new_tokens=200))
    step = pair[1].schedule.programs[1].graph_module.graph  # type: ignore[attr-defined]
    count = {
        name: sum(f"{name}." in str(node.target) for node in step.nodes)
        for name in ("burnish.cached_attention", "burnish.attention", "encoder.layers", "aten.mul")
    }
    assert count == {"burnish.cached_attention": 2, "burnish.attention": 2, "encoder.layers": 0, "aten.mul": 0}


def test_rows_that_end(pair: tuple[Any, OptimizedModule]) -> None:
    eos = int(same(pair, input_features=audio(), max_new_tokens=40)[0, 13])
    assert same(pair, input_features=audio(), max_new_tokens=40, eos_token_id=eos).shape[1] < 41
    same(pair, input_features=audio(), max_new_tokens=40, eos_token_id=eos, pad_token_id=eos)


@pytest.mark.parametrize(
    "options",
    [
        {"language": "en"},
        {"language": ["de", "en"], "task": "translate"},
        {},
        {"decoder_input_ids": torch.tensor([[0, 91, 92, 94], [0, 90, 92, 94]])},
        {"language": "de", "begin_suppress_tokens": list(range(20, 60))},
        {"language": "de", "temperature": 0.0, "max_new_tokens": None},
        {"language": "de", "temperature": 0.7, "top_k": 1},
        {"language": "de", "do_sample": True},
        {"language": "de", "attention_mask": torch.ones(2, FRAMES)},
    ],
    ids=lambda options: ", ".join(options) or "language detected",
)
def test_options(multilingual: tuple[Any, OptimizedModule], options: dict[str, Any]) -> None:
    same(multilingual, input_features=audio(), **{"max_new_tokens": 20} | options)


def test_short_audio_is_padded(pair: tuple[Any, OptimizedModule]) -> None:
    same(pair, input_features=audio(frames=FRAMES - 10), max_new_tokens=20)


def test_return_dict(multilingual: tuple[Any, OptimizedModule]) -> None:
    model, fast = multilingual
    wanted = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, "language": "en"}
    result, expected = (m.generate(input_features=audio(), **wanted) for m in (fast, model))
    assert type(result) is type(expected)
    assert torch.equal(result.sequences, expected.sequences)
    for mine, theirs in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"return_timestamps": True}, "return_timestamps=True"),
        ({"prompt_ids": torch.tensor([5, 6, 7])}, "prompt_ids"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"temperature": (0.0, 0.4), "logprob_threshold": -9.0}, "logprob_threshold=-9.0, more than one temperature"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_the_rest_goes_to_hugging_face(
    multilingual: tuple[Any, OptimizedModule], options: dict[str, Any], reason: str
) -> None:
    model, fast = multilingual
    options = options | {"language": "en", "max_new_tokens": 20, "input_features": audio()}
    torch.manual_seed(0)
    expected = model.generate(**options)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"left to Hugging Face, because of .*{reason}"):
        assert torch.equal(fast.generate(**options), expected)


def test_long_audio_goes_to_hugging_face(multilingual: tuple[Any, OptimizedModule]) -> None:
    model, fast = multilingual
    options = {"language": "en", "return_timestamps": True, "max_new_tokens": 20}
    features = audio(1, frames=2 * FRAMES)
    with pytest.warns(UserWarning, match="audio of 80 frames, more than a segment's 40"):
        assert torch.equal(fast.generate(input_features=features, **options), model.generate(features, **options))


def test_timestamps_among_the_tokens_are_hugging_faces_business(multilingual: tuple[Any, OptimizedModule]) -> None:
    model, fast = multilingual
    config = copy.deepcopy(model.generation_config)
    config.no_timestamps_token_id, config.suppress_tokens, config.max_new_tokens = 60, list(range(96)), 20
    with pytest.warns(UserWarning, match="timestamps among the tokens"):
        out = fast.generate(input_features=audio(), generation_config=config)
    assert torch.equal(out, model.generate(audio(), generation_config=config))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "input_features: it is needed"),
        ({"input_features": audio()[0]}, "input_features has shape \\(8, 40\\); it must be \\(batch, 8, frames\\)"),
        ({"input_features": audio(), "decoder_input_ids": torch.zeros(1, 2)}, "decoder_input_ids has shape \\(1, 2\\)"),
        ({"input_features": audio(), "max_new_tokens": 300}, "max_target_positions"),
    ],
)
def test_bad_input_is_refused(pair: tuple[Any, OptimizedModule], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair[1].generate(**given)
