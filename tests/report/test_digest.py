"""What every form says: sums that add up, costs and rewrites in order, names that a column can hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from burnish.report import digest
from burnish.report.data import Opportunity
from tests.report.explanations import gpt2, with_graph


@pytest.mark.parametrize("after", [False, True])
def test_lines_add_up_to_the_call(after: bool) -> None:
    *lines, whole = digest.lines(gpt2(after))
    assert whole.name == digest.END_TO_END
    assert sum(line.before.us for line in lines) == pytest.approx(whole.before.us) == pytest.approx(4620.0)
    assert sum(line.before.floor_us for line in lines) == pytest.approx(whole.before.floor_us)
    assert sum(line.before.launches for line in lines) == whole.before.launches
    assert (whole.after is not None) == after
    if whole.after:
        assert sum(line.after.us for line in lines if line.after) == pytest.approx(whole.after.us)
        assert whole.speedup == pytest.approx(4620 / 371)
        assert lines[-1].name == digest.UNATTRIBUTED
        assert lines[-1].speedup is None, "it is no work that could be done faster"


def test_a_block_of_one_version_only_has_a_line() -> None:
    found = gpt2()
    assert found.after is not None
    renamed = replace(found.after, blocks=(replace(found.after.blocks[0], path="fused"), *found.after.blocks[1:]))
    lines = {line.block.path: line for line in digest.lines(replace(found, after=renamed)) if line.block}
    assert lines["fused"].before.us == 0.0
    assert lines["fused"].speedup is None
    assert lines["transformer"].shown.us == 0.0
    assert lines["transformer"].before.us > 0


def test_parts_are_submodules_costliest_first_and_add_up() -> None:
    profile = gpt2(after=False).before
    parts = digest.parts(profile)
    assert [part.name for part in parts[:3]] == [
        digest.UNATTRIBUTED,
        "transformer.h.*.mlp.act",
        "transformer.h.*.mlp.c_proj",
    ]
    assert parts[1].ops == ("4 mul", "pow", "2 add", "tanh")
    assert parts[1].us == pytest.approx(12 * sum(row.shown_us for row in parts[1].rows))
    assert sum(part.us for part in parts) == pytest.approx(profile.end_to_end_us)


def test_rewrites_go_by_what_was_measured_and_blocked_ones_apart() -> None:
    def rewrite(name: str, saves: float, measured: float | None = None, blocked: str = "") -> Opportunity:
        got = None if measured is None else 10 - measured
        return Opportunity(name, "burnish.x", "h.*", 2, (name,), 10.0, 10 - saves, got, blocked)

    rewrites = [
        rewrite("a", 3),
        rewrite("b", 9, measured=1),
        rewrite("c", 2, measured=4),
        rewrite("d", 5, blocked="no"),
    ]
    assert [each.rewrite for each in digest.possible(rewrites)] == ["c", "a", "b"]
    assert [each.rewrite for each in digest.blocked(rewrites)] == ["d"]
    assert digest.together_us(rewrites) == pytest.approx(2 * (4 + 3 + 1))
    overlapping = replace(rewrites[0], nodes=("c", "other"))
    assert digest.together_us([overlapping, *rewrites[1:]]) == pytest.approx(2 * (4 + 1))


def test_a_rewrite_is_where_its_time_is() -> None:
    explanation = gpt2()
    where = [where for each, where in digest.places(explanation).items() if not each.blocked_by]
    assert where == [
        "transformer.h.*: attn.c_proj, ln_2",
        "transformer.h.*.mlp: c_fc, act",
        "transformer.h.*.attn",
        "transformer.h.*.mlp.c_proj",
    ]
    assert digest._together(["a.b.c", "a.b", "a.b.d"], "a") == "a.b: c, d"
    assert digest._together(["a", "b", "c", "d", "e"], "") == "a, b, c, and 2 more"
    assert digest._together([], "a") == "a"


def test_long_calls_are_told_in_milliseconds() -> None:
    explanation = gpt2()
    unit = digest.unit_of(explanation)
    assert (unit.name, unit(1234.56), unit(0.126, 1)) == ("us", "1,234.6", "0.13")
    slow = digest.unit_of(replace(explanation, before=replace(explanation.before, end_to_end_us=2e5)))
    assert (slow.name, slow(1_234_567.0), slow(126.0, 1)) == ("ms", "1,234.57", "0.126")


def test_what_a_rewrite_makes_of_one_op_of_its_kind() -> None:
    found = gpt2(after=False)
    head = Opportunity("linear: nn.Linear", "burnish.linear", "lm_head", 1, ("linear",), 29.4, 25.0)
    other = Opportunity("linear: Conv1D", "burnish.linear", "transformer.h.*", 12, ("addmm",), 5.4, 4.0)
    found = replace(with_graph(found), opportunities=(head, other, *with_graph(found).opportunities))
    made = list(digest.makes(found).values())
    assert made[:2] == ["linear, by a faster kernel"] * 2
    assert made[2:5] == ["one launch", "linear_add_layer_norm", "linear"]


def test_what_stays_is_not_less_than_the_ops_that_are_made() -> None:
    found = with_graph(gpt2(after=False))
    assert digest.left_us(found) == pytest.approx(4620 - 3867.1 - 418.8)
    made_us = sum(each.after_us * each.count for each in digest.counted_once(found.opportunities))
    short = replace(found, before=replace(found.before, end_to_end_us=1.0))
    assert digest.left_us(short) == pytest.approx(made_us)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half>(int)",
            "vectorized_layer_norm_kernel",
        ),
        ("nvjet_hsh_64x32_v_bz_TNN", "nvjet_hsh_64x32_v_bz_TNN"),
        ("aten::addmm", "addmm"),
        ("<lambda>", "<lambda>"),
    ],
)
def test_kernel_names(name: str, short: str) -> None:
    assert digest.kernel_name(name) == short


def test_short_names() -> None:
    assert digest.op_name("burnish.linear") == "linear"
    assert digest.short_shape("bfloat16[1, 128]") == "bf16[1,128]"
    assert digest.short_shape("int64[]") == "i64[]"
    assert digest.short_shape("(float32[2], bool[1])") == "(f32[2],bool[1])"
    assert [digest.percent(part, 1000) for part in (0.5, 42, 99.4, 99.6, 870)] == ["0.1%", "4.2%", "9.9%", "10%", "87%"]
    assert digest.percent(1, 0) == ""


def test_large_blocks() -> None:
    profile = gpt2(after=False).before
    large, rest = digest.large_blocks(profile)
    assert [block.path for block in large] == ["transformer.h.*", "lm_head"]
    assert {block.path for block in rest} == {"transformer", "transformer.ln_f"}
    # Where every block is small there is still something to show.
    many = replace(profile, blocks=tuple(replace(profile.blocks[2], path=f"ln.{i}") for i in range(99)))
    assert [len(blocks) for blocks in digest.large_blocks(many)] == [1, 98]
