"""Where weights live, and that each way to move, replace or remove one or a module is told: by a comparison of all
entries, and by torch's guards on the dictionaries' versions."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.guards  # places does not import it, and uses it where it is
from torch import Tensor, nn
from torch.func import functional_call

from burnish import places as places_module
from burnish.places import Places, find_weight

WIDTH = 4


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.rand(WIDTH))
        self.scale: Tensor
        self.shift = torch.rand(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.scale + self.shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def model() -> Model:
    return Model()


def places_of(model: Model) -> Places:
    paths = [*(name for name, _ in model.named_parameters()), "inner.scale", "inner.shift"]
    return Places(model, [find_weight((model,), path) for path in paths])


def is_guarded(places: Places) -> bool:
    return places._entries._unwritten is not None


def settle(places: Places) -> None:
    """As many calls as it takes until guards are made, if any are."""
    for _ in range(places_module._PATIENCE):
        assert places.read() is not None


@pytest.fixture(params=["guards", "comparison"])
def places(request: pytest.FixtureRequest, model: Model, monkeypatch: pytest.MonkeyPatch) -> Places:
    """The model's, once by guards and once as where torch has none."""
    if request.param == "comparison":
        monkeypatch.delattr(torch._C._dynamo.guards, "RootGuardManager")
    places = places_of(model)
    settle(places)
    assert is_guarded(places) == (request.param == "guards")
    return places


# --- where weights live ---


def test_a_weight_is_found_where_it_lives(model: Model) -> None:
    constants = nn.Module()
    constants.register_buffer("packed", torch.ones(1))
    roots = (model, constants)
    for path, tensor, is_attribute in (
        ("inner.linear.weight", model.inner.linear.weight, False),
        ("inner.scale", model.inner.scale, False),
        ("inner.shift", model.inner.shift, True),
        ("packed", constants.packed, False),
    ):
        place = find_weight(roots, path)
        assert place.path == path
        assert place.owner[place.name] is tensor
        assert place.is_attribute == is_attribute
    model.register_buffer("packed", torch.zeros(1))
    place = find_weight(roots, "packed")
    assert place.owner[place.name] is model.packed, "the model is asked first"
    for path in ("inner.nothing", "nowhere.weight"):
        with pytest.raises(KeyError, match=path):
            find_weight(roots, path)


def test_weights_are_read_in_the_order_asked_for(model: Model) -> None:
    paths = ["layers.1.bias", "inner.scale", "inner.linear.weight", "inner.shift", "layers.1.bias"]
    weights = Places(model, [find_weight((model,), path) for path in paths]).read()
    expected = [model.layers[1].bias, model.inner.scale, model.inner.linear.weight, model.inner.shift]
    assert weights is not None
    assert all(a is b for a, b in zip(weights, [*expected, model.layers[1].bias], strict=True))


# --- what is told ---


def new() -> nn.Parameter:
    return nn.Parameter(torch.rand(WIDTH))


def parameter_assigned(model: Model) -> None:
    model.inner.norm.weight = new()


def parameter_assigned_with_equal_values(model: Model) -> None:
    model.inner.norm.weight = nn.Parameter(model.inner.norm.weight.detach().clone())


def parameter_put_in_the_dictionary(model: Model) -> None:
    model.inner.norm._parameters["weight"] = new()


def parameter_deleted(model: Model) -> None:
    del model.inner.norm.weight


def parameter_taken_out_of_the_dictionary(model: Model) -> None:
    model.inner.norm._parameters.pop("weight")


def parameter_none_now(model: Model) -> None:
    model.inner.linear.bias = None


def parameter_added(model: Model) -> None:
    model.inner.norm.register_parameter("late", new())


def parameters_swapped(model: Model) -> None:
    norm = model.inner.norm
    norm.weight, norm.bias = norm.bias, norm.weight


def buffer_assigned(model: Model) -> None:
    model.inner.scale = torch.rand(WIDTH)


