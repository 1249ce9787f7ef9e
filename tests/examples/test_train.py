"""`examples/`: the text, its tokenizer, and training runs of a few steps, stopped and resumed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from burnish.numerics import assert_close
from examples import train_nanogpt
from examples.checkpoints import RECORD, TOKENIZER, Run, load
from examples.comparing import LOSSES, PICTURE, compare, draw
from examples.gpt import GPT, PRESETS
from examples.options import HOW, Options
from examples.text import SHIPPED, Tokens, draw_batch, load_tokenizer, read_text, train_tokenizer
from examples.training import Trainer, learning_rate, prepare, resume, start, train
from tests.e2e.float64 import gradients, gradients_in_float64, loss, outputs_in_float64

pytestmark = pytest.mark.usefixtures("untimed")
ROOT = Path(__file__).parents[2]
TEXT = read_text(SHIPPED)[:20_000]
OPTIONS = Options(
    preset="tiny",
    how="eager",
    steps=6,
    batch=2,
    context=12,
    vocab=300,
    lr=1e-3,
    dtype="float32",
    dropout=0.1,
    device="cpu",
    seed=3,
    save_every=4,
    evaluate_every=5,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT, OPTIONS.vocab)


# --- the text ---


def test_the_shipped_text_is_what_its_readme_says() -> None:
    data, told = SHIPPED.read_bytes(), (SHIPPED.parent / "README.md").read_text()
    assert f"{len(data):,} bytes" in told
    assert hashlib.sha256(data).hexdigest() in told
    text = data.decode("ascii")
    assert text.lstrip().startswith("PREFACE\n")
    assert text.endswith("sheds its horn every two years.\n")
    assert not re.search(r"[ \t]$|\r|\t|\n{4}|00-database|wiretap", text, re.MULTILINE)


@given(st.text(max_size=40))
def test_a_tokenizer_takes_any_text(text: str) -> None:
    tokenizer = _small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


_kept: list[Tokenizer] = []


def _small_tokenizer() -> Tokenizer:
    if not _kept:
        _kept.append(train_tokenizer(TEXT, 300))
    return _kept[0]


def test_a_tokenizer_is_the_same_each_time(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / TOKENIZER))
    read = load_tokenizer(tmp_path / TOKENIZER)
    assert read.to_str() == tokenizer.to_str() == train_tokenizer(TEXT, OPTIONS.vocab).to_str()
    assert read.get_vocab_size() == OPTIONS.vocab
    assert len(read.encode(TEXT).ids) < len(TEXT)


@pytest.mark.parametrize(
    ("text", "vocab", "says"),
    [("hello", 255, "has 256 tokens at least"), ("hello", 400, r"the text gives 26\d tokens at most")],
)
def test_a_vocabulary_that_cannot_be(text: str, vocab: int, says: str) -> None:
    with pytest.raises(ValueError, match=f"^--vocab {vocab}: .*{says}"):
        train_tokenizer(text, vocab)


def test_batches_are_of_seed_and_step_alone() -> None:
    tokens = torch.arange(1000)
    ids, targets = draw_batch(tokens, 4, 8, 0, 7)
    assert ids.shape == targets.shape == (4, 8)
    assert torch.equal(ids + 1, targets)
    assert torch.equal(ids, draw_batch(tokens, 4, 8, 0, 7)[0])
    drawn = {tuple(draw_batch(tokens, 4, 8, *seed)[0][:, 0].tolist()) for seed in ((0, 7), (0, 8), (1, 7), ("a", 7))}
    assert len(drawn) == 4
    ids, targets = draw_batch(torch.arange(9), 3, 8, 0)
    assert targets[:, -1].tolist() == [8, 8, 8], "the last token is somebody's target"


def test_what_is_held_out_is_not_trained_on(tokenizer: Tokenizer) -> None:
    tokens = Tokens.of(TEXT, tokenizer)
    assert tokens.training.tolist() + tokens.held_out.tolist() == tokenizer.encode(TEXT).ids
    assert len(tokens.held_out) == len(tokenizer.encode(TEXT).ids) // 10


# --- the model ---


def test_gpt2_has_124_million_parameters() -> None:
    with torch.device("meta"):
        model = GPT(PRESETS["gpt2-124m"])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(124.5e6, rel=1e-3)
    assert model.head.weight is model.wte.weight


def test_no_token_sees_the_next() -> None:
    torch.manual_seed(0)
    model = GPT(OPTIONS.config).eval()
    ids = torch.randint(0, 300, (1, 12))
    changed = ids.clone()
    changed[0, 8:] = 5
    with torch.no_grad():
        before, after = model.logits(ids), model.logits(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(replace(OPTIONS, steps=100), step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)


# --- runs ---


def nothing(trainer: Trainer) -> None:
    pass


def stop_at(step: int) -> Callable[[Trainer], None]:
    def report(trainer: Trainer) -> None:
        if trainer.run.step == step:
            raise KeyboardInterrupt

    return report


def run(folder: Path, options: Options = OPTIONS, report: Callable[[Trainer], None] = nothing) -> Trainer:
    trainer, _ = start(options, TEXT, folder)
    train(trainer, folder, report)
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


def test_the_first_call_changes_nothing(tokenizer: Tokenizer) -> None:
    torch.manual_seed(OPTIONS.seed)
    model = GPT(OPTIONS.config)
    drawn = torch.get_rng_state()
    trainer = Trainer(Run(OPTIONS, ""), Tokens.of(TEXT, tokenizer))
    assert torch.equal(torch.get_rng_state(), drawn)
    pairs = zip(trainer.model.parameters(), model.parameters(), strict=True)
    assert all(mine.grad is None and torch.equal(mine, other) for mine, other in pairs)
    assert trainer.run.step == 0


@pytest.mark.parametrize("how", ["eager", "optimize", pytest.param("burnish", marks=pytest.mark.slow)])
def test_a_resumed_run_is_as_if_never_stopped(how: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, how=how)
    whole = run(tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", options, stop_at(5))
    torch.compiler.reset()
    torch.manual_seed(99)
    trainer, _ = resume(TEXT, tmp_path / "parts")
    assert trainer.run.step == 4
    train(trainer, tmp_path / "parts", nothing)
    assert trainer.run.losses == whole.run.losses
    assert trainer.run.held_out == whole.run.held_out
    for name, tensor in whole.state().items():
        assert torch.equal(trainer.state()[name], tensor), name
    assert [file.name for file in (tmp_path / "parts").glob("*.safetensors")] == ["step-000006.safetensors"]


def test_a_step_is_the_models(tokenizer: Tokenizer) -> None:
    """By `optimize`, within the rule: eager's error, of loss and gradients, against float64."""
    options = replace(OPTIONS, dropout=0.0)
    torch.manual_seed(0)
    model = GPT(options.config).train()
    ids, targets = draw_batch(Tokens.of(TEXT, tokenizer).training, 2, 12, 0)
    inputs = {"ids": ids, "targets": targets}
    found = []
    for call in (prepare(model, "optimize"), model):
        model.zero_grad(set_to_none=True)
        value = call(**inputs)
        loss(value).backward()
        found.append((value.detach(), {name: grad.clone() for name, grad in gradients(model).items()}))
    (ours, our_gradients), (eager, eager_gradients) = found
    assert_close(ours, eager, outputs_in_float64(model, (), inputs)[0])
    assert_close(our_gradients, eager_gradients, gradients_in_float64(model, inputs))


