"""What two ranks check together: see `ranks`. In the order in which they run; each name is a test."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional

import burnish
from burnish import measure, numerics
from burnish.checks import Checks
from burnish.parallel import (
    all_gather,
    all_reduce,
    copy_to_region,
    full_state_dict,
    load_sharded,
    missing_syncs,
    own_slice,
    reduce_scatter,
    shard_parameter,
    sync,
    tensor_parallel,
)
from burnish.parallel.shard import shard_of
from burnish.prepare import Preparer
from burnish.tuning import Tuner
from tests.parallel.ranks import RANKS, Check
from tests.zoo.case import hidden, seeded, token_ids
from tests.zoo.hugging_face import gpt2, hugging_face, llama_like

WORLD = "0"  # how torch names the group of all processes
IDS = token_ids(2, 8, 101)

SMALL: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": partial(llama_like, vocab_size=104, num_hidden_layers=1, use_cache=True),
    "llama_tied": partial(llama_like, vocab_size=104, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen3": partial(llama_like, "Qwen3", vocab_size=104),
    "gpt2": lambda: cached(gpt2(n_layer=1, n_positions=64)),
    "gpt2_of_two": gpt2,
    "phi3": partial(hugging_face, "Phi3ForCausalLM", "Phi3Config", "sdpa", pad_token_id=0, **SMALL),
    "gemma2": partial(hugging_face, "Gemma2ForCausalLM", "Gemma2Config", "eager", head_dim=16, **SMALL),
}


def cached(model: Any) -> Any:
    model.config.use_cache = model.generation_config.use_cache = True
    return model


# --- collectives ----------------------------------------------------------------------------------


def collectives_and_their_gradients(rank: int, folder: Path) -> None:
    """Each is compared with what one process does with the tensors of all ranks."""
    mine = [hidden(3, 4, 6, torch.float64, seed=10 + r).requires_grad_() for r in range(RANKS)]
    total = torch.stack([x.detach() for x in mine]).sum(dim=0)
    x, other = mine[rank], mine[1 - rank].detach()
    weights = hidden(3, 4, 12, torch.float64, seed=20)  # one loss of all ranks together
    part = slice(6 * rank, 6 * rank + 6)

    def check(result: Tensor, expected: Tensor, loss: Tensor, gradient: Tensor) -> None:
        assert torch.equal(result, expected)
        (found,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)

    y = all_reduce(x, WORLD)
    check(y, total, (y * weights[..., :6]).sum(), weights[..., :6])
    y = copy_to_region(x, WORLD)
    check(y, x, (y * weights[..., part]).sum(), weights[..., :6] + weights[..., 6:])
    y = all_gather(x, -1, WORLD)
    both = torch.cat([x, other] if rank == 0 else [other, x], dim=-1)
    check(y, both, (y * weights).sum(), weights[..., part])
    y = all_gather(x, 0, WORLD, sum_gradients=True)
    both = torch.cat([x, other] if rank == 0 else [other, x])
    check(y, both, (y * (1 + rank)).sum(), torch.full_like(x, 3))
    rows = slice(2 * rank, 2 * rank + 2)
    y = own_slice(x, 1, WORLD)
    check(y, x[:, rows], (y * (1 + rank)).sum(), torch.ones_like(x) * torch.tensor([1, 1, 2, 2])[:, None])
    y = reduce_scatter(x, 1, WORLD)
    check(y, total[:, rows], (y * (1 + rank)).sum(), torch.ones_like(x) * torch.tensor([1, 1, 2, 2])[:, None])
    for collective in (own_slice, reduce_scatter):
        with pytest.raises(ValueError, match="a size of 3 along axis 0 does not divide among 2 ranks"):
            collective(x, 0, WORLD)


class Unread(nn.Module):
    """Asks twice for the same sum, and for one that it does not read."""

    def __init__(self, sums: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sums = sums
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        self.sums(x * 2)
        return self.norm(self.sums(x) + self.sums(x))


def no_collective_is_left_out(rank: int, folder: Path) -> None:
    """Neither ours nor torch's own, whose second node waits; of torch's, equal ones are merged, on all ranks alike."""
    x = hidden(2, 5, 16, torch.float32, seed=3 + rank)
    theirs = torch.ops._c10d_functional.all_reduce.default
    ours = torch.ops.burnish_parallel.all_reduce.default
    for overload, sums in (
        (ours, lambda x: all_reduce(x, WORLD)),
        (theirs, lambda x: functional.wait_tensor(functional.all_reduce(x, "sum", dist.group.WORLD))),
    ):
        model = seeded(Unread(sums))
        with torch.no_grad():
            fast = burnish.optimize(model, (x,), cache="off")
            assert torch.equal(fast(x), fast(x))
            numerics.assert_close(fast(x), model(x), copy.deepcopy(model).double()(x.double()))
        check_served(fast)
        nodes = [node for node in fast.schedule.program.graph_module.graph.nodes if node.target is overload]
        assert len(nodes) == (3 if overload is ours else 2)
        assert overload is ours or all("wait_tensor" in str(user.target) for node in nodes for user in node.users)


# --- models ---------------------------------------------------------------------------------------


class Whole:
    """A model on one process: its logits, its gradients, and both in float64."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.model = make()
        self.exact = copy.deepcopy(self.model).double()
        for model in (self.model, self.exact):
            model(IDS, labels=IDS).loss.backward()

    def check_logits(self, model: nn.Module, ids: Tensor = IDS) -> None:
        with torch.no_grad():
            numerics.assert_close(*(m(ids).logits for m in (model, self.model, self.exact)))

    def check_gradients(self, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(IDS, labels=IDS).loss.backward()
        eager, exact = (dict(m.named_parameters()) for m in (self.model, self.exact))
        assert model.state_dict().keys() == self.model.state_dict().keys()
        for name, parameter in model.named_parameters():
            shard, gradient = shard_of(parameter), parameter.grad
            assert gradient is not None, name
            whole = gradient if shard is None else shard.joined(gradient)
            verdict = numerics.check(whole, eager[name].grad, exact[name].grad)
            assert verdict.ok, f"{name}: {verdict.reason}"


def divided(name: str, rank: int, folder: Path) -> None:
    """A divided model computes what the whole one does, and tied weights stay tied."""
    whole, model = Whole(MODELS[name]), MODELS[name]()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensor_parallel(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert sum(p.numel() for p in model.parameters()) < 0.75 * sum(p.numel() for p in whole.model.parameters())
    whole.check_logits(model)
    whole.check_gradients(model)
    for key, tensor in full_state_dict(model).items():
        assert torch.equal(tensor, whole.model.state_dict()[key]), key


def optimized(name: str, rank: int, folder: Path) -> None:
    """So it does optimized, at another size, and when it generates."""
    whole, model = Whole(MODELS[name]), MODELS[name]()
    fast = burnish.optimize(tensor_parallel(model), (), {"input_ids": IDS}, cache="off")
    whole.check_logits(fast)
    whole.check_logits(fast, token_ids(1, 6, 101))
    check_served(fast)
    graph = fast.schedule.program.graph_module.graph
    assert not [node for node in graph.nodes if "copy_to_region" in str(node.target)], "of use to gradients alone"
    order = [node.name for node in graph.nodes if "burnish_parallel" in str(node.target)]
    assert order == [n.name for n in fast.schedule.program.captured.graph.nodes if n.name in order]
    source = fast.schedule._prepared[0].executable.source
    assert source.count("all_reduce_in_place(") == 2 * whole.model.config.num_hidden_layers, "behind the rows"

    prompt = IDS[:, :5]
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    expected = whole.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
    assert torch.equal(fast.generate(prompt, do_sample=False, **options), expected)
    heads = getattr(whole.model.config, "num_key_value_heads", whole.model.config.num_attention_heads)
    assert fast._session[1].cache.layers[0].keys.shape[1] == heads // RANKS
    assert_alike(fast.generate(prompt, do_sample=True, **options))
    with pytest.raises(ValueError, match="a model that is divided among ranks is not timed op by op"):
        fast.report((), {"input_ids": IDS})


def gradients_of_optimized(rank: int, folder: Path) -> None:
    """In eval mode, where inference leaves out what gradients need, and in train mode."""
    whole, model = Whole(MODELS["qwen3"]), MODELS["qwen3"]()
    fast = burnish.optimize(tensor_parallel(model), (), {"input_ids": IDS}, cache="off")
    whole.check_gradients(fast)
    fast.train()
    whole.check_gradients(fast)
    check_served(fast)
    inference, in_eval, in_train = fast.schedule.served
    assert "rms_norm" in str(inference.choices)
    assert "rms_norm" in str(in_train.choices)
    assert "rms_norm" not in str(in_eval.choices), "the graph as it was captured"


def check_served(fast: Any) -> None:
    """By the optimized graph, all of it."""
    kept = [served.kept_original for served in fast.schedule.served]
    assert kept == [None] * len(kept), kept


def note_length(seen: list[int], module: nn.Module, args: Any, result: Tensor) -> None:
    seen.append(result.shape[1])


def sequences_divided(rank: int, folder: Path) -> None:
    for name in ("qwen3", "gpt2_of_two"):
        whole, model = Whole(MODELS[name]), MODELS[name]()
        seen: list[int] = []
        tensor_parallel(model, sequence_parallel=True)
        path = "transformer.h.1.ln_1" if name == "gpt2_of_two" else "model.layers.1.input_layernorm"
        hook = partial(note_length, seen)
        handle = model.get_submodule(path).register_forward_hook(hook)
        whole.check_logits(model)
        assert set(seen) == {IDS.shape[1] // RANKS}
        whole.check_gradients(model)
    with torch.no_grad(), pytest.raises(ValueError, match="a size of 7 along axis 1 does not divide among 2 ranks"):
        model(IDS[:, :7])
    handle.remove()
    whole.check_logits(burnish.optimize(model, (), {"input_ids": IDS}, cache="off"))


def bert_by_the_names_of_its_layers(rank: int, folder: Path) -> None:
    config = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    make = partial(hugging_face, "BertForMaskedLM", "BertConfig", "sdpa", **config)
    whole, model = Whole(make), make()
    tensor_parallel(model)
    assert type(model.bert.encoder.layer[0].output.dense).__name__ == "RowParallelLinear"
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    whole.check_logits(model)
    whole.check_gradients(model)


# --- by hand --------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    seeded(layers)
    return layers


def divided_by_hand(rank: int, folder: Path) -> None:
    """Columns, then rows; the bias behind the sum is added once, and what is left out is named."""
    whole, model, x = mlp(), mlp(), hidden(2, 4, 16, torch.float32)
    exact = copy.deepcopy(whole).double()
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        shard_parameter(model, name, axis)
    assert str(model[2]) == "Linear(in_features=16, out_features=16, bias=True)"
    with torch.no_grad():
        assert not numerics.check(model(x), whole(x), exact(x.double())).ok
    assert [line.partition(":")[0] for line in missing_syncs(model)] == ["0", "2"]
    assert [line.partition(":")[0] for line in missing_syncs(model, training=False)] == ["2"]
    sync(model[0], "bwd_post", "all_reduce")
    sync(model[2], "fwd_post", "all_reduce")
    assert not list(missing_syncs(model))
    with pytest.raises(ValueError, match="all_reduce at fwd_post is there already"):
        sync(model[2], "fwd_post", "all_reduce")
    inputs = [x.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float32, torch.float64)]
    results = [m(i) for m, i in zip((model, whole, exact), inputs, strict=True)]
    numerics.assert_close(*(result.detach() for result in results))
    for result in results:
        result.square().sum().backward()
    numerics.assert_close(*(i.grad for i in inputs))
    numerics.assert_close(*(m[2].bias.grad for m in (model, whole, exact)))
    with torch.no_grad():
        numerics.assert_close(burnish.optimize(model, (x,), cache="off")(x), whole(x), exact(x.double()))


def heads(queries: int, keys: int) -> Callable[[], Any]:
    return partial(llama_like, vocab_size=104, num_attention_heads=queries, num_key_value_heads=keys)


def what_does_not_fit_is_refused(rank: int, folder: Path) -> None:
    """With names and numbers, and the model stays as it was."""
    refused: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
        (llama_like, {}, "model.embed_tokens.weight: its size of 101 along axis 0 does not divide among 2 ranks"),
        (MODELS["llama"], {"plan": {"model.layers.*.mlp.act_fn": "colwise"}}, "act_fn is to be 'colwise', for which"),
        (MODELS["llama"], {"plan": {"lm_head": "diagonal"}}, "lm_head is to be 'diagonal'; there are: colwise, "),
        (MODELS["llama"], {"plan": {"head": "colwise"}}, "no module has the name 'head'"),
        (heads(1, 1), {}, "model.layers.0.self_attn: 1 heads do not divide among 2 ranks"),
        (heads(4, 1), {}, "model.layers.0.self_attn: 1 key heads do not divide among 2 ranks"),
        (
            partial(gpt2, add_cross_attention=True),
            {},
            "crossattention: what is merged there is not 4 heads",
        ),
        (lambda: tensor_parallel(MODELS["gpt2"]()), {}, "model: it is divided already"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "plan: Sequential has none, and none of its layers"),
    ]
    for make, options, message in refused:
        model = make()
        before = [(name, id(p), p.shape) for name, p in model.named_parameters()]
        with pytest.raises(ValueError) as error:
            tensor_parallel(model, **options)
        assert message in str(error.value), error.value
        assert [(name, id(p), p.shape) for name, p in model.named_parameters()] == before
    layers = mlp()
    for arguments, message in (
        (("0.weigth", 0), "0.weigth: Sequential has no parameter of that name"),
        (("0.weight", 2), "0.weight: axis=2 is none of its 2"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_parameter(layers, *arguments)
    with pytest.raises(ValueError, match=r"2\.bias: its size of 3 along axis 0 does not divide among 2 ranks"):
        shard_parameter(nn.Sequential(layers[0], layers[1], nn.Linear(2, 3)), "2.bias", 0)
    with pytest.raises(ValueError, match="there is no 'all_reduce' at 'fwd_pre'; there are: fwd_pre all_gather"):
        sync(layers[0], "fwd_pre", "all_reduce")


# --- weights from files ---------------------------------------------------------------------------


@contextmanager
def read_bytes(read: list[int]) -> Iterator[None]:
    """Notes the size of everything that is read from safetensors within the `with`."""
    import safetensors

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.get_shape, self._inner = inner.get_shape, inner

        def __getitem__(self, where: Any) -> Tensor:
            tensor: Tensor = self._inner[where]
            read.append(tensor.nbytes)
            return tensor

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._inner = original(*args, **kwargs)

        def __enter__(self) -> Any:
            self._inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._inner.__exit__(*error)

        def keys(self) -> Any:
            return self._inner.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self._inner.get_slice(name))

    original = safetensors.safe_open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "safe_open", File)
        yield


def loaded_slice_by_slice(rank: int, folder: Path) -> None:
    for name in ("llama_tied", "qwen3", "gpt2"):
        whole = Whole(MODELS[name])
        place = folder / name
        if rank == 0:
            whole.model.save_pretrained(place, max_shard_size="60KB")
        dist.barrier()
        assert len(list(place.glob("*.safetensors"))) > 1
        with torch.device("meta"):
            model = type(whole.model)(whole.model.config).eval()
        read: list[int] = []
        with read_bytes(read):
            load_sharded(model, place)
        assert sum(read) == sum(p.nbytes for p in model.parameters())
        assert sum(read) < 0.75 * sum(p.nbytes for p in whole.model.parameters())
        whole.check_logits(model)
        whole.check_gradients(model)
    with torch.device("meta"):
        model = type(whole.model)(whole.model.config)
    with pytest.raises(ValueError, match=r"files: transformer\.h\.0\.attn\.c_attn\.weight is in none of them"):
        load_sharded(model, [path for path in place.glob("*.safetensors") if _lacks(path, "h.0.attn.c_attn.weight")])
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_sharded(model, folder / "nowhere")


def _lacks(path: Path, ending: str) -> bool:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return not any(name.endswith(ending) for name in file.keys())  # noqa: SIM118


# --- decisions ------------------------------------------------------------------------------------


def assert_alike(tensor: Tensor) -> None:
    """The same on all ranks."""
    found = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(found, tensor)
    assert all(torch.equal(tensor, other) for other in found)


def clocks_that_differ(rank: int, folder: Path) -> None:
    """A rank to whom everything takes another time, at random, chooses what the first chooses, and runs as often."""
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache{rank}")
    timed = measure._timed

    def random_us(function: Callable[..., Any], args: Any) -> float:
        timed(function, args)
        return float(torch.randint(1, 60_000, ()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_timed", random_us)
        fast = burnish.optimize(tensor_parallel(MODELS["llama"]()), (), {"input_ids": IDS})
        with torch.no_grad():
            fast(token_ids(4, 16, 101))
    tensors = [p.stride() for p in fast.parameters()]
    said = [str([(s.choices, s.kept_original) for s in fast.schedule.served]), str(tensors)]
    digest = torch.tensor([sum(map(ord, text)) for text in said])
    assert_alike(digest)
    Whole(MODELS["llama"]).check_logits(fast)


def a_check_that_fails_on_one_rank(rank: int, folder: Path) -> None:
    """Fails on both: an Impl's values, and then the outputs as a whole."""
    from burnish import checks

    verify = checks.verify
    wrong = numerics.Verdict(False, 1.0, 0.0, 0.0, "it is wrong here")
    verified: list[int] = []

    def first_unit_is_wrong(*args: Any) -> Any:
        found = verify(*args)
        verified.append(len(found.units))
        if rank == 1 and len(verified) == 1:
            found.units[0].verdict = wrong
        return found

    model = tensor_parallel(MODELS["llama"]())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "verify", first_unit_is_wrong)
        fast = burnish.optimize(model, (), {"input_ids": IDS}, cache="off")
    assert len(verified) == 2, "once more after the repair, on both ranks"
    reasons = [prepared.rejected for prepared in fast.schedule._prepared]
    where = "it is wrong here" if rank == 1 else "it is wrong on another rank"
    assert [list(rejected.values()) for rejected in reasons] == [[where]]
    Whole(MODELS["llama"]).check_logits(fast)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(checks, "check_outputs", lambda *outputs: wrong)
        fast = burnish.optimize(model, (), {"input_ids": IDS}, cache="off")
    (served,) = fast.schedule.served
    assert where in str(served.kept_original)
    Whole(MODELS["llama"]).check_logits(fast, token_ids(3, 5, 101))


def without_clocks(check: Check, rank: int, folder: Path) -> None:
    """As the fixture `untimed` has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "FIRST_BUDGET_US", 0.0)
        patch.setattr(Tuner, "NEW_SIZE_BUDGET_US", 0.0)
        patch.setattr(Checks, "times", lambda self, *given: {"original": 2.0, "optimized": 1.0})
        patch.setattr(Preparer, "_measure_transposed", lambda self, weight: True)
        check(rank, folder)


CHECKS: dict[str, Check] = {
    name: partial(without_clocks, check)
    for name, check in {
        "collectives_and_their_gradients": collectives_and_their_gradients,
        "no_collective_is_left_out": no_collective_is_left_out,
        "divided_llama": partial(divided, "llama"),
        "divided_llama_tied": partial(divided, "llama_tied"),
        "divided_gpt2": partial(divided, "gpt2"),
        "divided_by_hand": divided_by_hand,
        "what_does_not_fit_is_refused": what_does_not_fit_is_refused,
        "loaded_slice_by_slice": loaded_slice_by_slice,
        "optimized_llama": partial(optimized, "llama"),
        "optimized_gpt2": partial(optimized, "gpt2"),
    }.items()
}
SLOW_CHECKS: dict[str, Check] = {
    "clocks_that_differ": clocks_that_differ,
    **{
        name: partial(without_clocks, check)
        for name, check in {
            "gradients_of_optimized": gradients_of_optimized,
            "sequences_divided": sequences_divided,
            "divided_phi3": partial(divided, "phi3"),
            "divided_gemma2": partial(divided, "gemma2"),
            "bert_by_the_names_of_its_layers": bert_by_the_names_of_its_layers,
            "a_check_that_fails_on_one_rank": a_check_that_fails_on_one_rank,
        }.items()
    },
}