def buffer_put_in_the_dictionary(model: Model) -> None:
    model.inner._buffers["scale"] = torch.rand(WIDTH)


def buffer_deleted(model: Model) -> None:
    del model.inner.scale


def attribute_assigned(model: Model) -> None:
    model.inner.shift = torch.rand(WIDTH)


def attribute_deleted(model: Model) -> None:
    del model.inner.shift


def module_assigned(model: Model) -> None:
    model.inner = Inner()


def module_put_in_the_dictionary(model: Model) -> None:
    model.inner._modules["norm"] = nn.LayerNorm(WIDTH)


def module_deleted(model: Model) -> None:
    del model.inner.norm


def module_of_a_list_assigned(model: Model) -> None:
    model.layers[1] = nn.Linear(WIDTH, WIDTH)


def module_added(model: Model) -> None:
    model.layers.append(nn.Linear(WIDTH, WIDTH))


def modules_swapped(model: Model) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def data_assigned(model: Model) -> None:
    model.inner.linear.weight.data = model.inner.linear.weight.data.clone()


def data_of_a_buffer_assigned(model: Model) -> None:
    model.inner.scale.data = model.inner.scale.data.clone()


def data_of_an_attribute_assigned(model: Model) -> None:
    model.inner.shift.data = model.inner.shift.data.clone()


def loaded_by_assignment(model: Model) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def cast(model: Model) -> None:
    model.double()


def parametrized(model: Model) -> None:
    nn.utils.parametrize.register_parametrization(model.inner.linear, "weight", nn.Identity())