def test_a_save_that_is_interrupted_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report=stop_at(4))

    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("examples.checkpoints.write_text", fail)
    trainer, _ = resume(TEXT, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        train(trainer, tmp_path, nothing)
    monkeypatch.undo()
    assert resume(TEXT, tmp_path)[0].run.step == 4


def _record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text())
        change(record)
        (folder / RECORD).write_text(json.dumps(record))

    return damage


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "step-000006.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / RECORD).write_text("{"), "run.json: not JSON"),
        (lambda folder: (folder / RECORD).write_text("[]"), "run.json: not a run in format 1"),
        (lambda folder: (folder / RECORD).unlink(), "there is no run in it"),
        (lambda folder: (folder / "step-000006.safetensors").write_bytes(b"\x80\x04."), "step-000006.safetensors: "),
        (lambda folder: (folder / "step-000006.safetensors").unlink(), "step-000006.safetensors"),
        (lambda folder: (folder / TOKENIZER).write_text("{}"), "tokenizer.json: not a tokenizer"),
        (_record(lambda record: record.update(more=1)), "run.json: its keys differ from a run's: more"),
        (_record(lambda record: record["losses"].pop()), "run.json: tensors='step-000006.safetensors' is not the file"),
        (_record(lambda record: record.update(tensors="../x")), "run.json: tensors='../x' is not the file of step 6"),
        (_record(lambda record: record.update(losses=["1"] * 6)), "run.json: '1' is not a finite number"),
        (_record(lambda record: record.update(losses=3)), "run.json: 'int' object is not iterable"),
        (_record(lambda record: record["options"].update(lr="x")), "run.json: --lr x: a float is wanted"),
        (_record(lambda record: record["options"].pop("lr")), "run.json: its options are not those of a run"),
        (
            _record(lambda record: record["options"].update(vocab=301)),
            "tokenizer.json: it has not the run's 301 tokens",
        ),
        (_record(lambda record: record.update(text_sha256="0")), "its run learned another text"),
        (_tensors(lambda tensors: tensors.pop("rng.cpu")), "is not of this model: it differs in rng.cpu"),
        (
            _tensors(lambda tensors: tensors.update({"model.ln_f.bias": torch.zeros(3)})),
            r"is not of this model: model.ln_f.bias is \(3,\)",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], None], says: str, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage(folder)
    with pytest.raises(ValueError, match=says) as raised:
        resume(TEXT, folder)
    assert "\n" not in str(raised.value)


