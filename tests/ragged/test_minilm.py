"""A real sentence encoder on real sentences without their padding: the same embeddings."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish import demo
from burnish.models import MINILM, Wanted, load
from tests.zoo.hugging_face import needs


@pytest.mark.slow
@needs("transformers")[0]
def test_embeddings_of_sentences() -> None:
    loaded = load(MINILM, Wanted(text=demo.SENTENCES, device=torch.device("cpu")))
    original = copy.deepcopy(loaded.model)
    before = demo.embed(original, loaded.kwargs)
    fast = burnish.optimize(loaded.model, (), loaded.kwargs, padding="remove", cache="off")
    after = demo.embed(fast, loaded.kwargs)
    assert fast.serving.served[0].padding == "114 of 144 tokens are real"  # type: ignore[attr-defined]
    assert demo.compare(original, loaded, before, after).ok
    assert demo.nearest(before) != []
    assert [n.index for n in demo.nearest(after)] == [n.index for n in demo.nearest(before)]