CHANGES: list[Callable[[Model], None]] = [
    *(parameter_assigned, parameter_assigned_with_equal_values, parameter_put_in_the_dictionary, parameter_deleted),
    *(parameter_taken_out_of_the_dictionary, parameter_none_now, parameter_added, parameters_swapped),
    *(buffer_assigned, buffer_put_in_the_dictionary, buffer_deleted, attribute_assigned, attribute_deleted),
    *(module_assigned, module_put_in_the_dictionary, module_deleted, module_of_a_list_assigned, module_added),
    *(modules_swapped, data_assigned, data_of_a_buffer_assigned, data_of_an_attribute_assigned),
    *(loaded_by_assignment, cast, parametrized),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_moved_is_told_at_every_call_after_it(
    change: Callable[[Model], None], places: Places, model: Model
) -> None:
    change(model)
    for _ in range(2 * places_module._PATIENCE):
        assert places.read() is None


def test_what_has_moved_is_told_at_the_first_call_too(model: Model) -> None:
    for change in CHANGES:
        fresh = Model()
        places = places_of(fresh)
        change(fresh)
        assert places.read() is None, change.__name__


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute", "module"])
def test_what_was_put_back_is_where_it_was(kind: str, places: Places, model: Model) -> None:
    inner = model.inner
    owner, name, other = {
        "parameter": (inner.norm, "weight", new()),
        "buffer": (inner, "scale", torch.rand(WIDTH)),
        "attribute": (inner, "shift", torch.rand(WIDTH)),
        "module": (inner, "norm", nn.LayerNorm(WIDTH)),
    }[kind]
    before = getattr(owner, name)
    for _ in range(2):
        setattr(owner, name, other)
        assert places.read() is None
        setattr(owner, name, before)
        settle(places)


def test_functional_call_is_told_while_it_lasts(places: Places, model: Model) -> None:
    seen: list[Any] = []
    model.inner.norm.register_forward_hook(lambda *_: seen.append(places.read()))
    others = {name: 2 * value.detach() for name, value in model.named_parameters()}
    for _ in range(2):
        seen.clear()
        functional_call(model, others, (torch.rand(2, WIDTH),))
        assert seen == [None]
        settle(places)


def test_what_leaves_weights_where_they_are_is_not_told(places: Places, model: Model) -> None:
    before = places.read()
    with torch.no_grad():
        model.inner.linear.weight.mul_(2)
    model.inner.scale.data.add_(1)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    model.requires_grad_(False).train(not model.training)
    model.inner.calls = 1  # in the dictionary that has a weight of ours as an attribute
    model.inner.linear.weight = model.inner.linear.weight
    model.inner.norm = model.inner.norm
    after = places.read()
    assert before is not None
    assert after is not None
    assert all(a is b for a, b in zip(before, after, strict=True))


# --- guards ---


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that guards were tried: whether some were made."""
    made: list[bool] = []
    make = places_module._version_guards

    def noted(dictionaries: Any) -> Any:
        check = make(dictionaries)
        made.append(check is not None)
        return check

    monkeypatch.setattr(places_module, "_version_guards", noted)
    return made


def test_guards_are_made_once_and_then_nothing_is_compared(model: Model, made: list[bool]) -> None:
    places = places_of(model)
    for _ in range(places_module._PATIENCE - 1):
        places.read()
    assert made == []
    places.read()
    assert made == [True]
    places._entries._values = None  # type: ignore[assignment]  # whoever compared would stumble over it
    for _ in range(3 * places_module._PATIENCE):
        assert places.read() is not None
    assert made == [True]


def test_after_a_write_guards_are_made_anew_only_after_as_many_calls_again(model: Model, made: list[bool]) -> None:
    places, norm, weight = places_of(model), model.inner.norm, model.inner.norm.weight
    settle(places)
    for _ in range(places_module._PATIENCE - 1):
        norm.weight = new()
        norm.weight = weight
        assert places.read() is not None
        assert not is_guarded(places)
    assert made == [True]
    assert places.read() is not None
    assert is_guarded(places)
    assert made == [True, True]
    norm.weight = new()
    assert places.read() is None


def test_a_write_while_guards_are_made_is_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    places = places_of(model)
    make = places_module._version_guards

    def interrupted(dictionaries: Any) -> Any:
        check = make(dictionaries)
        model.inner.norm.weight = new()
        return check

    monkeypatch.setattr(places_module, "_version_guards", interrupted)
    for _ in range(places_module._PATIENCE - 1):
        assert places.read() is not None
    for _ in range(3):
        assert places.read() is None


def raises(*_: Any) -> Any:
    raise RuntimeError("no guards here")


def without_dynamo(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo.guards")


def without_kinds(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.delattr(torch._dynamo.guards, "GuardManagerType")


def without_a_manager(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "RootGuardManager")


def with_a_manager_that_raises(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr(torch._C._dynamo.guards, "RootGuardManager", raises)


def with_a_dictionary_of_another_class(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    model.inner.norm._parameters = OrderedDict(model.inner.norm._parameters)


@pytest.mark.parametrize(
    "lack",
    [
        *(without_dynamo, without_kinds, without_a_manager),
        *(with_a_manager_that_raises, with_a_dictionary_of_another_class),
    ],
)
def test_without_guards_entries_are_compared(
    lack: Callable[[pytest.MonkeyPatch, Model], None], model: Model, made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, model)
    loaded = set(sys.modules)
    places = places_of(model)
    for _ in range(2):
        settle(places)
    assert made == [False], "tried once"
    assert set(sys.modules) == loaded
    model.inner.norm.weight = new()
    assert places.read() is None


def test_dictionaries_live_as_long_as_places(places: Places) -> None:
    model = Model()
    places = places_of(model)
    settle(places)
    module, weight = weakref.ref(model.inner), weakref.ref(model.inner.norm.weight)
    del model
    gc.collect()
    assert places.read() is not None
    del places
    gc.collect()
    assert (module(), weight()) == (None, None)


def test_places_read_by_many_threads(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "_PATIENCE", 1)
    places, norm, weight, other = places_of(model), model.inner.norm, model.inner.norm.weight, new()
    stop, errors = threading.Event(), []

    def read() -> None:
        try:
            while not stop.is_set():
                places.read()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(300):
            norm.weight = other
            assert places.read() is None
            norm.weight = weight
            assert places.read() is not None
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not errors
