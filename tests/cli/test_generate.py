"""`burnish generate` on a tiny Llama, T5 and BART with a tokenizer, and on presets without one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from burnish.cli import app
from burnish.cli.generate import _weights_of_a_step
from burnish.cli.generating import Asked, Stream
from burnish.hardware import Rates
from tests.cli.running import fails, run_json
from tests.slow import slow
from tests.zoo.hugging_face import needs

pytestmark = needs("transformers")[0]

PROMPTS = ("Once upon a time", "Hello, world")


WORDS = ["<s>", "</s>", "Ġ", *map(chr, range(33, 127))]  # Ġ is ByteLevel's space
IDS = {"vocab_size": len(WORDS), "eos_token_id": 1, "bos_token_id": 0}


def save(folder: Path, model: Any, ends_with_eos: bool = False) -> Path:
    """The model and a tokenizer whose vocabulary is the printable characters."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends_with_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama."""
    import transformers

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**heads, **sizes, **IDS))
    return save(tmp_path_factory.mktemp("llama"), llama)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5."""
    import transformers

    sizes = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, **IDS, pad_token_id=0, decoder_start_token_id=0, tie_word_embeddings=False)
    return save(tmp_path_factory.mktemp("t5"), writing(transformers.T5ForConditionalGeneration(config)), True)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BART, whose generation config says two beams."""
    import transformers

    sizes = {"d_model": 48, "max_position_embeddings": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    made = writing(transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads, **IDS, **ids)))
    made.generation_config.num_beams = 2
    return save(tmp_path_factory.mktemp("bart"), made, True)


def writing(model: Any) -> Any:
    """With weights so large that what it writes depends on the source."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Hugging Face's eight greedy tokens after each prompt."""
    import transformers

    original = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = (tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS)
    return [original.generate(ids, max_new_tokens=8)[0, ids.shape[1] :].tolist() for ids in rows]


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch, untimed: None) -> None:
    monkeypatch.setattr("burnish.hardware._remembered", {})
    monkeypatch.setattr(
        "burnish.hardware.ceilings.measure", lambda target: Rates(10.0, {"float32": 50.0}, "2026-01-01")
    )


def generated(*args: str) -> tuple[str, str]:
    """What the command writes to stdout and to stderr."""
    result = CliRunner().invoke(app, ["generate", *args, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def decoded(model: Path, tokens: list[int]) -> str:
    import transformers

    return str(transformers.AutoTokenizer.from_pretrained(model).decode(tokens, skip_special_tokens=True))


def test_text_comes_on_stdout_and_the_speed_on_stderr(model: Path, expected: list[list[int]]) -> None:
    text, said = generated(str(model), "--prompt", PROMPTS[0], "--max-new-tokens", "8")
    assert text == decoded(model, expected[0]) + "\n"
    for part in ("8 tokens; the first after ", " tokens per second: ", " a step", "of weights at 10 GB/s takes "):
        assert part in said
    assert "seed" not in said
    assert generated(str(model), "--prompt", PROMPTS[0], "--max-new-tokens", "8", "--no-stream")[0] == text


def test_prompts_of_different_lengths_as_json(model: Path, expected: list[list[int]]) -> None:
    data = run_json("generate", str(model), *(f"--prompt={p}" for p in PROMPTS), "--max-new-tokens", "8")
    assert [row["prompt"] for row in data["rows"]] == list(PROMPTS)
    assert [row["tokens"] for row in data["rows"]] == expected
    assert [row["text"] for row in data["rows"]] == [decoded(model, tokens) for tokens in expected]
    assert data["prompt_tokens"] == len(PROMPTS[0])
    assert data["share_of_floor"] == pytest.approx(data["floor_us"] / data["step_us"])
    assert data["tokens_per_second"] == pytest.approx(2e6 / data["step_us"])
    assert data["floor_us"] == pytest.approx(data["weights_bytes"] / 10e3)


@pytest.mark.slow
def test_a_seed_draws_the_same_text_again(model: Path) -> None:
    args = (str(model), "--prompt", "Hi", "--max-new-tokens", "8", "--sample", "--top-k", "200", "--temperature", "3")
    text, said = generated(*args, "--seed", "5")
    assert "\nseed 5\n" in said
    assert generated(*args, "--seed", "5")[0] == text
    assert generated(*args, "--seed", "6")[0] != text


@pytest.mark.slow
def test_a_row_ends_at_its_stop_string(model: Path, expected: list[list[int]]) -> None:
    stop = decoded(model, expected[0])[2:4]
    text, _ = generated(str(model), "--prompt", PROMPTS[0], "--stop", stop)
    assert decoded(model, expected[0]).startswith(text.removesuffix("\n"))
    assert text.endswith(stop + "\n")
    assert text.count(stop) == 1


@pytest.mark.slow
def test_what_is_left_to_hugging_face_is_said(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "beams"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"num_beams": 2}))
    _, said = generated(str(folder), "--prompt", "Hi", "--max-new-tokens", "4")
    assert said.count("generate: left to Hugging Face, because of num_beams=2\n") == 1


