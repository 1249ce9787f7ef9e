"""`--quantize` of `burnish optimize` and `burnish generate`, on a tiny Llama with a tokenizer and on what has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from burnish.cli import app
from burnish.hardware import Rates
from tests.cli.running import fails, run, run_json
from tests.zoo.hugging_face import needs

pytestmark = [needs("transformers")[0], pytest.mark.usefixtures("untimed", "small_weights_too")]


@pytest.fixture
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.rewrites.quantize.MIN_ENTRIES", 1 << 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama whose vocabulary is the printable characters."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    words = ["<s>", "</s>", "Ġ", "Ċ", *map(chr, range(33, 127))]  # Ġ and Ċ: ByteLevel's space and line feed
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    sizes = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**heads, **sizes, eos_token_id=1, bos_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_optimize_shows_what_changes(model: Path) -> None:
    shown = " ".join(run("optimize", str(model), "--quantize", "int8", "--seq", "8", "--device", "cpu").split())
    for part in ("int8: 5 products, 42.25 KiB -> ", "; outputs differ by ", "; perplexity ", " 5 x int8 "):
        assert part in shown
    assert "Perplexity is of a page of Pride and Prejudice, 128 tokens." in shown


def test_as_json(model: Path) -> None:
    data = run_json("optimize", str(model), "--quantize", "fp8", "--seq", "8", "--device", "cpu")
    before, after = data["perplexity"]
    assert 0 < before != after
    assert [(each["kind"], each["products"]) for each in data["quantized"]] == [("fp8", 5)]


def test_without_a_tokenizer_it_is_of_the_examples_tokens(model: Path) -> None:
    built = f"transformers.LlamaForCausalLM.from_pretrained({str(model)!r})"
    Path("own.py").write_text(f"import transformers\ndef llama():\n    return {built}\n")
    args = ("optimize", "own:llama", "--seq", "8", "--quantize", "int8", "--device", "cpu")
    assert "Perplexity is of the example's tokens, 8 tokens." in run(*args)


def test_what_predicts_no_token_has_no_perplexity() -> None:
    shown = run("optimize", "factory:block", "--quantize", "int8", "--device", "cpu")
    assert "int8: 2 products" in shown
    assert "erplexity" not in shown


@pytest.mark.slow
def test_generate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.hardware._remembered", {})
    monkeypatch.setattr(
        "burnish.hardware.ceilings.measure", lambda target: Rates(10.0, {"float32": 50.0}, "2026-01-01")
    )
    args = ["generate", str(model), "--prompt", "It is", "--max-new-tokens", "4", "--device", "cpu"]
    results = [CliRunner().invoke(app, [*args, *more], catch_exceptions=False) for more in ([], ["--quantize", "int8"])]
    assert [result.exit_code for result in results] == [0, 0]
    assert "int8: 5 products, 42.25 KiB -> 11.82 KiB; outputs differ by " in results[1].stderr
    assert "int8" not in results[0].stderr
    norms = 3 * 32 * 4  # a table that is only looked up in is none that a step reads
    data = json.loads(CliRunner().invoke(app, [*args, "--quantize", "int8", "--json"]).stdout)
    assert data["weights_bytes"] == 12104 + norms


def test_a_kind_that_there_is_not() -> None:
    assert "'int3' is not one of 'int8', 'int4', 'fp8'" in fails("optimize", "factory:block", "--quantize", "int3")
