"""Where the real tokens of a padded batch are, with and without the dummies that round their number up."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import burnish
from burnish import candidates
from burnish.capture import capture
from burnish.numerics import assert_close
from burnish.ragged import entry, live
from burnish.ragged import tokens as ragged
from burnish.ragged.tokens import INPUTS, tokens_of
from burnish.ragged.unpad import unpad
from burnish.rewrites import RAISE, apply, fuse
from burnish.runtime.cuda_graph import GraphPool
from tests.ragged.test_unpad import MASKS, Encoder, batch, real


def test_places_and_offsets() -> None:
    tokens = tokens_of(torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]]), ask_contiguous=True)
    assert tokens.places.tolist() == [1, 2, 6, 8]
    assert tokens.columns.tolist() == [1, 2, 0, 2]
    assert tokens.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert tokens.cu_seqlens.dtype == torch.int32
    assert (tokens.real, tokens.contiguous) == (4, False)
    assert tokens_of(torch.tensor([[0, 1, 1], [1, 1, 0]]), ask_contiguous=True).contiguous
    assert tokens_of(torch.ones(2, 3)).contiguous is None


@pytest.mark.parametrize("step", [4, 16, 100])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 20])
def test_dummies(count: int, step: int) -> None:
    mask = torch.zeros(20, dtype=torch.bool).index_fill_(0, torch.arange(count), True).view(4, 5)
    tokens = tokens_of(mask, step=step)
    assert tokens.places.shape[0] == max(step, -(-count // step) * step)
    assert tokens.places[:count].tolist() == list(range(count))
    assert (tokens.places[count:] == 20).all()
    assert tokens.nearest.tolist() == [*range(count), *[19] * (tokens.places.shape[0] - count)]
    lengths = tokens.cu_seqlens.diff()
    assert lengths.shape[0] == 4 + -(-step // 5)  # whatever the mask: a captured graph counts on it
    assert int(lengths.sum()) == tokens.places.shape[0]
    assert int(lengths.max()) <= 5
    assert int(lengths.min()) >= 0


@pytest.mark.parametrize("name", ["right padding", "gaps", "full rows", "no token at all"])
def test_dummies_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    program = capture(model, batch(MASKS["right padding"]()))
    apply("raise", RAISE, program.graph_module)
    unpadded = unpad(program.graph_module)
    assert unpadded.mask is not None
    ids, mask = batch(MASKS[name]())
    with torch.no_grad():
        tokens = tokens_of(unpadded.mask([ids, mask]), step=16)
        result: Tensor = unpadded.graph_module(ids, mask, *tokens[: len(INPUTS)])[0]
        eager, true = model(ids, mask), copy.deepcopy(model).double()(ids, mask)
    assert not result[mask == 0].any()
    if mask.any():
        assert_close(*(real(t, mask) for t in (result, eager, true)))


def as_on_cuda(monkeypatch: Any) -> list[Any]:
    """As on CUDA, but for the graphs: every mask's tokens in the same memory, put back by a kernel. Returns where it is
    noted that such memory is used."""
    pytest.importorskip("triton")
    seen: list[Any] = []
    for module in (entry, ragged):
        monkeypatch.setattr(module, "has_kernel", lambda x: not isinstance(x, FakeTensor))
    monkeypatch.setattr(ragged, "triton_why_not", lambda x: [])
    monkeypatch.setattr(live, "WORTH_IT", (torch.float32,))
    monkeypatch.setattr(GraphPool, "enter", lambda self, device: seen.append(device))
    return seen


def poisoned(function: Callable[..., Any], *args: Any, live_rows: Tensor) -> Any:
    """What an Impl that spares rows may leave there."""
    results = function(*args)
    for result in results if isinstance(results, tuple) else (results,):
        result.view(-1, result.shape[-1] if result.numel() else 1)[int(live_rows) :] = float("nan")
    return results


@pytest.fixture
def attention_that_leaves_tokens_over() -> Iterator[None]:
    with burnish.use(varlen_attention="reference"):  # the CPU's others take no tokens after the last sequence
        yield


@pytest.mark.usefixtures("attention_that_leaves_tokens_over")
def test_a_model_on_tokens_of_all_places(monkeypatch: Any) -> None:
    """One entry serves all masks of a shape, told how many tokens are real: nothing depends on the others."""
    torch.manual_seed(0)
    model = Encoder(lambda x, mask: (x, torch.tanh(x[:, 0]))).eval()
    seen = as_on_cuda(monkeypatch)
    monkeypatch.setattr(live, "on_cuda", lambda node: True)
    monkeypatch.setattr(candidates, "_all_rows", poisoned)
    fast: Any = burnish.optimize(
        copy.deepcopy(model),
        batch(MASKS["right padding"]()),
        padding="remove",
        cache="off",
        impls={"varlen_attention": "reference"},
    )
    serving = fast.serving
    assert serving.served[0].padding == "21 of 36 tokens are real"
    packed = serving._prepared[0].packed
    assert packed.of_all_places
    assert packed.prepared.executable.source.count("live_rows") == len(
        [slot for slot in packed.prepared.executable.slots if not slot.op.name.startswith("varlen")]
    )
    names = ("gaps", "a row without tokens", "one token", "no token at all", "full rows", "other sizes", "left padding")
    for name in names:
        ids, mask = batch(MASKS[name]())
        before = len(seen)
        with torch.no_grad():
            result, eager, true = fast(ids, mask), model(ids, mask), copy.deepcopy(model).double()(ids, mask)
        assert len(seen) > before
        if mask.any():
            assert_close(*(real(t[0], mask) for t in (result, eager, true)))
        assert not result[0][mask == 0].any()
        first = mask[:, 0] != 0
        if first.any():
            assert_close(*(t[1][first] for t in (result, eager, true)))
    entries = [e for e in fast._entries.values() if isinstance(e, entry.PackedEntry)]
    assert sorted(len(e._all_places) for e in entries) == [1, 1], "one for each shape of masks"
    fast(*batch(MASKS["gaps"]()))[0].sum().backward()  # gradients are of as many as there are


class OfIds(torch.nn.Module):
    """Its mask is computed of the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, ids: Tensor) -> Any:
        return self.encoder(ids, (ids != 0).long())


