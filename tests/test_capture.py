"""Capture: which sizes are free, what a Program refuses, one-line errors, and settings left as they were."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish import huggingface
from burnish.capture import CaptureError, Program, capture, program_symbols
from burnish.numerics import assert_close
from burnish.verify import outputs_in_float64
from tests import zoo

WIDTH = 8


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(len(shape)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)
        self.register_buffer("table", torch.rand(64, WIDTH))
        self.table: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, **extra: Any) -> dict[str, Tensor]:
        torch._check(x.shape[1] <= 64)
        x = self.dropout(self.linear(x)) + self.table[: x.shape[1]]
        for value in extra.values():
            x = x + value
        return {"out": x * scale if mask is None else x * mask.unsqueeze(-1)}


@pytest.fixture
def model() -> nn.Module:
    return zoo.seeded(Scaled())


def assert_serves(program: Program, model: nn.Module, *leaves: Any) -> None:
    assert program.rejects(leaves) is None
    with torch.no_grad():
        assert_close(
            list(program.graph_module(*leaves)), [model(*leaves)["out"]], outputs_in_float64(program.captured, leaves)
        )


# --- sizes ---


@pytest.mark.parametrize("captured_at", [(2, 5), (1, 5), (3, 1), (1, 1)])
def test_batch_and_sequence_are_free_whatever_they_were(captured_at: tuple[int, int], model: nn.Module) -> None:
    program = capture(model, (x_of(*captured_at), torch.ones(captured_at)))
    assert len(program_symbols(program)) == 2
    assert program.history[0].notes == ["free sizes: x[0], x[1]"]
    for batch, seq in ((1, 1), (2, 5), (7, 64), (1, 33)):
        assert_serves(program, model, x_of(batch, seq), torch.ones(batch, seq))


def test_a_size_that_the_model_fixes_is_fixed() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            if x.shape[0] != 1:
                raise ValueError("one at a time")
            return {"out": x.relu()}

    program = capture(One(), (x_of(1, 5),))
    assert program_symbols(program) == ["x[1]", "x[2]"]
    assert_serves(program, One(), x_of(1, 9))
    assert program.rejects([x_of(2, 5)]) == "x: size 2 at dim 0 does not fit 1"


@pytest.mark.parametrize(
    ("leaves", "reason"),
    [
        ([x_of(2, 65), None], "x: size 65 at dim 1 is outside 2..64"),
        ([x_of(0, 5), None], "x: size 0 at dim 0 is outside 2..any"),
        ([x_of(2, 5).double(), None], "x was torch.float32 on cpu when captured"),
        ([x_of(2, 5).to("meta"), None], "x was torch.float32 on cpu when captured"),
        ([x_of(5), None], "x had 3 dims when captured"),
        ([torch.randn(2, 5, 9), None], "x: size 9 at dim 2 does not fit 8"),
        (["x", None], "x was a tensor when captured"),
        ([x_of(2, 5), torch.ones(2, 5)], "mask was None when captured"),
        ([x_of(2, 5), 0], "mask was None when captured"),
    ],
)
def test_what_a_program_refuses(leaves: list[Any], reason: str, model: nn.Module) -> None:
    program = capture(model, (x_of(2, 5), None))
    assert program.rejects(leaves) == reason
    assert_serves(program, model, x_of(2, 5), None)


@pytest.mark.parametrize(("given", "refused"), [(1, 1.0), (True, 1), (2.0, 3.0)])
def test_constants_are_part_of_the_program(given: Any, refused: Any, model: nn.Module) -> None:
    program = capture(model, (x_of(2, 5),), {"scale": given})
    assert program.rejects([x_of(2, 5), given]) is None
    assert program.rejects([x_of(2, 5), refused]) == f"scale was {given!r} when captured"


def test_sizes_that_go_together_must(model: nn.Module) -> None:
    program = capture(model, (x_of(2, 5), torch.ones(2, 5)))
    reason = program.rejects([x_of(2, 5), torch.ones(2, 6)])
    assert reason is not None
    assert reason.startswith("mask: size 6 at dim 1 does not fit")


def test_a_tensor_given_twice_is_two_inputs(model: nn.Module) -> None:
    x = x_of(2, 5)
    program = capture(model, (x,), {"bias": x})
    with torch.no_grad():
        assert torch.equal(program.captured(x, -x)[0], model(x, bias=-x)["out"])


@pytest.mark.parametrize("own_forward", [False, True])
def test_keywords_that_forward_does_not_name(own_forward: bool, model: nn.Module) -> None:
    if own_forward:  # as libraries that wrap a model's forward leave it
        model.forward = functools.partial(Scaled.forward, model)
    before = vars(model).get("forward")
    program = capture(model, (x_of(2, 5),), {"bias": x_of(2, 5), "sign": torch.ones(WIDTH)})
    assert vars(model).get("forward") is before
    assert program_symbols(program) == ["x[0]", "x[1]"]
    x, bias, sign = x_of(3, 9), x_of(3, 9) + 1, torch.ones(WIDTH)
    with torch.no_grad():
        eager = model(x, bias=bias, sign=sign)["out"]
    assert torch.equal(program.graph_module(x, bias, sign)[0], eager)


def test_first_rows_are_some_samples_of_every_input(model: nn.Module) -> None:
    program = capture(model, (x_of(4, 8), torch.ones(4, 8), 1.0), {"bias": torch.ones(WIDTH)})
    leaves = [x_of(16, 8), torch.ones(16, 8), 1.0, torch.ones(WIDTH)]

    def rows(tokens: int) -> list[int]:
        cut = program.first_rows(leaves, tokens)
        assert cut[2] == 1.0
        return [len(cut[0]), len(cut[1]), len(cut[3])]

    assert [rows(tokens) for tokens in (1, 40, 128, 10_000)] == [[2, 2, 8], [5, 5, 8], [16, 16, 8], [16, 16, 8]]
    assert torch.equal(program.first_rows(leaves, 40)[0], leaves[0][:5])


class Masked(nn.Module):
    """A mask of (sequence, sequence) comes before the batch, by name and by position."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)).masked_fill(mask == 0, 0.0) @ x


