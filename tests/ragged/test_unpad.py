"""padding="remove": real tokens as with padding, zeros elsewhere, whatever the mask; what cannot be done is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish.numerics import assert_close, oracle, randn

LENGTHS = torch.tensor([9, 1, 4, 7])


def right(lengths: Tensor = LENGTHS, longest: int = 9) -> Tensor:
    return (torch.arange(longest) < lengths[:, None]).long()


MASKS: dict[str, Callable[[], Tensor]] = {
    "right padding": right,
    "left padding": lambda: right().flip(1),
    "gaps": lambda: (randn(4, 9, seed=5) > 0).long().index_fill_(0, torch.tensor([2]), 1),
    "a row without tokens": lambda: right(torch.tensor([5, 0, 9, 0])),
    "full rows": lambda: torch.ones(4, 9, dtype=torch.long),
    "no token at all": lambda: torch.zeros(4, 9, dtype=torch.long),
    "one token": lambda: right(torch.tensor([0, 1, 0, 0])),
    "other sizes": lambda: right(torch.tensor([3, 12]), 12),
    "one row": lambda: right(torch.tensor([6]), 8),
}


class Layer(nn.Module):
    """A plain encoder layer on nn.Linear and SDPA."""

    def __init__(self, width: int = 16, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        allowed = mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q, k, v, allowed)
        x = self.first(x + self.out(y.transpose(1, 2).reshape(b, s, w)))
        return self.second(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(50, 16), nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.change = change

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        x = self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.change is None else self.change(x, mask)


def batch(mask: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1))
    return ids * mask, mask


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Encoder().eval()
    return model, burnish.optimize(copy.deepcopy(model), batch(right()), padding="remove", cache="off")


def real(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[mask.bool()]


@pytest.mark.parametrize("name", MASKS)
def test_real_tokens_are_as_with_padding_and_others_zero(encoder: tuple[Any, Any], name: str) -> None:
    model, fast = encoder
    ids, mask = batch(MASKS[name]())
    with torch.no_grad():
        result, eager = fast(ids, mask), model(ids, mask)
    true = copy.deepcopy(model).double()(ids, mask).detach()
    assert result.shape == eager.shape
    assert_close(real(result, mask), real(eager, mask), real(true, mask))
    if name != "full rows":  # which the padded Program serves
        assert not result[mask == 0].any()


def test_only_real_tokens_are_computed(encoder: tuple[Any, Any]) -> None:
    fast = encoder[1]
    assert fast.serving.served[0].padding == "21 of 36 tokens are real"
    packed = fast.serving._prepared[0].packed
    sizes = [n.meta["val"].shape[:2] for n in packed.prepared.program.graph_module.graph.nodes if "linear" in n.name]
    assert sizes
    assert all(shape[0] == 1 for shape in sizes)
    assert [record.matches for record in fast.schedule.history if record.name == "unpad"] == [
        {"attention without padding": 2}
    ]
    assert "21 of 36 tokens are real" in str(fast.report())


def test_tokens_are_taken_at_once_and_put_back_at_once(encoder: tuple[Any, Any]) -> None:
    packed = encoder[1].serving._prepared[0].packed
    nodes = [n for n in packed.prepared.program.graph_module.graph.nodes if n.op == "call_function"]
    names = [getattr(n.target, "__name__", "") for n in nodes]
    assert (names.count("take"), names.count("put_back")) == (1, 1)
    assert not [name for name in names if name.startswith(("index", "clamp", "remainder"))]


def pooled(x: Tensor, mask: Tensor) -> Tensor:
    weights = mask[:, :, None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "first token": lambda x, mask: (x, torch.tanh(x[:, 0])),
    "mean of real tokens": pooled,
    "flattened": lambda x, mask: x.reshape(-1, x.shape[-1]).relu().view(x.shape),
    "a value for each row": lambda x, mask: x * mask.sum(1)[:, None, None],
    "several outputs": lambda x, mask: {"hidden": x, "scores": x.softmax(-1), "mask": mask},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_follows(name: str) -> None:
    torch.manual_seed(0)
    model = Encoder(CHANGES[name]).eval()
    args = batch(right())
    fast = burnish.optimize(copy.deepcopy(model), args, padding="remove", cache="off")
    assert "padding is kept" not in str(fast.serving.served[0].padding)
    with torch.no_grad():
        result, eager = fast(*args), model(*args)
        true = copy.deepcopy(model).double()(*args)
    for one, other, exact in zip(*map(torch.utils._pytree.tree_leaves, (result, eager, true)), strict=True):
        if one.dim() == 3:
            one, other, exact = (real(t, args[1]) for t in (one, other, exact))
        assert_close(one, other, exact)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "mean over padding": (lambda x, mask: x.mean(1), "mean is along the tokens"),
    "tokens shifted": (lambda x, mask: x + x.roll(1, 1), "roll is not known to keep tokens apart"),
    "tokens summed up": (lambda x, mask: x.cumsum(1), "cumsum is not known to keep tokens apart"),
    "pairs of tokens": (lambda x, mask: x @ x.transpose(1, 2), "tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_tokens_keeps_its_padding_and_says_why(name: str) -> None:
    torch.manual_seed(0)
    change, reason = REFUSED[name]
    model = Encoder(change).eval()
    args = batch(right())
    fast = burnish.optimize(copy.deepcopy(model), args, padding="remove", cache="off")
    said = fast.serving.served[0].padding
    assert said is not None
    assert said.startswith("padding is kept: ")
    assert reason in said
    assert "padding is kept" in str(fast.report())
    with torch.no_grad():
        assert_close(fast(*args), model(*args), copy.deepcopy(model).double()(*args))


def test_a_model_without_a_mask_keeps_its_padding() -> None:
    fast = burnish.optimize(
        nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 3, 4),), padding="remove", cache="off"
    )
    assert "there is no attention" in str(fast.serving.served[0].padding)


def test_gradients() -> None:
    torch.manual_seed(0)
    model = Encoder(pooled).train()
    args = batch(right())
    fast = burnish.optimize(copy.deepcopy(model), padding="remove", cache="off")
    other = copy.deepcopy(model).double()
    for each in (model, fast, other):
        each(*args).square().sum().backward()
    assert fast.serving.served[0].padding == "21 of 36 tokens are real"
    for (name, p), q, exact in zip(model.named_parameters(), fast.parameters(), other.parameters(), strict=True):
        assert p.grad is not None, name
        assert_close(q.grad, p.grad, exact.grad)


def test_weights_that_change_or_move_are_used(encoder: tuple[Any, Any]) -> None:
    model = copy.deepcopy(encoder[0])
    args = batch(right())
    fast = burnish.optimize(model, args, padding="remove", cache="off")

    def check() -> None:
        expected = copy.deepcopy(model)
        assert_close(*(real(hidden, args[1]) for hidden in (fast(*args), expected(*args), expected.double()(*args))))

    with torch.no_grad():
        model.layers[0].up.weight.mul_(2.0)
        check()
        model.layers[1].up.weight = nn.Parameter(model.layers[1].up.weight * 3)
        check()


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="padding='drop': use 'keep' or 'remove'"):
        burnish.optimize(nn.Linear(2, 2), padding="drop")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "roberta"])
def test_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**sizes)),
        "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**sizes)),
        "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=1)),
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=2)
        ),
    }[name]().eval()
    causal = {"use_cache": False} if name in ("gpt2", "llama") else {}
    fast = burnish.optimize(copy.deepcopy(model), padding="remove", cache="off")
    for kind in ("right padding", "left padding", "other sizes"):
        ids, mask = batch(MASKS[kind]())
        kwargs = {"input_ids": ids, "attention_mask": mask, **causal}
        with torch.no_grad():
            result, eager, true = (m(**kwargs)[0] for m in (fast, model, copy.deepcopy(model).double()))
        assert_close(*(real(t, mask) for t in (result, eager, true)))
        assert not result[mask == 0].any()
    assert all("padding is kept" not in str(served.padding) for served in fast.serving.served)


def test_the_same_bits_at_every_call(encoder: tuple[Any, Any]) -> None:
    fast = encoder[1]
    args = batch(MASKS["gaps"]())
    with torch.no_grad():
        assert torch.equal(fast(*args), fast(*args))


def test_half_precision() -> None:
    torch.manual_seed(0)
    model = Encoder().eval().to(torch.bfloat16)
    args = batch(right())
    fast = burnish.optimize(copy.deepcopy(model), args, padding="remove", cache="off")
    with torch.no_grad():
        result, eager = fast(*args), model(*args)
        assert_close(*(real(t, args[1]) for t in (result, eager, oracle(lambda: copy.deepcopy(model).double()(*args)))))
