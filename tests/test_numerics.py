"""The one rule: what passes, what does not, and what the reason says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from burnish.numerics import assert_close, check, oracle, randn

HALF = [torch.float16, torch.bfloat16]


def test_oracle_computes_in_float64_and_leaves_integers_alone() -> None:
    seen: list[torch.dtype] = []

    def fn(pair: tuple[Tensor, Tensor], *, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.extend(t.dtype for t in (*pair, extra["index"]))
        return {"sum": pair[0] + pair[1], "index": extra["index"]}

    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    result = oracle(fn, (x, x), extra={"index": torch.arange(3)})
    assert seen == [torch.float64, torch.float64, torch.int64]
    assert result["sum"].dtype == torch.float64
    assert not result["sum"].requires_grad
    assert result["index"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_eager_passes_against_itself(dtype: torch.dtype) -> None:
    x, w = randn(33, 64, dtype=dtype), randn(16, 64, dtype=dtype, seed=1)
    verdict = check(F.linear(x, w), F.linear(x, w), oracle(F.linear, x, w))
    assert verdict.ok
    assert 0 < verdict.error <= verdict.eager_error
    assert verdict.allowed > verdict.error
    assert verdict.reason is None


@pytest.mark.parametrize("dtype", HALF)
def test_two_times_eager_and_a_rounding_step_is_the_limit(dtype: torch.dtype) -> None:
    truth = torch.full((100,), 1.0, dtype=torch.float64)
    step = torch.finfo(dtype).eps
    eager = (truth + step).to(dtype)
    assert check((truth + 3 * step).to(dtype), eager, truth).ok
    verdict = check((truth + 4 * step).to(dtype), eager, truth)
    assert not verdict.ok
    assert verdict.error == pytest.approx(4 * step)
    assert verdict.allowed == pytest.approx(3 * step)


def test_eagers_luck_on_an_outlier_fails_nobody() -> None:
    x = randn(128, 64)
    x[0, 0] = 1000
    truth = x.double() * (1 + 3e-7)
    eager = (x.double() * (1 + 1e-6)).float()
    eager[0, 0] = truth[0, 0].float()
    assert check(x, eager, truth).ok


def test_lower_precision_never_passes_for_float32() -> None:
    x, w = randn(64, 384), randn(64, 384, seed=1)
    eager, truth = F.linear(x, w), oracle(F.linear, x, w)
    assert not check(F.linear(x.bfloat16(), w.bfloat16()).float(), eager, truth).ok


@pytest.mark.parametrize(("right", "wrong"), [(F.gelu, F.relu), (F.silu, F.gelu)])
@pytest.mark.parametrize("dtype", HALF)
def test_an_outlier_does_not_hide_a_wrong_operator(right: object, wrong: object, dtype: torch.dtype) -> None:
    assert callable(right)
    assert callable(wrong)
    x = randn(128, 64, dtype=dtype)
    x[0, 0] = 1000  # one rounding step of this is larger than the operators' difference
    verdict = check(wrong(x), right(x), oracle(right, x))
    assert not verdict.ok
    assert verdict.reason is not None
    assert "the mean error" in verdict.reason


def test_exact_and_tanh_gelu_are_told_apart_in_float32() -> None:
    x = randn(64, 64)
    assert not check(F.gelu(x, approximate="tanh"), F.gelu(x), oracle(F.gelu, x)).ok


@pytest.mark.parametrize("nan_in", ["result", "all"])
def test_nan_never_passes(nan_in: str) -> None:
    x = torch.ones(4)
    bad = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    eager, truth = (bad, bad.double()) if nan_in == "all" else (x, x.double())
    verdict = check(bad, eager, truth)
    assert not verdict.ok
    assert verdict.reason == "1 of 4 values of the result are NaN"


@pytest.mark.parametrize(
    ("result", "ok"),
    [([1.0, float("inf")], True), ([1.0, -float("inf")], False), ([1.0, 3e38], False), ([float("inf")] * 2, False)],
)
def test_infinities_must_be_the_oracles(result: list[float], ok: bool) -> None:
    truth = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    assert check(torch.tensor(result), truth.float(), truth).ok is ok


def test_what_overflows_the_dtype_is_infinite_in_it() -> None:
    truth = torch.tensor([1.0, 1e6], dtype=torch.float64)
    assert check(truth.half(), truth.half(), truth).ok
    assert not check(torch.tensor([5.0, float("inf")]).half(), truth.half(), truth).ok


def test_overflow_of_eager_excuses_nothing() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    eager = torch.tensor([1.0, float("inf"), float("nan")])
    assert check(torch.ones(3), eager, truth).ok
    assert not check(torch.full((3,), 1.5), eager, truth).ok
    nothing_finite = torch.full((3,), float("inf"))
    assert check(torch.ones(3), nothing_finite, truth).ok
    assert not check(torch.full((3,), 1.5), nothing_finite, truth).ok


def test_integers_must_be_equal() -> None:
    a = torch.arange(4)
    assert check(a, a.clone(), a).ok
    verdict = check(a + 1, a, a)
    assert verdict.reason == "4 of 4 values differ from eager"


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (torch.ones(3), "the shape is (3,)"),
        (torch.ones(2, dtype=torch.float16), "the dtype is torch.float16"),
        ((torch.ones(2),), "the structure is"),
        ("a string", "'a string'|a str"),
    ],
)
def test_shape_dtype_and_structure_must_agree(result: object, says: str) -> None:
    eager = torch.ones(2)
    verdict = check(result, eager, eager.double())
    assert not verdict.ok
    assert verdict.reason is not None
    assert any(part in verdict.reason for part in says.split("|"))
    assert "\n" not in verdict.reason


def test_nested_results_name_the_wrong_one() -> None:
    good, bad = torch.ones(2), torch.zeros(2)
    eager = {"a": good, "b": [good, 3]}
    truth = {"a": good.double(), "b": [good.double(), 3]}
    assert check({"a": good, "b": [good, 3]}, eager, truth).ok
    with pytest.raises(AssertionError, match=r"result 1 of 3: the largest error is 1"):
        assert_close({"a": good, "b": [bad, 3]}, eager, truth)
    with pytest.raises(AssertionError, match="result 2 of 3: 4 where eager has 3"):
        assert_close({"a": good, "b": [good, 4]}, eager, truth)


def test_empty_results_pass() -> None:
    assert check(torch.ones(0, 3), torch.ones(0, 3), torch.ones(0, 3).double()).ok


@given(st.integers(0, 1000), st.sampled_from([torch.float32, *HALF]), st.floats(1e-3, 1e3))
def test_scaling_everything_changes_no_verdict(seed: int, dtype: torch.dtype, scale: float) -> None:
    power = 2.0 ** round(torch.log2(torch.tensor(scale)).item() / 2)  # exact in every dtype
    truth = randn(50, dtype=torch.float64, seed=seed)
    eager = truth.to(dtype)
    result = eager + eager * torch.finfo(dtype).eps * 2
    scaled = check(result * power, eager * power, truth * power)
    assert scaled.ok == check(result, eager, truth).ok


def test_randn_has_outliers_and_is_reproducible() -> None:
    x = randn(100, 100, seed=3)
    assert torch.equal(x, randn(100, 100, seed=3))
    assert not torch.equal(x, randn(100, 100, seed=4))
    assert 8 < x.abs().max() < 150
    assert x.median().abs() < 0.1
    assert randn(100, 100, outliers=0).abs().max() < 6
    assert randn(4, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert randn(0, 3).shape == (0, 3)


def test_a_number_of_lower_precision_than_its_dtype() -> None:
    """Under autocast a loss is float32, and eager may be right by chance."""
    true, eager, near, wrong = (torch.tensor(value) for value in (6.25, 6.25001, 6.26, 6.4))
    assert not check(near, eager, true.double()).ok
    assert check(near, eager, true.double(), torch.bfloat16).ok
    assert not check(wrong, eager, true.double(), torch.bfloat16).ok
    assert not check(near, eager, true.double(), torch.float64).ok
    many = [value.expand(1000) for value in (near, eager, true.double())]
    assert not check(*many, torch.bfloat16).ok, "of many numbers eager's errors are no luck"