@pytest.mark.usefixtures("attention_that_leaves_tokens_over")
def test_a_mask_that_is_computed_is_computed_in_every_call(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = OfIds().eval()
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(live, "on_cuda", lambda node: True)
    monkeypatch.setattr(candidates, "_all_rows", poisoned)
    ids, _ = batch(MASKS["right padding"]())
    impls = {"varlen_attention": "reference"}
    fast: Any = burnish.optimize(copy.deepcopy(model), (ids,), padding="remove", cache="off", impls=impls)
    assert fast.serving._prepared[0].packed.of_all_places
    for name in ("gaps", "right padding", "one token"):
        ids, mask = batch(MASKS[name]())
        with torch.no_grad():
            result, eager, true = fast(ids), model(ids), copy.deepcopy(model).double()(ids)
        assert_close(*(real(t, mask) for t in (result, eager, true)))
        assert not result[mask == 0].any()


@pytest.mark.usefixtures("attention_that_leaves_tokens_over")
def test_all_of_bert_but_its_pooler_is_told(monkeypatch: Any) -> None:
    transformers = pytest.importorskip("transformers")
    as_on_cuda(monkeypatch)
    for module in (fuse, live):
        monkeypatch.setattr(module, "on_cuda", lambda node: True)
    monkeypatch.setattr(candidates, "_all_rows", poisoned)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=60)).eval()
    ids, mask = batch(MASKS["right padding"]())
    args: Any = {"input_ids": ids, "attention_mask": mask}
    impls = {"varlen_attention": "reference"}
    fast: Any = burnish.optimize(copy.deepcopy(model), (), args, padding="remove", cache="off", impls=impls)
    slots = fast.serving._prepared[0].packed.prepared.executable.slots
    told = Counter(slot.op.name for slot in slots if slot.is_told)
    assert told == {"embedding_layer_norm": 1, "linear": 4, "linear_add_layer_norm": 4}
    assert [slot.op.name for slot in slots if not slot.is_told] == ["varlen_attention", "varlen_attention", "linear"]
    with torch.no_grad():
        results = [m(**args) for m in (fast, model, copy.deepcopy(model).double())]
    assert_close(*(real(result.last_hidden_state, mask) for result in results))
    assert_close(*(result.pooler_output for result in results))