def test_a_mask_of_the_sequence_is_not_cut() -> None:
    program = capture(Masked(), (torch.ones(6, 6), x_of(4, 6)))
    mask, x = program.first_rows([torch.ones(100, 100), x_of(16, 100)], 300)
    assert [len(mask), len(x)] == [100, 3]


class Loss(nn.Module):
    """Export gives targets a size of their own, which an assertion in the graph binds to that of x."""

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize(("flat", "rows"), [(False, (2, 2)), (True, (16, 16 * 6))])
def test_targets_of_a_loss_are_cut_with_what_they_belong_to(flat: bool, rows: tuple[int, int]) -> None:
    targets = torch.arange(16 * 6).remainder(WIDTH).view(16, 6)
    leaves = [x_of(16, 6), targets.flatten() if flat else targets]
    program = capture(Loss(), (leaves[0], leaves[1]))
    cut = program.first_rows(leaves, 1)
    assert (len(cut[0]), len(cut[1])) == rows
    assert torch.equal(program.graph_module(*cut)[0], Loss()(*cut))


# --- the program ---


def test_weights_are_the_models_own(model: nn.Module) -> None:
    program = capture(model, (x_of(2, 5),))
    own = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    for graph_module in (program.graph_module, program.captured):
        used = {node.target: node for node in graph_module.graph.nodes if node.op == "get_attr"}
        assert set(used) == set(own)
        assert {name: graph_module.state_dict()[name].data_ptr() for name in used} == own


def test_each_node_remembers_which_it_was(model: nn.Module) -> None:
    program = capture(model, (x_of(2, 5),))
    nodes, originals = (list(gm.graph.nodes) for gm in (program.graph_module, program.captured))
    assert [node.meta["origin"] for node in nodes] == [node.name for node in originals]
    assert not set(nodes) & set(originals)
    program.graph_module.graph.erase_node(nodes[-1])
    assert list(program.captured.graph.nodes) == originals, "one may change without the other"


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_captured_and_kept(training: bool, model: nn.Module) -> None:
    program = capture(model.train(training), (x_of(2, 5),))
    targets = {node.target for node in program.graph_module.graph.nodes}
    assert (torch.ops.aten.dropout.default in targets) is training
    assert model.training is training


