"""`to_onnx`: what is in the file, and that ONNX Runtime computes from it what the module does, at other sizes too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import burnish
from burnish.numerics import assert_close
from burnish.onnx import OnnxError, OnnxFile, write
from tests import zoo

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0


def llama(layers: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=layers, eos_token_id=None))
    return zoo.seeded(model)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


# --- an encoder -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> BertModel:
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    return zoo.seeded(BertModel(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def bert_file(bert: BertModel, folder: Path) -> OnnxFile:
    return burnish.to_onnx(bert, (IDS,), folder / "bert.onnx", {"attention_mask": MASK})


def test_what_an_encoder_is_made_of(bert_file: OnnxFile) -> None:
    assert bert_file.functions == {"linear": 5, "add_layer_norm": 2, "embedding_layer_norm": 1, "attention": 1}
    assert bert_file.inputs == {"input_ids": "int64[batch, sequence]", "attention_mask": "int64[batch, sequence]"}
    assert bert_file.outputs == {
        "last_hidden_state": "float32[batch, sequence, 32]",
        "pooler_output": "float32[batch, 32]",
    }
    assert [checked.sizes for checked in bert_file.checked] == [
        {"batch": 2, "sequence": 9},
        {"batch": 1, "sequence": 6},
    ]
    assert bert_file.nodes == len(onnx.load(bert_file.path).graph.node)
    assert "9 x" not in str(bert_file)
    assert "batch 1, sequence 6: error" in str(bert_file)


def test_a_file_is_valid_onnx_with_bodies_in_standard_operators(bert_file: OnnxFile) -> None:
    onnx.checker.check_model(bert_file.path, full_check=True)
    model = onnx.load(bert_file.path)
    assert {node.domain for function in model.functions for node in function.node} == {""}
    assert {function.domain for function in model.functions} == {"burnish"}
    call = next(node for node in model.graph.node if node.op_type == "attention")
    assert call.name == "encoder.layer.0.attention.self/attention"
    assert {attribute.name for attribute in call.attribute} == {"is_causal", "scale"}
    assert not any("site-packages" in str(node) for node in model.graph.node)  # no paths of this machine


def test_weights_keep_their_names_and_are_stored_as_they_are_read(bert: BertModel, bert_file: OnnxFile) -> None:
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(bert_file.path).graph.initializer}
    layer = bert.encoder.layer[0].attention.self
    joined = torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]).detach()
    merged = stored["encoder.layer.0.attention.self.query+key+value.weight"]
    assert np.array_equal(merged, joined.numpy())
    assert "encoder.layer.0.attention.self.query.weight" not in stored
    assert set(stored) & set(bert.state_dict()) > {"embeddings.word_embeddings.weight", "pooler.dense.bias"}


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 31)])
def test_onnx_runtime_at_other_sizes(bert: BertModel, bert_file: OnnxFile, batch: int, length: int) -> None:
    ids = torch.randint(3, 100, (batch, length))
    mask = (torch.arange(length) < torch.linspace(1, length, batch)[:, None]).long()
    session = onnxruntime.InferenceSession(bert_file.path)
    found = session.run(["last_hidden_state"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        eager = bert(ids, attention_mask=mask).last_hidden_state
        exact = copy.deepcopy(bert).double()(ids, attention_mask=mask).last_hidden_state
    assert_close(torch.from_numpy(found), eager, exact)


# --- a decode step, at opset 23: docs/onnx.md has one in the fast tests -----------------------------------------------


@pytest.fixture(scope="module")
def step(folder: Path) -> tuple[LlamaForCausalLM, OnnxFile]:
    model = llama(1)
    return model, burnish.to_onnx(model, (IDS,), folder / "step.onnx", decode=True, opset=23)


@pytest.mark.slow
def test_a_decode_step(step: tuple[LlamaForCausalLM, OnnxFile]) -> None:
    _, file = step
    assert file.inputs == {
        "input_ids": "int64[batch, sequence]",
        "attention_mask": "int64[batch, past_sequence + sequence]",
        "past_key_values.0.key": "float32[batch, 2, past_sequence, 8]",
        "past_key_values.0.value": "float32[batch, 2, past_sequence, 8]",
    }
    assert file.outputs == {
        "logits": "float32[batch, sequence, 100]",
        "present.0.key": "float32[batch, 2, past_sequence + sequence, 8]",
        "present.0.value": "float32[batch, 2, past_sequence + sequence, 8]",
    }
    checked = [tuple(each.sizes.values()) for each in file.checked]
    assert checked == [(2, 2, 7), (1, 5, 4), (2, 1, 7), (2, 2, 0)]  # batch, new tokens, past


@pytest.mark.slow
def test_opset_23_has_operators_of_its_own(step: tuple[LlamaForCausalLM, OnnxFile]) -> None:
    found = step[1].in_functions
    own = {"Attention": 1, "RMSNormalization": 3, "RotaryEmbedding": 2}
    assert {name: found[name] for name in own} == own
    assert "Softmax" not in found


@pytest.mark.slow
def test_generation_by_onnx_runtime(step: tuple[LlamaForCausalLM, OnnxFile]) -> None:
    """The prompt, padded on the left, and then a token at a time: Hugging Face's own tokens."""
    model, file = step
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    session = onnxruntime.InferenceSession(file.path)
    past = {name: np.zeros((2, 2, 0, 8), np.float32) for name in file.inputs if name.startswith("past")}
    tokens, seen, new = ids.numpy(), mask.numpy(), ids.numpy()
    for _ in range(6):
        logits, *present = session.run(None, {"input_ids": new, "attention_mask": seen, **past})
        past = dict(zip(past, present, strict=True))
        new = logits[:, -1:].argmax(-1)
        tokens, seen = np.concatenate([tokens, new], 1), np.concatenate([seen, np.ones_like(new)], 1)
    assert tokens.tolist() == expected.tolist()