def written(folder: Path, prompt: str, new: int) -> list[int]:
    """Hugging Face's greedy tokens after a source."""
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    original = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokens: list[int] = original.generate(ids, max_new_tokens=new, num_beams=1)[0, 1:].tolist()
    return tokens


@pytest.mark.slow
def test_an_encoder_decoder_writes_after_a_source(t5: Path) -> None:
    args = (str(t5), "--prompt", PROMPTS[0], "--max-new-tokens", "8")
    text, said = generated(*args)
    assert text == decoded(t5, written(t5, PROMPTS[0], 8)) + "\n"
    assert len(text) > 4
    assert "8 tokens; the first after " in said
    assert "left to Hugging Face" not in said
    assert generated(*args, "--no-stream")[0] == text


@pytest.mark.parametrize("family", [slow("t5"), "bart"])
def test_sources_of_different_lengths_as_json(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    data = run_json("generate", str(folder), *(f"--prompt={p}" for p in PROMPTS), "--max-new-tokens=8", "--greedy")
    assert [row["tokens"] for row in data["rows"]] == [written(folder, prompt, 8) for prompt in PROMPTS]
    assert data["prompt_tokens"] == len(PROMPTS[0]) + 1
    assert data["notes"] == []


@pytest.mark.slow
def test_a_step_reads_no_weight_that_only_the_source_goes_through(t5: Path) -> None:
    import transformers

    data = run_json("generate", str(t5), "--prompt", "Hi", "--max-new-tokens", "4")
    made = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5)
    tables, of_the_source = ("embed_tokens", "attention_bias"), ("EncDecAttention.k", "EncDecAttention.v")
    decoder = [
        p for n, p in made.decoder.named_parameters() if not any(part in n for part in (*tables, *of_the_source))
    ]
    assert data["weights_bytes"] == sum(4 * parameter.numel() for parameter in (*decoder, made.lm_head.weight))
    assert run_json("generate", str(t5), "--prompt", "Hi", "--max-new-tokens", "1")["weights_bytes"] is None


