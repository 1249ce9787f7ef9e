"""The key of a remembered Program: what decides a capture is in it, and what cannot be read off has none."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish import program_key, serving
from burnish.program_cache import ProgramCache
from burnish.runtime.module import Call, OptimizedModule
from tests import zoo

WIDTH = 8


def call_of(model: nn.Module, *args: Any, **kwargs: Any) -> Call:
    call = OptimizedModule(model, serving.Serving(model))._call(args, kwargs)
    assert call is not None
    return call


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(len(shape)))


class Small(nn.Module):
    def __init__(self, scale: Any = 2.0) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = nn.Linear(WIDTH, WIDTH), scale, nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.linear(self.dropout(x)).relu()
        x = x * self.scale if isinstance(self.scale, float) else x
        return x if mask is None else x * mask[..., None]


@pytest.fixture
def model() -> nn.Module:
    return zoo.seeded(Small())


class Config:
    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def digest(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    cache = ProgramCache("readonly")
    key = cache.at(model, call_of(model, *args, **kwargs)).key
    assert key is not None, cache.why_not
    return key.digest


def changed(model: nn.Module, how: str) -> nn.Module:
    if how == "training":
        model.train()
    elif how == "attribute":
        model.scale = 3.0
    elif how == "config":
        model.scale = Config(act="gelu", sizes=(1, 2))
    elif how == "other config":
        model.scale = Config(act="relu", sizes=(1, 2))
    elif how == "submodule":
        model.dropout = nn.Identity()
    elif how == "weight's shape":
        model.linear = nn.Linear(WIDTH, WIDTH + 1)
    elif how == "weight's dtype":
        model.double()
    elif how == "frozen":
        model.requires_grad_(False)
    elif how == "tied":
        model.other = model.linear
    elif how == "forward":
        model.forward = functools.partial(Small.forward, model)
    elif how == "function":
        model.scale = x_of
    return model


HOWS = (
    *("nothing", "training", "attribute", "config", "other config", "submodule", "weight's shape", "weight's dtype"),
    *("frozen", "tied", "forward", "function"),
)


def test_what_decides_a_capture_is_in_the_key() -> None:
    digests = {how: digest(changed(Small().eval(), how), x_of(2, 5)) for how in HOWS}
    assert len(set(digests.values())) == len(HOWS), digests
    assert digests["nothing"] == digest(zoo.seeded(Small()), -x_of(2, 5)), "values do not count"


def test_the_inputs_structure_is_in_the_key(model: nn.Module) -> None:
    x, mask = x_of(2, 5), torch.ones(2, 5)
    different = [
        digest(model, x),
        digest(model, x.double()),
        digest(model, x, mask),
        digest(model, x, mask.bool()),
        digest(model, x[0]),
        digest(model, x_of(5, 5)),
        digest(model, x_of(5, 2).transpose(0, 1)),
    ]
    assert len(set(different)) == len(different)
    assert digest(model, x) == digest(model, x=x) == digest(model, x_of(3, 7)) == digest(model, x_of(1, 7))


@pytest.mark.parametrize("case", zoo.params("bert-sdpa"))
def test_another_process_has_the_same_key(case: zoo.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where sets are walked through in another order, and after transformers has added to nn.Module."""
    case.build()
    lines = (
        "import torch",
        "from burnish import program_key",
        "from tests.test_program_key import digest",
        "program_key._own_source = lambda: 'unchanged'",
        "print(digest(torch.nn.TransformerEncoderLayer(8, 2).eval(), src=torch.ones(2, 5, 8)))",
    )
    code = "\n".join(lines)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    monkeypatch.setattr(program_key, "_own_source", lambda: "unchanged")
    assert out.stdout.strip() == digest(nn.TransformerEncoderLayer(8, 2).eval(), src=torch.ones(2, 5, 8))


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Makes a model of a package that is written anew each time."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(helper: str = "x + 1", made_in: str = "def make(): return Model()") -> nn.Module:
        for name in [name for name in sys.modules if name.startswith("their_")]:
            monkeypatch.delitem(sys.modules, name)
        program_key._hash_of.cache_clear()
        (tmp_path / "their_helper.py").write_text(f"def helper(x):\n    return {helper}\n")
        (tmp_path / "their_model.py").write_text(
            "from torch import nn\nimport their_helper\n\n"
            f"class Model(nn.Module):\n    def forward(self, x):\n        return their_helper.helper(x)\n\n{made_in}\n"
        )
        import their_model  # type: ignore[import-not-found]

        return their_model.make()  # type: ignore[no-any-return]

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


def test_the_source_that_a_model_reaches_is_in_the_key(user_code: Callable[..., nn.Module]) -> None:
    before = digest(user_code(), x_of(2, 5))
    assert digest(user_code(), x_of(2, 5)) == before
    assert digest(user_code("x + 2"), x_of(2, 5)) != before


def test_functions_exchanged_at_run_time_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo.CASES["llama-sdpa"]
    inputs = case.inputs(2, 8, torch.float32)
    before = digest(case.build(), **inputs)
    module = sys.modules[type(case.build()).__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *rest: (q, k))
    patched = digest(case.build(), **inputs)
    monkeypatch.undo()
    found = {before, patched}
    for cls in (module.LlamaMLP, nn.Linear):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", lambda self, x: x)
            found.add(digest(case.build(), **inputs))
    assert len(found) == 4


def no_key(model: nn.Module, *args: Any) -> str:
    cache = ProgramCache()
    assert cache.at(model, call_of(model, *args)).read() is None
    assert cache.why_not is not None
    return cache.why_not


def test_what_cannot_be_read_off_has_no_key(user_code: Callable[..., nn.Module]) -> None:
    local = 3.0
    hooked = Small()
    hooked.linear.register_forward_hook(lambda *args: None)
    assert no_key(hooked, x_of(2, 5)) == "the model.linear has a hook"
    assert no_key(Small(lambda x: x * 2), x_of(2, 5)) == "the model.scale is a lambda"
    assert no_key(Small([{"f": lambda x: x * local}]), x_of(2, 5)) == "the model.scale[0]['f'] is a closure"
    assert no_key(Small(torch.Generator()), x_of(2, 5)) == "the model.scale is a torch._C.Generator"
    assert "a class made at run time" in no_key(type("Other", (Small,), {})(), x_of(2, 5))
    made = "def make():\n    class Inner(Model): pass\n    return Inner()"
    assert "a class made at run time" in no_key(user_code(made_in=made), x_of(2, 5))
    interactive = types.ModuleType("interactive")
    exec("from torch import nn\nclass M(nn.Module):\n    def forward(self, x): return x", vars(interactive))
    sys.modules["interactive"] = interactive
    try:
        assert "interactive, which has no file" in no_key(interactive.M(), x_of(2, 5))
    finally:
        del sys.modules["interactive"]
