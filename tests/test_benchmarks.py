"""The benchmarks that ship: every Op has one, cases can be told apart, tables show losses as plainly as wins."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks import ops, serving, ship, startup
from benchmarks.parallel_child import FEW, few_configs
from benchmarks.runner import verdicts
from benchmarks.tables import group_tables, registry_table, renew
from burnish import tuning
from burnish.bench import RECORD_KEYS, save_records
from burnish.numerics import oracle
from burnish.op import OPS
from burnish.ops import linear
from burnish.sources import kernels_hash
from burnish.tuning_store import FORMAT


def record(case: str, variant: str, median_us: float | None, **more: object) -> dict[str, object]:
    measured = {"case": case, "variant": variant, "median_us": median_us, "p20_us": median_us, "p80_us": median_us}
    fixed = {"device": "Test CPU", "versions": {"torch": "2.13.0"}, "date": "2026-01-02T03:04:05+00:00", "command": "x"}
    return {**dict.fromkeys(RECORD_KEYS), **measured, **fixed, **more}


def test_every_op_has_a_benchmark() -> None:
    assert set(ops.BENCHED) == set(OPS)


def test_on_several_gpus_few_configs_are_tried() -> None:
    op, given = OPS["layer_norm"], ("triton", "torch")
    args = op.bind(torch.empty(4096, 768, dtype=torch.float16), None, None)
    assert len(tuning.candidates_of(op, args, given)) > FEW + 1
    with few_configs():
        assert Counter(impl for impl, _ in tuning.candidates_of(op, args, given).values()) == {
            "triton": FEW,
            "torch": 1,
        }


def test_case_names_are_unique() -> None:
    for group in (ops, serving, startup):
        names = [case.name for case in group.cases()]
        assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, size, id=f"{name} {size}") for name, (_, sizes) in ops.BENCHED.items() for size in sizes],
)
def test_the_peer_computes_what_the_op_does(name: str, size: str) -> None:
    op = OPS[name]
    peer, sizes = ops.BENCHED[name]
    bound = op.bind(*sizes[size](torch.float64))  # a backward pass gets what the forward pass found, in full
    truth = oracle(op.reference, *bound)
    # Both in float64, so that only a difference in meaning is left; judged in float32: their sums differ in order.
    found, expected = tree_map(Tensor.float, (oracle(peer, *bound), truth))
    assert verdicts({"peer": found}, expected, truth) == {"peer": None}


def test_verdicts_look_through_output_classes() -> None:
    x = torch.randn(4)
    found = verdicts({"list": [x], "tuple": (x,), "wrong": [x + 1]}, [x], [x.double()])
    assert found["list"] is None
    assert found["tuple"] is None
    assert "error is" in str(found["wrong"])


def test_tables_show_wins_and_losses_alike(tmp_path: Path) -> None:
    records = [record("win", "eager", 3000), record("win", "torch.compile", 2000), record("win", "burnish", 1000)]
    records += [record("loss", "eager", 3000), record("loss", "burnish", 4000)]
    save_records(tmp_path / "cpu" / "models.json", records)
    text = "\n".join(group_tables("models", None, tmp_path))
    assert "| win | 3 ms | 2 ms | 1 ms | 2.00x as fast | torch.compile |" in text
    assert "| loss | 3 ms |  | 4 ms | 0.75x as fast | eager |" in text
    assert "Test CPU; torch 2.13.0; 2026-01-02." in text
    assert "win" not in "\n".join(group_tables("models", "los*", tmp_path))


def test_memory_and_inaccurate_peers_are_said(tmp_path: Path) -> None:
    records = [record("memory", "eager", None, peak_mib=100.0), record("memory", "burnish", None, peak_mib=110.0)]
    records += [record("odd", "onnxruntime", 2000, inaccurate="off by one"), record("odd", "burnish", 1000)]
    save_records(tmp_path / "cpu" / "g.json", records)
    text = "\n".join(group_tables("g", None, tmp_path))
    assert "| memory | 100 MiB | 110 MiB |  | 1.10x the memory | eager |" in text
    assert "2 ms \\*" in text
    assert "\\* its numbers differ" in text


def test_memory_over_many_sizes_has_a_table_of_its_own(tmp_path: Path) -> None:
    records = [record("optimize", "burnish", 9e6), record("optimize", "compile-default", 18e6)]
    records += [record("host time", "burnish", 40)]
    records += [record("many", f"after {n} sizes", None, reserved_mib=n / 4) for n in (200, 1000)]
    save_records(tmp_path / "gpu" / "serving.json", records)
    lines = group_tables("serving", None, tmp_path)
    assert "| case | burnish | compile-default | burnish | against |" in lines
    assert "| optimize | 9 s | 18 s | 2.00x as fast | compile-default |" in lines
    assert "| host time | 40 us |  |  |  |" in lines
    alone = group_tables("serving", "many", tmp_path)
    assert not [line for line in alone if "burnish" in line]
    for table in (lines, alone):
        start = table.index("| memory reserved | after 200 sizes | after 1000 sizes |")
        assert table[start - 1] == ""
        assert table[start + 2 : start + 4] == ["| many | 50 MiB | 250 MiB |", ""]


def test_tables_of_kernels_count_them_beside_the_time(tmp_path: Path) -> None:
    records = [record("block", "burnish", 80.0, kernels=7, floor_us=40.0), record("block", "eager", 400.0, kernels=21)]
    records += [record("block d64", "eager", 300.0), record("other", "eager", 9.0, kernels=1)]
    save_records(tmp_path / "gpu" / "blocks.json", records)
    marked = "<!-- table: kernels blocks block* -->\nold\n<!-- end table -->"
    lines = renew(marked, tmp_path).splitlines()
    assert lines[2] == "| kernels, and their time | eager | burnish | floor / time |"
    assert lines[4:6] == ["| block | 21 in 400 us | 7 in 80 us | 50% |", "| block d64 | 300 us |  |  |"]
    assert "other" not in "\n".join(lines)


def test_op_tables_name_the_fastest_impl_and_its_floor(tmp_path: Path) -> None:
    times = {"eager": 30.0, "torch.compile": 20.0, "torch": 25.0, "onednn": 10.0}
    save_records(tmp_path / "cpu" / "ops.json", [record("linear", v, us, floor_us=5.0) for v, us in times.items()])
    text = "\n".join(group_tables("ops", None, tmp_path))
    assert "| linear | 30 us | 20 us | onednn | 10 us | 2.00x as fast | torch.compile | 50% |" in text


def test_markers_stay_and_only_what_is_between_changes(tmp_path: Path) -> None:
    text = "before\n<!-- table: models a* -->\nold\n<!-- end table -->\nafter\n"
    assert "No results recorded yet" in renew(text, tmp_path)
    save_records(tmp_path / "cpu" / "models.json", [record("abc", "burnish", 1000)])
    renewed = renew(text, tmp_path)
    assert renewed.startswith("before\n<!-- table: models a* -->\n")
    assert renewed.endswith("<!-- end table -->\nafter\n")
    assert "abc" in renewed
    assert "old" not in renewed
    assert renew(renewed, tmp_path) == renewed


def test_registry_table_has_every_op() -> None:
    text = "\n".join(registry_table())
    assert all(f"| `{name}(" in text for name in OPS)


def test_a_cache_becomes_the_table_of_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, of_older_kernels = f"linear|bf16|{kernels_hash(linear)}", "linear|bf16|0123456789ab"
    times = {f"triton {i}": 10.0 + i for i in range(9)} | {"torch": 99.0}
    in_model = {"triton 3": 500.0, "triton 0": 501.0}
    families = {family: {"1,2": times}, f"in model|{family}": {"1,2": in_model}, of_older_kernels: {"1,2": times}}
    cache = tmp_path / "tuning.json"
    cache.write_text(json.dumps({"format": FORMAT, "device": "NVIDIA H200 | sm_90 | 132 cores", "families": families}))
    monkeypatch.setattr(ship, "TABLES", tmp_path / "tables")
    ship.main([cache])
    table = json.loads((tmp_path / "tables" / "nvidia-h200.json").read_text())
    assert table["device"] == "NVIDIA H200"
    assert set(table["families"]) == {family, f"in model|{family}"}
    kept = table["families"][family]["1,2"]
    assert list(kept) == [f"triton {i}" for i in range(6)] + ["torch"]  # the fastest, and the best of each Impl
    assert list(table["families"][f"in model|{family}"]["1,2"]) == list(in_model)  # the winner first


def test_several_caches_become_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = f"linear|bf16|{kernels_hash(linear)}"
    caches = {"one": {"1,2": {"torch": 1.0}, "3,4": {"torch": 2.0}}, "two": {"3,4": {"torch": 3.0}}}
    paths = [tmp_path / name for name in caches]
    for path, entries in zip(paths, caches.values(), strict=True):
        data = {"format": FORMAT, "device": "NVIDIA H200 | sm_90", "families": {family: entries}}
        path.write_text(json.dumps(data))
    monkeypatch.setattr(ship, "TABLES", tmp_path / "tables")
    ship.main(paths)
    table = json.loads((tmp_path / "tables" / "nvidia-h200.json").read_text())
    assert table["families"] == {family: {"1,2": {"torch": 1.0}, "3,4": {"torch": 3.0}}}
    paths[0].write_text(paths[0].read_text().replace("H200", "L4"))
    with pytest.raises(SystemExit, match="of NVIDIA L4 and of NVIDIA H200; a table is for one device"):
        ship.main(paths)