def test_what_is_looked_up_by_tokens_has_to_be_of_real_ones(monkeypatch: Any) -> None:
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(live, "on_cuda", lambda node: True)
    table = torch.arange(16.0)
    model = Encoder(lambda x, mask: x + table[x.argmax(-1)].unsqueeze(-1)).eval()
    args = batch(MASKS["right padding"]())
    fast: Any = burnish.optimize(copy.deepcopy(model), args, padding="remove", cache="off")
    assert "padding is kept" not in fast.serving.served[0].padding
    assert not fast.serving._prepared[0].packed.of_all_places


@pytest.mark.parametrize("reason", ["no Impl takes it", "an Impl was asked for", "float32 is no better"])
def test_where_a_product_is_not_told_the_host_counts(reason: str, monkeypatch: Any) -> None:
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(live, "on_cuda", lambda node: True)
    impls = {}
    if reason == "no Impl takes it":
        kept = {name: impl for name, impl in burnish.ops.linear.impls.items() if not impl.live_rows}
        monkeypatch.setattr(burnish.ops.linear, "impls", kept)
    elif reason == "an Impl was asked for":
        impls = {"linear": "torch"}
    else:
        monkeypatch.setattr(live, "WORTH_IT", (torch.float16,))
    torch.manual_seed(0)
    model = Encoder().eval()
    ids, mask = batch(MASKS["right padding"]())
    fast: Any = burnish.optimize(copy.deepcopy(model), (ids, mask), padding="remove", cache="off", impls=impls)
    assert not fast.serving._prepared[0].packed.of_all_places
    with torch.no_grad():
        result, eager, true = fast(ids, mask), model(ids, mask), copy.deepcopy(model).double()(ids, mask)
    assert_close(*(real(t, mask) for t in (result, eager, true)))


def test_a_model_on_tokens_found_by_the_kernel(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model, seen = Encoder().eval(), as_on_cuda(monkeypatch)
    fast = burnish.optimize(copy.deepcopy(model), batch(MASKS["right padding"]()), padding="remove", cache="off")
    assert fast.serving.served[0].padding == "21 of 36 tokens are real"  # type: ignore[attr-defined]
    for name in ("gaps", "a row without tokens", "one token", "no token at all", "other sizes", "right padding"):
        ids, mask = batch(MASKS[name]())
        before = len(seen)
        with torch.no_grad():
            result, eager, true = fast(ids, mask), model(ids, mask), copy.deepcopy(model).double()(ids, mask)
        assert len(seen) > before
        if mask.any():
            assert_close(*(real(t, mask) for t in (result, eager, true)))
        assert not result[mask == 0].any()
    before = len(seen)
    args = batch(MASKS["right padding"]())
    fast(*args).sum().backward()  # gradients read tokens of their own
    assert len(seen) == before
    ids, mask = batch(MASKS["right padding"]().repeat(10, 1))  # of which a part is verified
    fast = burnish.optimize(copy.deepcopy(model), (ids, mask), padding="remove", cache="off")
    assert fast.serving.served[0].padding == "210 of 360 tokens are real"  # type: ignore[attr-defined]
    with torch.no_grad():
        result, eager, true = fast(ids, mask), model(ids, mask), copy.deepcopy(model).double()(ids, mask)
    assert_close(*(real(t, mask) for t in (result, eager, true)))
