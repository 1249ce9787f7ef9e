"""Perplexity: as Hugging Face's own loss has it, in windows and chunks, and what has none."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish import likelihood
from tests.zoo.hugging_face import llama_like, needs

VOCAB = 11
IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


class Bigram(nn.Module):
    """Logits by the token before, returned in one of several ways."""

    def __init__(self, give: Any = lambda logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.give = nn.Embedding(VOCAB, VOCAB), give
        self.calls: list[torch.Size] = []

    def forward(self, ids: Tensor) -> Any:
        self.calls.append(ids.shape)
        return self.give(self.table(ids))


def by_hand(model: Bigram, ids: Tensor) -> float:
    pairs = torch.stack([ids[:, :-1].flatten(), ids[:, 1:].flatten()])
    return math.exp(-float(F.log_softmax(model.table.weight.detach().float(), dim=-1)[pairs[0], pairs[1]].mean()))


@pytest.mark.parametrize(
    "give",
    [lambda logits: logits, lambda logits: (logits, 1), lambda logits: SimpleNamespace(logits=logits)],
    ids=["tensor", "tuple", "attribute"],
)
def test_the_mean_over_all_tokens_but_each_rows_first(give: Any) -> None:
    model = Bigram(give)
    assert burnish.perplexity(model, IDS) == pytest.approx(by_hand(model, IDS))


def test_windows_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bigram()
    monkeypatch.setattr(likelihood, "_LOGITS_AT_ONCE", 3 * VOCAB)
    parts = [by_hand(model, IDS[:, :4]), by_hand(model, IDS[:, 4:8])]  # of three tokens each; the ninth is alone
    assert burnish.perplexity(model, IDS, window=4) == pytest.approx(math.sqrt(parts[0] * parts[1]))
    assert model.calls == [(2, 4), (2, 4)]


def test_half_precision_is_summed_in_float32() -> None:
    model = Bigram().bfloat16()
    model(IDS)
    expected = by_hand(Bigram(), IDS)
    assert burnish.perplexity(model, IDS) == pytest.approx(expected, rel=0.01)
    assert burnish.perplexity(model, IDS) == pytest.approx(by_hand(model.float(), IDS))


@needs("transformers")[0]
def test_it_is_hugging_faces_loss() -> None:
    model: Any = llama_like(num_hidden_layers=1)
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
    assert burnish.perplexity(model, IDS) == pytest.approx(math.exp(loss))


def test_the_text_is_long_enough_to_tell() -> None:
    assert 150 < len(likelihood.TEXT.split()) < 400
    assert likelihood.TEXT.isascii()


@pytest.mark.parametrize("ids", [IDS[0], IDS[:, :1], IDS[None]])
def test_tokens_that_predict_nothing(ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^input_ids has shape \(.*\); it must be \(batch, length\)"):
        burnish.perplexity(Bigram(), ids)


def test_a_window_of_one() -> None:
    with pytest.raises(ValueError, match=r"^window is 1"):
        burnish.perplexity(Bigram(), IDS, window=1)


@pytest.mark.parametrize(
    ("give", "what"),
    [(lambda logits: logits.mean(1), r"of shape \(2, 11\)"), (lambda logits: {"a": logits}, "a dict")],
)
def test_no_logits(give: Any, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^Bigram gives {what}, no logits \(batch, length, vocabulary\)$"):
        burnish.perplexity(Bigram(give), IDS)