# --- errors ---


class Broken(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("first line\nsecond line")


def misfits(x: Tensor) -> Tensor:
    return x @ torch.ones(3, 3)


@pytest.mark.parametrize("shape", [(2, 5), (1, 5)])
@pytest.mark.parametrize(
    ("body", "message"),
    [(branches, "Could not guard on data-dependent"), (raises, "RuntimeError: first line"), (misfits, "RuntimeError")],
)
def test_errors_are_one_line_that_names_the_place(
    body: Callable[[Tensor], Tensor],
    message: str,
    shape: tuple[int, int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    level = logging.WARNING + 1  # not what an earlier capture may have left behind
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._dynamo")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", level)
    with pytest.raises(CaptureError) as error:
        capture(Broken(body), (x_of(*shape),))
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert f"test_capture.py:{body.__code__.co_firstlineno + 1} in {body.__name__}" in text
    assert error.value.__cause__ is not None
    assert [logger.level for logger in loggers] == [level] * 2
    assert capfd.readouterr().err == ""


def test_a_call_that_does_not_fit_the_signature(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match="missing a required argument: 'x'"):
        capture(model)


# --- Hugging Face ---


SETTINGS = pytest.mark.parametrize("case", zoo.params("bert-eager-mask", "t5-sdpa", "llama-sdpa"))


def settings(model: nn.Module) -> list[Any]:
    """What the capture of a Hugging Face model exchanges for its own: the implementation that each config names, and
    transformers' registers of implementations."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    registers = [dict(register._global_mapping) for register in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return [*registers, *(config._attn_implementation_internal for config in configs.values())]


def inputs_of(case: zoo.Case) -> dict[str, Any]:
    return case.inputs(2, 8, torch.float32)


@SETTINGS
def test_settings_are_as_before_after_a_capture(case: zoo.Case) -> None:
    model = case.build()
    before = settings(model)
    program = capture(model, (), inputs_of(case))
    assert program.attention_interface
    assert settings(model) == before
    model(**inputs_of(case))


@SETTINGS
def test_settings_are_as_before_after_an_error(case: zoo.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.build()
    before = settings(model)
    seen = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        seen.append(settings(model))
        raise RuntimeError("no export today")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(CaptureError, match="no export today"):
        capture(model, (), inputs_of(case))
    assert seen[0] != before
    assert huggingface.NAME in seen[0][-1]
    assert settings(model) == before


def test_what_the_op_cannot_say_is_captured_as_it_is() -> None:
    """Dropout on the attention weights is active: the attention stays transformers' own, settings and all."""
    case = zoo.CASES["llama-sdpa"]
    model = case.build()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    before = settings(model)
    program = capture(model.train(), (), inputs_of(case))
    assert not program.attention_interface
    assert settings(model) == before


@pytest.mark.parametrize("how", ["config", "argument", "implementation"])
def test_what_is_not_taken_over(how: str) -> None:
    case = zoo.CASES["bert-eager-mask"]
    model = case.build()
    if how == "config":
        model.config.output_attentions = True
    if how == "implementation":
        model.config._attn_implementation_internal = "flex_attention"
    given = frozenset({"output_attentions"} if how == "argument" else set())
    before = settings(model)
    with huggingface.captured_attention(model, given) as took_over:
        assert not took_over
        assert settings(model) == before


def test_other_models_need_no_transformers(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "transformers")
    for name in [name for name in sys.modules if name.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    assert not capture(model, (x_of(2, 5),)).attention_interface
    assert "transformers" not in sys.modules


def test_what_libraries_say_meanwhile_is_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    class Talkative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("deprecated", stacklevel=1)
            print("a graph", file=sys.stderr)
            logging.getLogger("torch.fx.experimental").error("a shape")
            return x.relu()

    with warnings.catch_warnings(record=True) as warned:
        capture(Talkative(), (x_of(2, 3),))
    assert (warned, capfd.readouterr().err) == ([], "")