@pytest.mark.slow
def test_a_quantized_encoder_decoder(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.rewrites.quantize.MIN_ENTRIES", 1 << 8)
    _, said = generated(str(t5), "--prompt", "Hi", "--max-new-tokens", "4", "--quantize", "int8")
    assert re.search(r"int8: \d+ products, .* KiB -> .* KiB; outputs differ by ", said)
    assert "int8: on the CPU each call dequantizes the weights first" in said


@pytest.mark.slow
def test_beams_are_left_to_hugging_face_and_greedy_takes_one(bart: Path) -> None:
    args = (str(bart), "--prompt", "Hi", "--max-new-tokens", "4")
    _, said = generated(*args)
    assert "generate: left to Hugging Face, because of num_beams=2\n" in said
    assert "of weights at 10 GB/s takes " in said, "the steps must be the optimized model's"
    assert "left to Hugging Face" not in generated(*args, "--greedy")[1]


@pytest.mark.slow
def test_an_encoder_decoder_has_positions_for_the_source_and_for_what_it_writes(bart: Path) -> None:
    has = f"{bart} has positions for 32 tokens"
    assert fails("generate", str(bart), "--prompt", "a" * 40).startswith(f"--prompt: {has}, 41 of them for the prompt")
    said = fails("generate", str(bart), "--prompt", "a" * 31, "--max-new-tokens", "32")
    assert said == f"--max-new-tokens=32: {has}, 1 of them for the start; give 31 or less"
    assert generated(str(bart), "--max-new-tokens", "2", "--greedy")[0], (
        "made-up tokens are as many as it has places for"
    )


def test_a_preset_goes_on_from_made_up_tokens() -> None:
    text, said = generated("gpt2", "--layers", "1", "--seq", "6", "--batch", "2", "--max-new-tokens", "3")
    first, *ids, second, more = text.replace("\n\n", "\n").splitlines()
    assert (first, second) == ("--- 1", "--- 2")
    assert [len(line.split()) for line in (*ids, more)] == [3, 3]
    assert "6 tokens in 2 rows; " in said


@pytest.mark.slow
def test_a_preset_with_an_encoder_writes_after_made_up_tokens() -> None:
    text, said = generated("t5-small", "--layers", "1", "--seq", "6", "--max-new-tokens", "3")
    assert len(text.split()) == 3
    assert "3 tokens; " in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("gpt2", "--prompt", "Hi"), "--prompt: gpt2 has random weights and no tokenizer; use a folder or a hub id"),
        (("factory:alone", "--prompt", "Hi"), "there is no tokenizer for factory:alone"),
        (("gpt2", "--stop", "x"), "--stop: made-up tokens have no text to find it in; give a --prompt"),
        (("gpt2", "--greedy", "--top-k", "3"), "--top-k is for tokens that are drawn"),
        (("some/model", "--prompt", "Hi", "--batch", "2"), "--batch is of made-up tokens, and each prompt is a row"),
        (("some/model", "--prompt", "Hi", "--seq", "2"), "--seq is of made-up tokens, and a prompt has a length"),
        (("some/model", "--prompt", ""), "--prompt: an empty text will not do"),
        (("some/model", "--prompt", "Hi", "--stop", ""), "--stop: an empty text will not do"),
        (("gpt2", "--max-new-tokens", "0"), "--max-new-tokens"),
        (
            ("gpt2", "--layers", "1", "--seq", "1000"),
            "1024 tokens, 1000 of them for the prompt; give 24 or less",
        ),
        (("factory:block",), "factory:block: Block is no Hugging Face model; only those generate here"),
        (
            ("whisper-tiny", "--layers", "1", "--prompt", "Hi"),
            "reads audio, and text is all that can be given here; in Python "
            "burnish.optimize(model).generate(input_features=...) would do",
        ),
        (("t5-small", "--prompt", "Hi"), "--prompt: t5-small has random weights and no tokenizer"),
        (("gpt2", "--device", "tpu"), "--device tpu is not the name of a device"),
        (("gpt2", "--quantize", "int5"), "Invalid value for '--quantize': 'int5' is not one of 'int8', 'int4', 'fp8'"),
        (("bert-base", "--layers", "1"), "bert-base: BertModel does not generate text"),
    ],
)
def test_what_cannot_be_generated_is_an_error_of_one_line(args: tuple[str, ...], said: str) -> None:
    assert said in fails("generate", *args)


def test_a_folder_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    assert "has no tokenizer that can be loaded" in fails("generate", str(tmp_path), "--prompt", "Hi")


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_no_table_of_embeddings_but_the_heads(tied: bool) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=tied)
    model = transformers.GPT2LMHeadModel(config)
    looked_up = [model.transformer.wpe.weight] + ([] if tied else [model.transformer.wte.weight])
    every = sum(p.numel() for p in model.parameters())
    assert _weights_of_a_step(model, ()) == 4 * (every - sum(p.numel() for p in looked_up))
    model.config.num_experts = 4
    assert _weights_of_a_step(model, ()) is None


def test_a_stream_prints_nothing_behind_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    asked: Any = Asked(torch.zeros(1, 2), None, None, None, {}, 0, False, eos=(7,), stop=())
    stream = Stream(asked)
    for tokens in (torch.zeros(1, 2, dtype=torch.int64), *torch.tensor([[3], [7], [0], [0]])):
        stream.put(tokens)
    stream.end()
    assert capsys.readouterr().out == "3 7 \n"
    assert stream.tokens == [3, 7]
    first, step = stream.times_us()
    assert first > 0
    assert step is not None