# --- the command ---

SMALL = ["--steps", "2", "--batch", "2", "--context", "12", "--vocab", "300", "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    return ["--text", str(tmp_path / "text.txt")]


def command(*args: str) -> int:
    with pytest.raises(SystemExit) as raised:
        train_nanogpt.main(args)
    assert isinstance(raised.value.code, int)
    return raised.value.code


def test_the_command(text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert command("--out", out, "--how", "eager", *SMALL, *text) == 0
    printed = capsys.readouterr().out
    assert re.search(r"step +2 of 2  loss \d\.\d{4} .* tokens/s  held out \d\.\d{4}\n", printed)
    assert "eager; first call" in printed
    assert "LOVE, n." in printed
    before = load(tmp_path / "run")[0]
    assert command("--out", out, "--resume", *text) == 0
    assert load(tmp_path / "run")[0].losses == before.losses, "it was at its end"
    assert "by eager" in capsys.readouterr().out


def test_several_ways_make_a_picture(text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    asked = ["--out", str(out), "--how", "eager", "--how", "eager", "--how", "optimize", *SMALL, *text]
    assert command(*asked) == 0
    eager, again, ours = json.loads((out / LOSSES).read_text())
    assert [record["variant"] for record in (eager, again, ours)] == ["eager", "eager-2", "optimize"]
    assert again["losses"] == eager["losses"]
    assert len(eager["losses"]) == len(ours["losses"]) == 2
    assert {"device", "versions", "date", "command", "step_ms", "peak_mib"} <= eager.keys()
    picture = (out / PICTURE).read_text()
    assert "burnish.optimize" in picture
    assert "eager, run 2" in picture
    assert command(*asked, "--resume") == 0
    capsys.readouterr()
    assert command(*asked, "--resume", "--lr", "0.5") == 2
    assert capsys.readouterr().err == f"train_nanogpt: --lr 0.5: the run in {out / 'eager'} has 0.001\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--preset", "huge"], "--preset huge: there are tiny, small, gpt2-124m"),
        (["--how", "fast"], "--how fast: there are eager, compile, burnish, optimize"),
        (["--dtype", "float16"], "--dtype float16: there are float32, bfloat16"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--save-every", "-1"], "--save-every -1: at least 1"),
        (["--lr", "nan"], "--lr nan: a number greater than 0"),
        (["--lr", "fast"], "--lr"),
        (["--dropout", "1"], "--dropout 1.0: from 0 to below 1"),
        (["--vocab", "100"], "--vocab 100: from 256, the bytes, to the model's 1024"),
        (["--vocab", "1024"], "--vocab 1024: the text gives"),
        (["--context", "5000"], "--context 5000: of the text only"),
        (["--seed", "-1"], "--seed -1: from 0 to 2**32 - 1"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--text", "no-such-file"], "no-such-file"),
        (["--resume"], "run: there is no run in it"),
        (["--stepz", "1"], "No such option"),
    ],
)
def test_bad_options_are_one_line(
    args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:2000])
    given = ["--out", str(tmp_path / "run"), *SMALL, "--text", str(tmp_path / "text.txt"), *args]
    assert command(*given) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("train_nanogpt: ")
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "run" / RECORD).exists()


