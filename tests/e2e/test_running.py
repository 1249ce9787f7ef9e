"""One optimized model in real use: new sizes, moved weights, threads, bad input, train and eval, saving, compilers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import burnish
from burnish import checks, places
from burnish.inductor import backend
from burnish.numerics import assert_close
from burnish.prepare import Preparer
from burnish.runtime.module import OptimizedModule
from tests import zoo
from tests.e2e.float64 import gradients, gradients_in_float64, loss, outputs_in_float64
from tests.zoo import plain
from tests.zoo.case import hidden, token_ids
from tests.zoo.hugging_face import llama_like

pytestmark = pytest.mark.usefixtures("untimed")

WIDTH, HEADS = 64, 4


class Block(nn.Module):
    """A pre-norm layer with everything that is packed: q, k, v of their own, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = plain.SlapoSelfAttention(WIDTH, HEADS)
        self.mlp = plain.GatedMLP(WIDTH, 96, "silu", bias=True)

    def forward(self, x: Tensor, scale: Tensor | None = None, double: bool = False) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        x = x if scale is None else x * scale
        return 2 * x if double else x


def block() -> nn.Module:
    return zoo.without_dropout(zoo.seeded(Block()))


def x_of(batch: int = 2, seq: int = 16, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return hidden(batch, seq, WIDTH, dtype, seed)


def assert_right(fast: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`fast` computes what `model` does, by the rule of `burnish.numerics`; returns its result."""
    with torch.no_grad():
        result, eager = fast(*args, **kwargs), model(*args, **kwargs)
    assert type(result) is type(eager)
    assert_close(pytree.tree_leaves(result), pytree.tree_leaves(eager), outputs_in_float64(model, args, kwargs))
    return result


def captures(fast: OptimizedModule) -> int:
    return len(fast.schedule.programs)


@pytest.fixture
def model() -> nn.Module:
    return block()


@pytest.fixture
def fast(model: nn.Module) -> OptimizedModule:
    optimized = burnish.optimize(model, (x_of(),), cache="off")
    assert optimized.schedule.served[0].kept_original is None
    return optimized


# --- E1: sizes ---


@pytest.mark.parametrize("name", ["bert-sdpa-mask", "llama-sdpa-mask"])
def test_other_sizes_need_no_other_capture_and_earlier_outputs_stay(name: str) -> None:
    case = zoo.CASES[name]
    model = case.build()
    fast = burnish.optimize(model, cache="off")
    seen = []
    for batch, seq in ((1, 64), (8, 256), (16, 256), (16, 64), (1, 64)):
        result = assert_right(fast, model, **case.inputs(batch, seq, torch.float32))
        seen.append((result[0], result[0].clone()))
    assert all(torch.equal(result, then) for result, then in seen)
    assert len({result.untyped_storage().data_ptr() for result, _ in seen}) == len(seen)
    assert torch.equal(seen[0][0], seen[-1][0])
    assert captures(fast) == 1
    assert len(fast.schedule.served) == 4


def test_sizes_that_an_input_may_not_have_are_captured_apart() -> None:
    """A size that the model fixes is part of what was captured."""
    model = zoo.seeded(nn.Sequential(nn.Flatten(1, 2), nn.Linear(4 * WIDTH, WIDTH), nn.GELU()))
    fast = burnish.optimize(model, cache="off")
    assert_right(fast, model, x_of(2, 4))
    assert_right(fast, model, x_of(7, 4))
    assert captures(fast) == 1
    with pytest.raises(RuntimeError):
        fast(x_of(2, 5))
    assert_right(fast, model, x_of(2, 4))


def test_inputs_of_any_strides(model: nn.Module, fast: OptimizedModule) -> None:
    transposed = x_of(16, 2).transpose(0, 1)
    expanded = x_of(1, 16).expand(3, 16, WIDTH)
    sliced = x_of(2, 32)[:, ::2]
    wide = torch.cat([x_of(), x_of()], -1)[..., WIDTH:]
    for x in (transposed, expanded, sliced, wide):
        assert not x.is_contiguous()
        assert_right(fast, model, x)
    assert captures(fast) == 1


def test_outputs_are_the_callers_own(model: nn.Module, fast: OptimizedModule) -> None:
    """Writing into a result changes neither the next result nor a weight."""
    x = x_of()
    with torch.no_grad():
        first = fast(x)
        kept = first.clone()
        first.fill_(float("nan"))
        assert torch.equal(fast(x), kept)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in fast.state_dict().items())


# --- E2: weights ---


def changed(model: nn.Module, factor: float) -> dict[str, Tensor]:
    return {name: factor * tensor for name, tensor in model.state_dict().items()}


def by_optimizer(model: nn.Module, fast: nn.Module) -> None:
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
    fast(x_of()).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def by_load_state_dict(model: nn.Module, fast: nn.Module) -> None:
    model.load_state_dict(changed(model, 1.25))


def by_load_state_dict_of_the_optimized(model: nn.Module, fast: nn.Module) -> None:
    fast.load_state_dict(changed(model, 1.25))


def by_copy(model: nn.Module, fast: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1.25 * parameter)


def by_data_copy(model: nn.Module, fast: nn.Module) -> None:
    for parameter in fast.parameters():
        parameter.data.copy_(1.25 * parameter.data)


def by_assigning_data(model: nn.Module, fast: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = 1.25 * parameter.data


def by_assigning_loaded(model: nn.Module, fast: nn.Module) -> None:
    model.load_state_dict(changed(model, 1.25), assign=True)


def by_new_parameters(model: nn.Module, fast: nn.Module) -> None:
    attention = model.get_submodule("attention")
    attention.q_proj.weight = nn.Parameter(1.25 * attention.q_proj.weight.detach())
    attention.v_proj.bias = nn.Parameter(attention.v_proj.bias.detach() + 1)


def by_writing_to_the_dictionaries(model: nn.Module, fast: nn.Module) -> None:
    attention = model.get_submodule("attention")
    attention.q_proj._parameters["weight"] = nn.Parameter(1.25 * attention.q_proj.weight.detach())
    model._modules["norm1"] = zoo.seeded(nn.LayerNorm(WIDTH), seed=7)


def by_removing_a_bias(model: nn.Module, fast: nn.Module) -> None:
    model.get_submodule("mlp.down_proj").bias = None


def by_a_new_module(model: nn.Module, fast: nn.Module) -> None:
    model.mlp = zoo.seeded(plain.GatedMLP(WIDTH, 96, "silu", bias=True), seed=5)


def by_setting_one_of_the_optimized(model: nn.Module, fast: nn.Module) -> None:
    fast.norm1.weight = nn.Parameter(1.25 * model.norm1.weight.detach())


def by_parametrization(model: nn.Module, fast: nn.Module) -> None:
    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 1.25 * weight

    nn.utils.parametrize.register_parametrization(model.get_submodule("attention.k_proj"), "weight", Scaled())


IN_PLACE = (by_optimizer, by_load_state_dict, by_load_state_dict_of_the_optimized, by_copy, by_data_copy)
MOVED = (
    *(by_assigning_data, by_assigning_loaded, by_new_parameters, by_writing_to_the_dictionaries, by_removing_a_bias),
    *(by_a_new_module, by_setting_one_of_the_optimized, by_parametrization),
)


def is_guarded(fast: OptimizedModule) -> bool:
    """Whether torch's guards tell that no weight was replaced: a comparison of all of them does, where there are
    none."""
    (places,) = {entry.places for entry in fast._entries.values()}  # type: ignore[attr-defined]
    return places._entries._unwritten is not None


NEVER = 10**9


@pytest.fixture(params=[1, NEVER], ids=["guards", "comparison"])
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """After how many calls there are guards."""
    monkeypatch.setattr(places, "_PATIENCE", request.param)
    calls: int = request.param
    return calls


@pytest.mark.parametrize(
    ("change", "patience"),
    [*((change, 1) for change in (*IN_PLACE, *MOVED)), *((change, NEVER) for change in MOVED)],
    indirect=["patience"],
)
def test_changed_weights_are_used_at_the_next_call(
    change: Callable[[nn.Module, nn.Module], None], patience: int, model: nn.Module, fast: OptimizedModule
) -> None:
    before, program = assert_right(fast, model, x_of()), fast.schedule.program
    assert is_guarded(fast) == (patience == 1)
    change(model, fast)
    assert_right(fast, model, x_of(3, 5))  # a size of which no entry knows yet where the weights were
    after = assert_right(fast, model, x_of())
    if change in IN_PLACE:
        assert fast.schedule.program is program, "what changes in place needs no other capture"
    assert not torch.equal(before, after)
    assert fast.schedule.served[-1].kept_original is None
    served = len(fast.schedule.served)
    assert_right(fast, model, x_of())
    assert len(fast.schedule.served) == served
    loss(fast(x_of())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_functional_call_of_the_model_moves_nothing(patience: int, model: nn.Module, fast: OptimizedModule) -> None:
    """It puts other weights in the place of the model's, and these back again."""
    before = assert_right(fast, model, x_of())
    for _ in range(2):
        assert torch.equal(assert_right(fast, model, x_of()), before)
        assert not torch.equal(functional_call(model, changed(model, 1.25), (x_of(),)), before)
    assert len(fast.schedule.served) == 1


@torch.no_grad()
def test_functional_call_of_the_optimized(patience: int, model: nn.Module, fast: OptimizedModule) -> None:
    assert_right(fast, model, x_of())
    twin = copy.deepcopy(model)
    twin.load_state_dict(changed(model, 1.25))
    result = functional_call(fast, twin.state_dict(), (x_of(),))
    assert_close([result], [twin(x_of())], outputs_in_float64(twin, (x_of(),)))
    assert_right(fast, model, x_of())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(dtype: torch.dtype, model: nn.Module, fast: OptimizedModule) -> None:
    assert fast.to(dtype) is fast
    result = assert_right(fast, model, x_of(dtype=dtype))
    assert result.dtype == dtype
    expected = own_error(model, x_of())
    with pytest.raises(type(expected)) as raised:
        fast(x_of())
    assert str(raised.value) == str(expected)
    assert_right(fast, model, x_of(dtype=dtype))
    model.float()
    assert_right(fast, model, x_of())


def test_weights_packed_once_serve_two_optimized_models(model: nn.Module) -> None:
    """Both keep their entries: the second finds the packing of the first and moves nothing."""
    first = burnish.optimize(model, (x_of(),), cache="off")
    where = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    second = burnish.optimize(model, (x_of(),), cache="off")
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == where
    for _ in range(2):
        assert_right(first, model, x_of())
        assert_right(second, model, x_of())
    assert [len(fast.schedule.served) for fast in (first, second)] == [1, 1]
    by_copy(model, first)
    assert_right(first, model, x_of())
    assert_right(second, model, x_of())


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_two_optimized_models_that_want_other_layouts_settle(
    order: tuple[bool, bool], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is faster is measured, and may come out the one way today and the other tomorrow."""
    both = []
    for transposed in order:
        monkeypatch.setattr(Preparer, "_measure_transposed", lambda self, weight, wanted=transposed: wanted)
        both.append(burnish.optimize(model, (x_of(),), cache="off"))
    for fast in both:
        assert_right(fast, model, x_of())
    served = [len(fast.schedule.served) for fast in both]
    for fast in (*both, *both):
        assert_right(fast, model, x_of())
    assert [len(fast.schedule.served) for fast in both] == served


def test_two_signatures_want_the_same_layout(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Preparer, "_measure_transposed", lambda self, weight: False)
    fast = burnish.optimize(model, (x_of(),), cache="off")
    monkeypatch.setattr(Preparer, "_measure_transposed", lambda self, weight: True)
    scale = torch.tensor(0.5)
    for _ in range(2):
        assert_right(fast, model, x_of(), scale)
        assert_right(fast, model, x_of())
    assert len(fast.schedule.served) == 2
    assert captures(fast) == 2


def test_packing_does_not_grow_the_model(model: nn.Module) -> None:
    def stored() -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        return sum(storages.values())

    before, values = stored(), copy.deepcopy(model.state_dict())
    fast = burnish.optimize(model, (x_of(),), cache="off")
    packs = next(record for record in fast.schedule.history if record.name == "pack")
    assert packs.matches["weights packed together"] == 4
    assert stored() == before
    buffers = fast.schedule.program.graph_module.buffers()
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {buffer.untyped_storage().data_ptr() for buffer in buffers} <= storages
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_a_layer_used_twice_is_packed_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = zoo.without_dropout(zoo.seeded(Twice()))
    fast = burnish.optimize(model, (x_of(),), cache="off")
    for seq in (16, 7):
        assert_right(fast, model, x_of(seq=seq))
    assert captures(fast) == 1
    by_copy(model, fast)
    assert_right(fast, model, x_of())


def test_tied_embeddings_stay_tied() -> None:
    model = zoo.CASES["nanogpt-sdpa"].build()
    fast = burnish.optimize(model, (token_ids(2, 16, 101),), cache="off")
    assert model.lm_head.weight is model.wte.weight
    assert model.wte.weight.is_contiguous()
    with torch.no_grad():
        model.wte.weight.mul_(1.5)
    assert_right(fast, model, token_ids(2, 16, 101))


# --- E3: threads, two models, exceptions ---


def test_two_threads_on_one_model(model: nn.Module) -> None:
    """From the first call on: captures, other sizes and plain calls at the same time."""
    fast = burnish.optimize(model, cache="off")
    results: dict[tuple[int, int], Tensor] = {}
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def work(thread: int) -> None:
        try:
            start.wait()
            for index in range(8):
                with torch.no_grad():
                    results[thread, index] = fast(x_of(1 + thread, 8 + index % 3, seed=10 * thread + index))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert captures(fast) == 1
    for (thread, index), result in results.items():
        x = x_of(1 + thread, 8 + index % 3, seed=10 * thread + index)
        with torch.no_grad():
            assert_close(result, model(x), outputs_in_float64(model, (x,))[0])


def test_two_models_in_one_process() -> None:
    llama, bert = zoo.CASES["llama-sdpa"], zoo.CASES["bert-eager-mask"]
    models = [case.build() for case in (llama, bert)]
    optimized = [burnish.optimize(model, cache="off") for model in models]
    for batch, seq in ((2, 8), (1, 5), (2, 8)):
        for case, model, fast in zip((llama, bert), models, optimized, strict=True):
            assert_right(fast, model, **case.inputs(batch, seq, torch.float32))
    assert [model.config._attn_implementation for model in models] == ["sdpa", "eager"]


def test_an_exception_inside_a_call_leaves_the_next_one_right() -> None:
    case = zoo.CASES["bert-sdpa-mask"]
    model = case.build()
    inputs = case.inputs(2, 16, torch.float32)
    fast = burnish.optimize(model, (), inputs, cache="off")
    wrong = {**inputs, "input_ids": inputs["input_ids"] + 1000}
    for _ in range(2):
        with pytest.raises(IndexError, match="out of range"):
            fast(**wrong)
        assert_right(fast, model, **inputs)
    fresh = burnish.optimize(model, cache="off")
    with pytest.raises(IndexError, match="out of range"):
        fresh(**wrong)
    assert_right(fresh, model, **inputs)


def test_an_interrupted_setup_leaves_nothing_half_done(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = burnish.optimize(model, cache="off")

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checks, "verify", interrupted)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            fast(x_of())
    assert_right(fast, model, x_of())
    assert fast.schedule.verifications


# --- E5: bad input ---


def own_error(model: nn.Module, *args: Any, **kwargs: Any) -> BaseException:
    with torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception as error:
            return error
    raise AssertionError("the model takes this")


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "dtype": ((x_of().double(),), {}),
    "integers": ((torch.ones(2, 16, WIDTH, dtype=torch.int64),), {}),
    "width": ((x_of()[..., :60],), {}),
    "rank": ((x_of()[0, 0],), {}),
    "missing": ((), {}),
    "unknown keyword": ((x_of(),), {"attention": None}),
    "twice": ((x_of(),), {"x": x_of()}),
    "too many": ((x_of(), None, False, 1), {}),
    "a string": (("hello",), {}),
    "a list": (([1.0, 2.0],), {}),
    "nothing": ((None,), {}),
}


def assert_raises_the_models_own_error(fast: OptimizedModule, model: nn.Module, bad: str) -> None:
    args, kwargs = BAD[bad]
    expected = own_error(model, *args, **kwargs)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(type(expected)) as raised:
            fast(*args, **kwargs)
        assert str(raised.value) == str(expected), bad


def test_bad_input_in_the_first_calls_raises_the_models_own_error(model: nn.Module) -> None:
    fast = burnish.optimize(model, cache="off")
    for bad in BAD:
        assert_raises_the_models_own_error(fast, model, bad)
    assert_right(fast, model, x_of())
    assert fast.schedule.served[-1].kept_original is None


def test_bad_input_in_later_calls_raises_the_models_own_error(model: nn.Module, fast: OptimizedModule) -> None:
    for bad in BAD:
        assert_raises_the_models_own_error(fast, model, bad)
        assert_right(fast, model, x_of())
        assert fast.schedule.served[-1].kept_original is None, bad


def test_input_on_another_device(model: nn.Module, fast: OptimizedModule) -> None:
    x = x_of().to("meta")
    expected = own_error(model, x)
    with pytest.raises(type(expected)):
        fast(x)
    assert_right(fast, model, x_of())


def test_bad_example_inputs_raise_the_models_own_error(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        burnish.optimize(model, (x_of().double(),), cache="off")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x,), TypeError, "model: an nn.Module is needed, not function"),
        ((block(), x_of()), TypeError, "args: a tuple of positional inputs is needed, not Tensor; write (x,)"),
        ((block(), (), x_of()), TypeError, "kwargs: a mapping"),
    ],
    ids=["model", "args", "kwargs"],
)
def test_wrong_arguments_of_optimize(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        burnish.optimize(*arguments)
    assert str(raised.value).startswith(message)


def test_optimize_refuses_what_is_optimized_already(fast: OptimizedModule) -> None:
    with pytest.raises(TypeError, match="optimized already"):
        burnish.optimize(fast)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cuda_graphs": "always"}, "cuda_graphs='always': use 'auto' or 'never'"),
        ({"cache": "maybe"}, "cache='maybe': use 'readwrite', 'readonly' or 'off'"),
        ({"impls": {"attention": "warp_drive"}}, "attention has no Impl 'warp_drive'; it has: "),
        ({"impls": {"softmax": "torch"}}, "there is no Op 'softmax'; there are: "),
    ],
)
def test_wrong_settings_of_optimize(settings: dict[str, Any], message: str, model: nn.Module) -> None:
    with pytest.raises(ValueError) as raised:
        burnish.optimize(model, **settings)
    assert str(raised.value).startswith(message)


# --- signatures ---


def test_train_and_eval(model: nn.Module) -> None:
    model.get_submodule("attention.dropout").p = 0.5
    fast = burnish.optimize(model, (x_of(),), cache="off")
    assert fast.train() is fast
    assert (fast.training, model.training) == (True, True)
    fast(x_of())
    fast.eval()
    assert not model.training
    assert_right(fast, model, x_of())
    assert captures(fast) == 2
    model.train()  # the model itself, behind the optimized one's back
    with torch.no_grad():
        assert not torch.equal(fast(x_of()), fast(x_of()))


def test_positional_and_keyword_arguments_are_one_signature(model: nn.Module, fast: OptimizedModule) -> None:
    scale = torch.tensor(0.5)
    assert_right(fast, model, x_of(), scale)
    served = len(fast.schedule.served)
    assert_right(fast, model, x_of(), scale=scale)
    assert_right(fast, model, scale=scale, x=x_of())
    assert len(fast.schedule.served) == served


def test_none_and_constants_are_signatures_of_their_own(model: nn.Module, fast: OptimizedModule) -> None:
    scale = torch.tensor(0.5)
    plain_result = assert_right(fast, model, x_of())
    scaled = assert_right(fast, model, x_of(), scale)
    doubled = assert_right(fast, model, x_of(), None, True)
    assert_right(fast, model, x_of(), scale=None)
    assert_right(fast, model, x_of(), scale, True)
    assert_right(fast, model, x_of(), None, False)
    assert torch.equal(doubled, 2 * plain_result)
    assert not torch.equal(scaled, plain_result)
    assert all(served.kept_original is None for served in fast.schedule.served)


def test_inputs_in_containers() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

        def forward(self, batch: dict[str, Tensor], more: list[Tensor]) -> dict[str, Any]:
            x = self.block(batch["x"])
            return {"x": x, "parts": (x.mean(-1), more[0] + 1), "none": None, "name": "block"}

    model = Nested().eval()
    fast = burnish.optimize(model, cache="off")
    for seq in (16, 9):
        result = assert_right(fast, model, {"x": x_of(seq=seq)}, [torch.ones(3)])
        assert list(result) == ["x", "parts", "none", "name"]
    assert captures(fast) == 1


def test_no_grad_inference_mode_and_grad(model: nn.Module, fast: OptimizedModule) -> None:
    with torch.no_grad():
        assert not fast(x_of()).requires_grad
    with torch.inference_mode():
        inferred = fast(x_of())
        assert inferred.is_inference()
    with torch.no_grad():
        assert torch.equal(fast(x_of()), inferred)
    assert fast(x_of()).requires_grad
    x = x_of().requires_grad_()
    model.requires_grad_(False)
    result = fast(x)
    loss(result).backward()
    result_grad, x.grad = x.grad, None
    loss(model(x)).backward()
    exact = copy.deepcopy(model).double()
    x64 = x.detach().double().requires_grad_()
    loss(exact(x64)).backward()
    assert_close(result_grad, x.grad, x64.grad)
    assert not fast(x.detach()).requires_grad


def test_gradients_reach_packed_weights(model: nn.Module, fast: OptimizedModule) -> None:
    loss(model(x=x_of())).backward()
    eager = {name: grad.clone() for name, grad in gradients(model).items()}
    fast.zero_grad()
    loss(fast(x_of())).backward()
    true = gradients_in_float64(model, {"x": x_of()})
    assert set(eager) == set(true) == set(gradients(model)) == {name for name, _ in model.named_parameters()}
    assert_close(gradients(model), eager, true)


def test_an_optimizer_made_before_still_trains(model: nn.Module) -> None:
    """Parameters stay the objects that an optimizer holds."""
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (model, twin)]
    fast = burnish.optimize(model, (x_of(),), cache="off")
    losses = []
    for module, optimizer in zip((fast, twin), optimizers, strict=True):
        for step in range(3):
            optimizer.zero_grad()
            value = (module(x_of(seed=step)) ** 2).mean()
            value.backward()
            optimizer.step()
        losses.append(float(value.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_right(fast, model, x_of())


@pytest.mark.usefixtures("untimed")
def test_weights_are_stored_otherwise_only_until_the_model_is_trained(model: nn.Module) -> None:
    """The state of a fused optimizer lies as the weights did at its first step, and it takes no other layout."""
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2, fused=True) for each in (model, twin)]

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
        optimizer.zero_grad()
        value = (module(x_of(seed=seed)) ** 2).mean()
        value.backward()
        optimizer.step()
        return float(value.detach())

    for each, optimizer in zip((model, twin), optimizers, strict=True):
        step(each, optimizer, 0)
    given = [weight.stride() for weight in model.parameters()]
    fast = burnish.optimize(model, (x_of(),), cache="off")
    assert [weight.stride() for weight in model.parameters()] != given, "an inference may store them otherwise"
    for seed in (1, 2, 3):
        fast.train()
        losses = [step(each, o, seed) for each, o in zip((fast, twin), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert [weight.stride() for weight in model.parameters()] == given
        fast.eval()
        with torch.no_grad():
            assert_right(fast, model, x_of())


def test_what_autocast_casts_is_cast(model: nn.Module, fast: OptimizedModule) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result, eager = fast(x_of()), model(x_of())
    assert fast.serving.served[-1].kept_original is None
    assert result.dtype == eager.dtype
    assert_close(result, eager, outputs_in_float64(model, (x_of(),))[0])
    casts = [note for note in fast.serving.programs[-1].history[0].notes if note.startswith("autocast")]
    assert casts == ["autocast of cpu to bfloat16: 14 casts"]
    assert_right(fast, model, x_of())


def test_hugging_faces_attention_is_cast_too() -> None:
    """Rotated queries come in float32 beside values in half precision, and symbolic sizes make tensors."""
    model, ids = zoo.seeded(llama_like()).train(), torch.randint(32, (2, 12))
    fast = burnish.optimize(model, cache="off")
    for inputs in (ids, ids[:, :9]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result, eager = fast(input_ids=inputs).logits, model(input_ids=inputs).logits
        assert fast.serving.served[-1].kept_original is None
        assert_close(result, eager, outputs_in_float64(model, (), {"input_ids": inputs})[0])


class Stopping(nn.Module):
    """Some of it without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            best = torch.topk(self.up(x), 3)
            with torch.enable_grad():
                more = self.up(x).cos()
        y = self.up(x)
        return (y + (y.round() - y).detach())[:, :3] * best.values + best.indices + more[:, :3]


def test_gradients_stop_where_the_model_stops_them() -> None:
    model, x = zoo.seeded(Stopping()).train(), torch.randn(5, 6)
    found = []
    for run in (burnish.optimize(model, cache="off"), model):
        model.zero_grad()
        loss(run(x)).backward()
        found.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert_close(*found, gradients_in_float64(model, {"x": x}))


# --- what a module is expected to be ---


def test_it_has_the_models_names_and_saves_like_it(model: nn.Module, fast: OptimizedModule, tmp_path: Any) -> None:
    assert isinstance(fast, nn.Module)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in fast.named_parameters()] == names
    assert list(fast.state_dict()) == list(model.state_dict()) == list(block().state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    torch.save(fast.state_dict(), tmp_path / "weights.pt")
    fresh = zoo.without_dropout(zoo.seeded(Block(), seed=9))
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with torch.no_grad():
        assert torch.equal(fresh(x_of()), block()(x_of()))


def test_attributes_of_the_model_are_there() -> None:
    model = zoo.CASES["bert-sdpa-mask"].build()
    fast = burnish.optimize(model, cache="off")
    assert fast.config is model.config
    assert fast.device == model.device
    assert fast.dtype == model.dtype
    assert fast.embeddings is model.embeddings
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = fast.no_such_thing


def test_a_deep_copy_stands_alone(patience: int, model: nn.Module, fast: OptimizedModule) -> None:
    before = assert_right(fast, model, x_of())
    twin = copy.deepcopy(fast)
    by_copy(model, fast)
    with torch.no_grad():
        assert torch.equal(twin(x_of()), before)
    after = assert_right(fast, model, x_of())
    assert not torch.equal(before, after)


def test_hooks_on_the_optimized_model_run(fast: OptimizedModule) -> None:
    seen = []
    handle = fast.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        fast(x_of())
    handle.remove()
    assert seen == [(2, 16, WIDTH)]


def test_optimized_inside_another_model(model: nn.Module, fast: OptimizedModule) -> None:
    whole = nn.Sequential(fast, nn.Linear(WIDTH, 3)).eval()
    original = nn.Sequential(model, whole[1]).eval()
    assert_right(whole, original, x_of())


# --- compilers, and models that no graph can hold ---


def test_torch_compile_of_an_optimized_model(model: nn.Module, fast: OptimizedModule) -> None:
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x_of()), model(x_of()))


class Branching(nn.Module):
    """Which branch runs depends on values."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_captured_runs_as_it_was() -> None:
    model = zoo.seeded(Branching(block()))
    fast = burnish.optimize(model, (x_of(),), cache="off")
    for x in (x_of(), -x_of(), x_of(3, 5)):
        with torch.no_grad():
            assert torch.equal(fast(x), model(x))
    (reason, *_) = [served.kept_original for served in fast.schedule.served]
    assert reason is not None
    assert "\n" not in reason
    assert "test_running.py" in reason
    assert "in forward" in reason
    assert reason in fast.report().summary()
    assert str(fast.report())
    with pytest.raises(ValueError, match="nothing is captured"):
        _ = fast.schedule.program


def test_a_model_that_cannot_be_captured_is_compiled_in_parts() -> None:
    torch._dynamo.reset()
    model = zoo.seeded(Branching(nn.LayerNorm(WIDTH)))  # Inductor makes little of it: each kernel takes seconds
    compiled = torch.compile(model, backend=backend.backend)
    x = x_of()
    with torch.no_grad():
        assert_close(compiled(x), model(x), outputs_in_float64(model, (x,))[0])


def test_weights_packed_in_inference_mode_still_train() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    fast = burnish.optimize(model, cache="off")
    x = torch.randn(4, 32)
    with torch.inference_mode():
        fast(x)
    fast(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