# --- what is caught ---------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Several outputs of several kinds; one is an input, and one comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.RMSNorm(16, eps=0.1)

    def forward(self, x: Tensor, flag: bool = False) -> dict[str, Any]:
        linear = self.first(x).tanh()  # as a value within the graph may be called, too
        normed = self.norm(linear)
        return {"linear": normed, "again": [normed, None, 3], "x": x, "positive": normed > 0}


def test_outputs_of_every_kind_and_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    file = burnish.to_onnx(Normed().eval(), (torch.randn(1, 3, 16),), tmp_path / "m.onnx", external_data=True)
    assert file.outputs == {
        "linear": "float32[batch, sequence, 16]",
        "again.0": "float32[batch, sequence, 16]",
        "output.x": "float32[batch, sequence, 16]",
        "positive": "bool[batch, sequence, 16]",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert file.data
    assert file.data == tmp_path / "m.onnx.data"
    assert file.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert file.data.stat().st_size >= 16 * 16 * 4
    assert all(0 < checked.error <= checked.allowed for checked in file.checked)
    onnxruntime.InferenceSession(file.path)


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (16,), weight, 2 * eps)

    monkeypatch.setattr("burnish.onnx.convert.KNOWN", {})
    monkeypatch.setattr("burnish.onnx.bodies._rms_norm_by_quotient", wrong)
    monkeypatch.setattr(write, "_ONE_FILE", 100)
    with pytest.raises(
        OnnxError, match=r"at batch 2, sequence 3 ONNX Runtime's 'linear' .*Op that differs is rms_norm of norm"
    ):
        burnish.to_onnx(Normed().eval(), (torch.randn(2, 3, 16),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"opset": 17}, r"opset=17: it must be from 18 to 23"),
        ({"path": "nowhere/m.onnx"}, r"path='nowhere/m.onnx': there is no folder"),
        ({"submodule": "second"}, r"path='second': this is a Normed, which has first, norm"),
        ({"decode": True}, r"decode=True: Normed is no Hugging Face model"),
        ({"decode": True, "submodule": "norm"}, r"leave out submodule"),
        ({"args": [torch.randn(2, 3, 16)]}, r"args: a tuple of inputs is needed, not list"),
        ({"model": Normed()}, r"training mode, where dropout is active; call model.eval\(\)"),
        ({"model": torch.relu}, r"model: an nn.Module is needed, not builtin_function_or_method"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"model": Normed().eval(), "args": (torch.randn(2, 3, 16),), "path": tmp_path / "m.onnx"}
    with pytest.raises((ValueError, TypeError), match=message):
        burnish.to_onnx(**{**good, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_decode_step_needs_a_past(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input_ids of \(batch, length\) are needed, more than 2 tokens long"):
        burnish.to_onnx(llama(1), (IDS[:, :2],), tmp_path / "m.onnx", decode=True)


@pytest.mark.slow
def test_a_decode_step_of_a_model_without_keys(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ValueError, match="MambaForCausalLM keeps other things than keys and values: no such cache"):
        burnish.to_onnx(model, (IDS,), tmp_path / "m.onnx", decode=True)


def test_random_numbers_are_refused(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(3)

    with pytest.raises(OnnxError, match="rand draws random numbers"):
        burnish.to_onnx(Noisy().eval(), (torch.randn(2, 3),), tmp_path / "m.onnx")


def test_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(OnnxError, match=r"not installed: onnxscript; pip install 'burnish\[onnx\]'"):
        burnish.to_onnx(Normed().eval(), (torch.randn(2, 3, 16),), tmp_path / "m.onnx")


# --- more models ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("case", zoo.params())
def test_the_zoo(case: zoo.Case, opset: int, tmp_path: Path) -> None:
    file = burnish.to_onnx(
        case.build(), (), tmp_path / "m.onnx", case.inputs(*case.shapes[0], torch.float32), opset=opset
    )
    total = case.total()
    assert file.functions.get("attention", 0) == total["attention"]
    for norm in ("layer_norm", "rms_norm"):  # alone, or as the end of an Op that does more
        assert sum(calls for name, calls in file.functions.items() if name.endswith(norm)) == total[norm]
    assert file.functions.get("gated_mlp", 0) == total["gated_mlp"]
    assert file.in_functions.get("Attention", 0) == (total["attention"] if opset == 23 else 0)
    assert len(file.checked) == 2


@pytest.mark.slow
def test_two_layers_of_a_llama(tmp_path: Path) -> None:
    file = burnish.to_onnx(llama(2), (IDS,), tmp_path / "m.onnx", {"attention_mask": MASK, "use_cache": False})
    assert file.functions == {
        "linear": 5,
        "add_rms_norm": 4,
        "rope_qk": 2,
        "attention": 2,
        "gated_mlp": 2,
        "rope_tables": 1,
        "rms_norm": 1,
    }


@pytest.mark.slow
def test_a_gated_mlp_cut_out_of_a_llama(tmp_path: Path) -> None:
    file = burnish.to_onnx(llama(2), (IDS,), tmp_path / "mlp.onnx", submodule="model.layers.1.mlp")
    assert (file.functions, file.operators) == ({"gated_mlp": 1}, {})
    assert file.inputs == {"x": "float32[batch, sequence, 32]"}


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_without_functions(opset: int, tmp_path: Path) -> None:
    """At opset 23 torch's own fusions would write a rotation that serves a single batch size."""
    inputs = {"attention_mask": MASK, "use_cache": False}
    file = burnish.to_onnx(llama(2), (IDS,), tmp_path / "m.onnx", inputs, fused=False, opset=opset)
    assert file.functions == {}
    assert file.operators["MatMul"] > 10
    assert not onnx.load(file.path).functions


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    file = burnish.to_onnx(llama(1).half(), (IDS,), tmp_path / "m.onnx", {"use_cache": False})
    assert file.outputs == {"logits": "float16[batch, sequence, 100]"}
    with pytest.raises(OnnxError, match=r"ONNX Runtime .* refuses b.onnx: .*; check=False writes the file"):
        burnish.to_onnx(llama(1).bfloat16(), (IDS,), tmp_path / "b.onnx", {"use_cache": False})
    assert not (tmp_path / "b.onnx").exists()
    unchecked = burnish.to_onnx(llama(1).bfloat16(), (IDS,), tmp_path / "b.onnx", {"use_cache": False}, check=False)
    assert unchecked.checked == ()


@pytest.mark.slow
def test_what_has_no_form_in_onnx(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(OnnxError, match=r"torch's exporter has no form for a part of it: .*bessel_j0"):
        burnish.to_onnx(Bessel().eval(), (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
