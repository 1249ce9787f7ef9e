"""`Isolated` on disk: what is loaded is what was saved, and a folder can make no other code run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import burnish
from burnish import Isolated
from burnish.isolated.recipe import build
from tests import zoo
from tests.zoo.hugging_face import needs

_transformers = needs("transformers")[0]


class Tied(nn.Module):
    """Has a tied weight, a buffer that is in no state_dict, and strided inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(4), persistent=False)

    def forward(self, x: Tensor, settings: dict[str, Any]) -> Tensor:
        out: Tensor = self.head(x * self.scale * settings["factors"][0])
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Tied()

    def forward(self, x: Tensor) -> Tensor:
        settings = {"factors": [2.0, None], "name": "n", "where": (x.transpose(0, 1), True), "dtype": torch.float16}
        out: Tensor = self.part(x.transpose(0, 1), settings)
        return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    isolated = burnish.isolate(Model().eval(), (torch.randn(4, 2),), "part")
    assert not isolated.save(tmp_path / "part")
    return tmp_path / "part"


def same(one: Any, other: Any) -> bool:
    """Equal in structure, values, and the tensors' layouts."""
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(
        torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


@_transformers
@pytest.mark.parametrize(
    ("case", "path"),
    [
        ("llama-eager-mask", "model.layers.1"),
        ("llama-sdpa", "model.layers.0.input_layernorm"),
        ("t5-gated-lm", "decoder.block.0.layer.0.SelfAttention"),
        ("whisper-sdpa", "decoder.layers.1"),
        ("gpt2-sdpa", "transformer.h.1.mlp.c_fc"),
        ("vit-sdpa", "embeddings"),
    ],
)
def test_parts_of_hugging_face_models_build_themselves(case: str, path: str, tmp_path: Path) -> None:
    model, kwargs = zoo.CASES[case].build(), zoo.CASES[case].inputs(2, 16, torch.float32)
    isolated = burnish.isolate(model, (), path, kwargs)
    assert isolated.save(tmp_path / "part")
    loaded = Isolated.load(tmp_path / "part")
    assert type(loaded.module) is type(isolated.module)
    assert same((loaded.args, loaded.kwargs), (isolated.args, isolated.kwargs))
    with torch.no_grad():
        outputs = [each.module(*each.args, **each.kwargs) for each in (loaded, isolated)]
    assert same(*outputs)
    assert (loaded.path, loaded.model) == (path, type(model).__name__)


@_transformers
def test_a_part_that_is_not_as_its_library_builds_it(tmp_path: Path) -> None:
    """The recipe would give other outputs: it is left out."""
    model, kwargs = zoo.CASES["llama-sdpa"].build(), zoo.CASES["llama-sdpa"].inputs(1, 4, torch.float32)
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.act_fn = nn.ReLU()
    assert not burnish.isolate(model, (), "model.layers.0.mlp", kwargs).save(tmp_path / "mlp")
    assert Isolated.load(tmp_path / "mlp", module=mlp).module is mlp


def test_layers_of_torch_build_themselves(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8, eps=0.1), nn.Tanh(), nn.GELU("tanh"))
    for path in "0123":
        isolated = burnish.isolate(model, (torch.randn(2, 4),), path)
        assert isolated.save(tmp_path / path)
        loaded = Isolated.load(tmp_path / path)
        assert str(loaded.module) == str(isolated.module)
        # Not the results' bits: where a weight begins in memory decides how MKL adds.
        assert same((loaded.module.state_dict(), loaded.args), (isolated.module.state_dict(), isolated.args))


def test_code_of_the_users_is_given_to_load(saved: Path) -> None:
    module = Tied()
    isolated = Isolated.load(saved, module=module)
    assert isolated.module is module
    assert module.head.weight is module.embedding.weight
    x, settings = isolated.args
    assert (x.shape, x.stride()) == ((2, 4), (1, 2))
    assert settings["factors"] == [2.0, None]
    assert (settings["name"], settings["where"][1], settings["dtype"]) == ("n", True, torch.float16)
    assert settings["where"][0].stride() == (1, 2)
    assert not isolated.save(saved)  # over what was there
    other = Isolated.load(saved, module=Tied())
    assert same(other.module(*other.args), module(*isolated.args))
    with pytest.raises(ValueError, match="holds the weights of Tied, whose code is not in it: give load a module="):
        Isolated.load(saved)


