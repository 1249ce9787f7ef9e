"""Remembered Programs: what is read is what was captured, and a wrong one is found out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import burnish
from burnish import program_cache, serving
from burnish.capture import Program, capture
from burnish.graph_json import NotData, decode, function_named, identifier
from burnish.numerics import assert_close, oracle
from burnish.program_cache import ProgramCache, program_files
from burnish.rewrites import FUSE, RAISE, apply
from burnish.runtime.module import Call
from burnish.tuning import CacheMode
from burnish.tuning_store import clear_cache
from tests import zoo
from tests.test_program_key import WIDTH, Small, call_of, digest, x_of

pytestmark = pytest.mark.usefixtures("untimed")

TABLE = torch.arange(4.0)


@pytest.fixture
def model() -> nn.Module:
    return zoo.seeded(Small())


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Every Program that `optimize` captures, in order."""
    made: list[Program] = []

    def counted(*args: Any, **kwargs: Any) -> Program:
        made.append(capture(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(serving, "capture", counted)
    return made


def remembered(model: nn.Module, call: Call) -> tuple[Program, Program]:
    """A fresh capture, and what another process reads of it."""
    place = ProgramCache().at(model, call)
    program = capture(model, call.args, call.kwargs)
    place.write(program)
    assert place.cache.why_not is None
    again = ProgramCache("readonly").at(model, call).read()
    assert again is not None
    return program, again


# --- what is read is what was captured ------------------------------------------------------------


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes = [str(size) for size in (*value.shape, *value.stride())]
        return value.dtype, value.device, sizes, value.requires_grad
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    return type(value), str(value)


def meta_of(node: fx.Node) -> dict[str, Any]:
    kept = {key: node.meta.get(key) for key in ("origin", "stack_trace")}
    modules = node.meta.get("nn_module_stack", {})
    return {**kept, "val": described(node.meta.get("val")), "modules": {k: [*map(str, v)] for k, v in modules.items()}}


ROUND_TRIPS = ("bert-sdpa-mask", "gpt2-eager-mask", "llama-sdpa-mask", "t5-sdpa", "vit-sdpa", "nanogpt-manual")


@pytest.mark.parametrize("case", zoo.params(*ROUND_TRIPS, "notebook-mha-padded", "mistral-window-mask"))
def test_a_round_trip_is_the_capture(case: zoo.Case) -> None:
    model = case.build()
    program, again = remembered(model, call_of(model, **case.inputs(*case.shapes[0], torch.float32)))
    for new, old in ((again.graph_module, program.graph_module), (again.captured, program.captured)):
        assert str(new.graph) == str(old.graph)
        assert [meta_of(node) for node in new.graph.nodes] == [meta_of(node) for node in old.graph.nodes]
    assert (again.inputs, again.in_spec, again.out_spec) == (program.inputs, program.in_spec, program.out_spec)
    assert again.attention_interface == program.attention_interface
    assert again.history[0].notes[:-1] == program.history[0].notes
    assert again.history[0].notes[-1].startswith("remembered from an earlier run")
    with torch.no_grad():
        for batch, seq in case.shapes:
            leaves = call_of(model, **case.inputs(batch, seq, torch.float32)).leaves
            for mine, theirs in zip(again.captured(*leaves), program.captured(*leaves), strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("case", zoo.params(*ROUND_TRIPS, "whisper-sdpa", "qwen3", "slapo-attention"))
def test_the_same_is_made_of_it(case: zoo.Case) -> None:
    model = case.build()
    program, again = remembered(model, call_of(model, **case.inputs(*case.shapes[0], torch.float32)))
    for name, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        mine, theirs = (apply(name, rewrites, p.graph_module) for p in (again, program))
        assert (mine.matches, mine.near_misses) == (theirs.matches, theirs.near_misses)
    assert str(again.graph_module.graph) == str(program.graph_module.graph)


def test_a_kv_cache_among_the_outputs(captures: list[Program]) -> None:
    case = zoo.CASES["llama-sdpa-mask"]
    results = []
    for _ in range(2):
        model = case.build()
        model.config.use_cache = True
        inputs = case.inputs(2, 16, torch.float32)
        with torch.no_grad():
            results.append(burnish.optimize(model, (), inputs)(**inputs))
    assert len(captures) == 1
    first, second = results
    assert type(second.past_key_values) is type(first.past_key_values)
    assert torch.equal(second.past_key_values.layers[1].keys, first.past_key_values.layers[1].keys)


def test_weights_are_the_models_own(model: nn.Module) -> None:
    _, again = remembered(model, call_of(model, x_of(2, 5)))
    assert again.captured.linear.weight is again.graph_module.linear.weight is model.linear.weight


def test_one_program_serves_every_size(model: nn.Module, captures: list[Program]) -> None:
    for shape in ((2, 5), (1, 5), (7, 3), (1, 1)):
        x = x_of(*shape)
        fast = burnish.optimize(zoo.seeded(Small()), (x,))
        with torch.no_grad():
            assert_close(fast(x), model(x), oracle(copy.deepcopy(model).double(), x))
    # (1, 1) is captured as (2, 2), where batch and sequence are equal: a capture may make something of that.
    assert len(captures) == 2


def test_sizes_that_a_model_fixes_have_programs_of_their_own(captures: list[Program]) -> None:
    for count in (4, 3, 4, 3):
        x = x_of(2, count)
        assert torch.equal(burnish.optimize(Fixed(), (x,))(x), Fixed()(x))
    assert len(captures) == 2


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * (torch.arange(4.0)[:, None] if x.shape[1] == 4 else 3.0)


# --- constants ------------------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.plain, self.held = kind, torch.arange(4.0), [torch.arange(4.0)]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "literal":
            return x * torch.tensor([0.0, 1.0, 2.0, 3.0])
        return x * {"plain": self.plain, "held": self.held[0], "global": TABLE}[self.kind]


def test_constants_that_the_code_makes_are_stored() -> None:
    model = Constant("literal")
    x = torch.ones(2, 3, 4)
    program, again = remembered(model, call_of(model, x))
    assert torch.equal(again.captured(x)[0], program.captured(x)[0])


def test_a_plain_tensor_of_the_model_is_named() -> None:
    model = Constant("plain")
    x = torch.ones(2, 3, 4)
    _, again = remembered(model, call_of(model, x))
    model.plain.add_(1)
    assert torch.equal(again.captured(x)[0], model(x))


@pytest.mark.parametrize("kind", ["held", "global"])
def test_tensors_that_have_no_name_are_not_stored(kind: str) -> None:
    model = Constant(kind)
    place = ProgramCache().at(model, call_of(model, torch.ones(2, 3, 4)))
    place.write(capture(model, (torch.ones(2, 3, 4),)))
    assert "which the model keeps where burnish cannot name it" in str(place.cache.why_not)
    assert program_files() == []


# --- what is wrong is found out -------------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], None]) -> Path:
    (path,) = program_files()
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def of_another_format(content: dict[str, Any]) -> None:
    content["format"] += 1


def of_another_key(content: dict[str, Any]) -> None:
    content["key"] = "0" * 64


def of_another_shape(content: dict[str, Any]) -> None:
    content["program"]["weights"]["linear.weight"]["shape"] = [WIDTH, 2]


def without_nodes(content: dict[str, Any]) -> None:
    content["program"]["nodes"] = []


def with_a_cycle(content: dict[str, Any]) -> None:
    node = next(node for node in content["program"]["nodes"] if node["op"] == "call_function")
    node["args"][0] = {"node": len(content["program"]["nodes"]) - 1}


def with_code_for_a_name(content: dict[str, Any]) -> None:
    content["program"]["nodes"][0]["name"] = "x = print('!')"


def with_any_function(content: dict[str, Any]) -> None:
    node = next(node for node in content["program"]["nodes"] if node["op"] == "call_function")
    node["target"] = "os.system"


EDITS = (of_another_format, of_another_key, of_another_shape, without_nodes, with_a_cycle)


@pytest.mark.parametrize("change", [*EDITS, with_code_for_a_name, with_any_function])
def test_what_is_not_of_this_format_is_ignored(
    change: Callable[[dict[str, Any]], None], model: nn.Module, captures: list[Program]
) -> None:
    burnish.optimize(model, (x_of(2, 5),))
    edit(change)
    fresh = zoo.seeded(Small())
    assert ProgramCache("readonly").at(fresh, call_of(fresh, x_of(2, 5))).read() is None
    burnish.optimize(fresh, (x_of(2, 5),))
    assert len(captures) == 2
    burnish.optimize(zoo.seeded(Small()), (x_of(2, 5),))
    assert len(captures) == 2, "the new capture took the place of the bad file"


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_a_torn_file_is_ignored(length: int, model: nn.Module, captures: list[Program]) -> None:
    burnish.optimize(model, (x_of(2, 5),))
    (path,) = program_files()
    path.write_bytes(path.read_bytes()[:length])
    burnish.optimize(zoo.seeded(Small()), (x_of(2, 5),))
    assert len(captures) == 2


@pytest.mark.parametrize(
    "data", [{"node": 0}, {"float": "1e9"}, {"dtype": "nn"}, {"layout": "float32"}, {"a": 1, "b": 2}, {"eval": "1"}]
)
def test_arguments_of_no_known_kind_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(NotData):
        decode(data, [])


@pytest.mark.parametrize("name", ["os.system", "aten.view", "aten.__class__.mro", "builtins.eval", "aten.view.nothing"])
def test_functions_of_no_known_name_are_refused(name: str) -> None:
    with pytest.raises(NotData):
        function_named(name)


@pytest.mark.parametrize("name", ["", "a b", "import", "a;b", 3, "a.b"])
def test_names_that_are_none_are_refused(name: Any) -> None:
    with pytest.raises(NotData):
        identifier(name)


def other_function(content: dict[str, Any]) -> None:
    node = next(node for node in content["program"]["nodes"] if node.get("target") == "aten.relu.default")
    node["target"] = "aten.tanh.default"


def function_that_fails(content: dict[str, Any]) -> None:
    node = next(node for node in content["program"]["nodes"] if node.get("target") == "aten.relu.default")
    node["target"], node["args"] = "aten.transpose.int", [*node["args"], 7, 8]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", [other_function, function_that_fails])
def test_a_wrong_program_is_deleted_and_captured_anew(
    change: Callable[[dict[str, Any]], None], verify: bool, model: nn.Module, captures: list[Program]
) -> None:
    x = x_of(2, 5)
    burnish.optimize(model, (x,), verify=verify)
    path = edit(change)
    wrong = path.read_text()
    fresh = zoo.seeded(Small())
    assert ProgramCache("readonly").at(fresh, call_of(fresh, x)).read() is not None, "it can be read, it is wrong"
    fast = burnish.optimize(fresh, (x,), verify=verify)
    assert len(captures) == 2
    assert path.read_text() != wrong
    with torch.no_grad():
        assert_close(fast(x), model(x), oracle(copy.deepcopy(model).double(), x))


def test_what_cannot_be_compared_is_not_remembered(model: nn.Module, captures: list[Program]) -> None:
    for _ in range(2):
        fast = burnish.optimize(model.train(), (x_of(2, 5),))
    assert len(captures) == 2
    assert "is random" in str(fast.serving.remembered.why_not)
    assert program_files() == []


def test_a_wrong_call_deletes_nothing(captures: list[Program]) -> None:
    for ids, fails in ((2, False), (99, True), (3, False)):
        fast = burnish.optimize(zoo.seeded(Embedding()))
        inputs = torch.full((2, 5), ids)
        if fails:
            with pytest.raises(IndexError):
                fast(inputs)
        else:
            fast(inputs)
    assert len(captures) == 1


class Embedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(8, WIDTH)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "files"), [("readwrite", 1), ("readonly", 0), ("off", 0)])
def test_modes(mode: CacheMode, files: int, model: nn.Module, captures: list[Program], cache_home: Path) -> None:
    for _ in range(2):
        burnish.optimize(zoo.seeded(Small()), (x_of(2, 5),), cache=mode)
    assert len(captures) == 2 - files
    assert len(program_files()) == files
    assert cache_home.exists() == bool(files)


def test_readonly_reads_and_leaves_alone(model: nn.Module, captures: list[Program]) -> None:
    burnish.optimize(model, (x_of(2, 5),))
    path = edit(other_function)
    before = path.stat().st_mtime_ns, path.read_bytes()
    burnish.optimize(zoo.seeded(Small()), (x_of(2, 5),), cache="readonly")
    assert len(captures) == 2
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_the_least_recently_used_goes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_cache, "MAX_FILES", 2)
    x, mask = x_of(2, 5), torch.ones(2, 5)
    calls = [call_of(model, x), call_of(model, x, mask), call_of(model, x, mask.bool())]
    program = capture(model, (x,))
    cache = ProgramCache()
    for call in calls[:2]:
        cache.at(model, call).write(program)
    (used,) = (path for path in program_files() if path.name.startswith(f"program-{digest(model, x)[:40]}"))
    assert cache.at(model, calls[0]).read() is not None
    cache.at(model, calls[2]).write(program)
    assert len(program_files()) == 2
    assert used in program_files()


def test_clear_cache_deletes_them(model: nn.Module) -> None:
    burnish.optimize(model, (x_of(2, 5),))
    (path,) = program_files()
    assert path in clear_cache()
    assert not path.exists()


def test_a_folder_that_cannot_be_written(model: nn.Module, cache_home: Path) -> None:
    cache_home.write_text("a file where the folder would be")
    fast = burnish.optimize(model, (x_of(2, 5),))
    assert fast.serving.remembered.why_not is not None