def test_a_run_is_not_written_over(text: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / RECORD).read_bytes()
    assert command("--out", str(finished), *SMALL, *text) == 2
    assert "there is a run in it; --resume goes on with it" in capsys.readouterr().err
    assert (finished / RECORD).read_bytes() == before


def test_options_survive_json() -> None:
    assert Options.parse(json.loads(json.dumps(asdict(OPTIONS)))) == OPTIONS
    assert all(OPTIONS.by(how).how == how for how in HOW)


def test_runs_of_different_options_are_not_compared(finished: Path, tmp_path: Path) -> None:
    one, other = load(finished)[0], load(finished)[0]
    other.options = replace(OPTIONS, how="optimize", lr=0.5)
    with pytest.raises(ValueError, match="optimize: its run was asked for something else"):
        compare(tmp_path / LOSSES, {"eager": one, "optimize": other}, "")


# --- what the docs show ---


@pytest.mark.parametrize(("device", "picture"), [("amd-*", PICTURE), ("nvidia-h200", "training-loss-h200.svg")])
def test_the_pictures_in_the_docs_are_drawn_from_the_results(device: str, picture: str, tmp_path: Path) -> None:
    (results,) = (ROOT / "benchmarks" / "results").glob(f"{device}/{LOSSES}")
    draw(results, tmp_path / PICTURE)
    shown, drawn = (
        re.findall(r">([^<]+)</text>|<!-- (.+) -->", path.read_text(encoding="utf-8"))
        for path in (ROOT / "docs" / "images" / picture, tmp_path / PICTURE)
    )
    assert shown == drawn


def test_on_a_gpu_the_losses_in_the_docs_are_as_close_as_eagers_own() -> None:
    results = ROOT / "benchmarks" / "results" / "nvidia-h200" / LOSSES
    first, again, ours = (record["losses"] for record in json.loads(results.read_text()))
    apart = [sum(abs(a - b) for a, b in zip(run[100:], first[100:], strict=True)) for run in (again, ours)]
    assert apart[1] <= 1.1 * apart[0]


def test_the_losses_in_the_docs_are_as_close_as_torch_compiles() -> None:
    (results,) = (ROOT / "benchmarks" / "results").glob(f"amd-*/{LOSSES}")
    records = {record["variant"]: record for record in json.loads(results.read_text())}
    eager = records["eager"]["losses"]
    apart = {how: max(abs(a - b) for a, b in zip(r["losses"], eager, strict=True)) for how, r in records.items()}
    assert apart["burnish"] <= 2 * apart["compile"]