def test_a_module_with_other_weights_is_left_as_it_is(saved: Path) -> None:
    for module, said in (
        (nn.Linear(4, 5), "there are no weights for weight, bias of this Linear"),
        (nn.Identity(), "this Identity has no embedding.weight, scale, head.weight, for which there are weights"),
    ):
        with pytest.raises(ValueError, match=said):
            Isolated.load(saved, module=module)
    wide = Tied()
    wide.embedding.weight = wide.head.weight = kept = nn.Parameter(torch.randn(6, 4))
    with pytest.raises(ValueError, match=re.escape("have shape (5, 4), this Tied's have (6, 4)")):
        Isolated.load(saved, module=wide)
    assert wide.head.weight is kept


def test_inputs_that_are_no_data(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, how: Any) -> Tensor:
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.odd(x, print)
            return out

    with pytest.raises(ValueError, match="odd cannot be saved with its inputs: an argument of type builtin_function"):
        burnish.isolate(Outer(), (torch.randn(2),), "odd").save(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_a_folder_with_something_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    isolated = burnish.isolate(nn.Sequential(nn.ReLU()), (torch.randn(2),), "0")
    with pytest.raises(ValueError, match="holds something else; give a new one"):
        isolated.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


# --- what a folder from elsewhere could try ---------------------------------------------------------------------------


def _changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "isolated.json").read_text())
    change(data)
    (folder / "isolated.json").write_text(json.dumps(data))


def _recipe(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(recipe=entries)


LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
TRANSFORMERS = {"library": "transformers", "class": "LlamaModel", "attn_implementation": "sdpa", "path": "norm"}
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another library": (
        _recipe(library="os", **{"class": "system"}),
        "a module of 'os': only transformers and torch.nn",
    ),
    "a function": (_recipe(library="torch.nn", **{"class": "Module.apply"}, arguments={}), "torch.nn has no layer"),
    "a module": (_recipe(library="torch.nn", **{"class": "functional"}, arguments={}), "no layer 'functional'"),
    "no model": (
        _recipe(**{**TRANSFORMERS, "class": "pipeline"}, config=LLAMA),
        "transformers has no model 'pipeline'",
    ),
    "code from the hub": (
        _recipe(**{**TRANSFORMERS, "attn_implementation": "someone/kernels"}, config=LLAMA),
        "the implementation 'someone/kernels' is no part of transformers",
    ),
    "code from the hub, deeper": (
        _recipe(**TRANSFORMERS, config={**LLAMA, "sub": [{"_attn_implementation": "someone/kernels"}]}),
        "the implementation 'someone/kernels' is no part of transformers",
    ),
    "endless memory": (lambda data: data["strides"]["inputs.safetensors"].update({"0": [1, 10**12]}), "strides"),
    "nothing": (lambda data: data.clear(), "is not of format 1"),
    "half of it": (lambda data: data.pop("inputs"), "KeyError: 'inputs'"),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_folder_cannot_do(
    change: Callable[[dict[str, Any]], None], said: str, saved: Path, request: pytest.FixtureRequest
) -> None:
    if "transformers" in said:
        pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    _changed(saved, change)
    by_recipe = json.loads((saved / "isolated.json").read_text()).get("recipe")
    given = None if by_recipe else Tied()
    imported = set(sys.modules)
    with pytest.raises(ValueError, match=re.escape(said)):
        Isolated.load(saved, module=given)
    assert not {name for name in set(sys.modules) - imported if "kernels" in name}


@_transformers
def test_a_config_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would that names a backbone whose weights are on the hub."""
    import transformers
    from huggingface_hub import constants

    offline = []

    class Fetching(transformers.LlamaModel):
        def __init__(self, config: Any) -> None:
            offline.append(constants.is_offline_mode())
            super().__init__(config)

    monkeypatch.setattr(transformers, "LlamaModel", Fetching)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert isinstance(build({**TRANSFORMERS, "config": LLAMA}), nn.Module)
    assert offline == [True]
    assert not constants.is_offline_mode()


def test_tensors_that_are_damaged_or_missing(saved: Path) -> None:
    (saved / "weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="cannot be loaded: SafetensorError"):
        Isolated.load(saved, module=Tied())
    with pytest.raises(ValueError, match=r"has no isolated\.json: `burnish isolate` writes such folders"):
        Isolated.load(saved.parent)
