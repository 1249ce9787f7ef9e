"""`python -m benchmarks.tables`: regenerate the tables in README.md and docs/ from the results and the Op registry.

A table stands between `<!-- table: GROUP [CASE PATTERN] -->` and `<!-- end table -->`; GROUP is a benchmark group,
`predictions` or `registry`. `<!-- table: kernels GROUP [CASE PATTERN] -->` is the group's with the number of kernels
beside each time. `--check` changes nothing and fails where a table is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.runner import RESULTS
from burnish._files import write_text
from burnish._text import human_us
from burnish.bench import load_records

ROOT = Path(__file__).parent.parent
MARKED = re.compile(
    r"(?P<start><!-- table: (?P<counted>kernels )?(?P<group>[\w-]+)(?: (?P<pattern>[^\n]+?))? -->\n)"
    r".*?(?P<end><!-- end table -->)",
    re.DOTALL,
)
_PEERS = ("eager", "torch.compile")  # in group ops; the other variants there are Impls

Record = dict[str, Any]


def main(
    check: Annotated[bool, typer.Option(help="Only say which files are out of date, and fail if any is.")] = False,
    results: Annotated[Path, typer.Option(help="The folder with one folder per device.")] = RESULTS,
) -> None:
    """Regenerate the tables in README.md and docs/ from the result files and the Op registry."""
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        renewed = renew(text, results)
        if renewed != text:
            stale.append(page)
            if not check:
                write_text(page, renewed)
    for page in stale:
        print(f"{'out of date' if check else 'renewed'}: {page.relative_to(ROOT)}")
    if check and stale:
        print("run: make docs-tables", file=sys.stderr)
        raise typer.Exit(1)


def renew(text: str, results: Path) -> str:
    """`text` with each marked table made anew."""

    def table(match: re.Match[str]) -> str:
        if match["group"] == "registry":
            lines = registry_table()
        elif match["group"] == "predictions":
            lines = predictions_tables(results)
        else:
            lines = group_tables(match["group"], match["pattern"], results, counted=bool(match["counted"]))
        return "\n".join([match["start"].rstrip("\n"), *lines, match["end"]])

    return MARKED.sub(table, text)


def group_tables(group: str, pattern: str | None, results: Path, *, counted: bool = False) -> list[str]:
    """Per device that has results of this group one Markdown table, another for memory over many sizes, and under them
    how it was measured. `counted`: the times with how many kernels they are of."""
    lines: list[str] = []
    for path in sorted(results.glob(f"*/{group}.json")):
        records = [record for record in load_records(path) if fnmatchcase(record["case"], pattern or "*")]
        if not records:
            continue
        timed = [record for record in records if "reserved_mib" not in record]
        if timed:
            lines += ["", *(_kernel_table(timed) if counted else _device_table(timed))]
        if len(timed) < len(records):
            lines += ["", *_reserved_table([record for record in records if "reserved_mib" in record])]
        lines += ["", *_footer(records)]
    return [*lines, ""] if lines else ["", f"No results recorded yet: `python -m benchmarks {group}` writes them.", ""]


def registry_table() -> list[str]:
    """Every Op with its Impls in order of preference."""
    import burnish.ops  # noqa: F401  (registers the Ops)
    from burnish.op import OPS

    lines = ["", "| Op | what it computes | Impls, in order of preference |", "| --- | --- | --- |"]
    for name, op in sorted(OPS.items()):
        summary = (op.__doc__ or "").strip().split("\n")[0]
        signature = ", ".join(op.signature.parameters)
        lines.append(f"| `{name}({signature})` | {summary} | {', '.join(f'`{impl}`' for impl in op.impls)} |")
    return [*lines, ""]


def predictions_tables(results: Path) -> list[str]:
    """Per device what was predicted for it (`benchmarks.predictions`) beside what was measured there."""
    lines: list[str] = []
    for path in sorted(results.glob("*/predictions.json")):
        predictions = json.loads(path.read_text(encoding="utf-8"))
        files = [path.with_name(f"{group}.json") for group in predictions["groups"]]
        records = [record for file in files for record in load_records(file)]
        measured = {record["case"]: record for record in records if record["variant"] == "burnish"}
        lines += ["", *_rows(["case", "predicted", "measured", "off by", "kernels predicted", "launched"])]
        for case, predicted in predictions["cases"].items():
            record = measured[case]
            off = f"{predicted['us'] / record['median_us'] - 1:+.0%}"
            times = human_us(predicted["us"]), human_us(record["median_us"])
            lines += _rows([case, *times, off, str(predicted["kernels"]), str(record["kernels"])])[:1]
        lines += ["", f"Predicted on {predictions['date'][:10]} with torch {predictions['torch']}; measured:"]
        lines += _footer([measured[case] for case in predictions["cases"]])
    return [*lines, ""]


def _by_case(records: list[Record]) -> dict[str, dict[str, Record]]:
    """Each case's records by variant."""
    cases: dict[str, dict[str, Record]] = {}
    for record in records:
        cases.setdefault(record["case"], {})[record["variant"]] = record
    return cases


def _reserved_table(records: list[Record]) -> Iterator[str]:
    """Memory held on the device at several times: nobody wins or loses."""
    variants = list(dict.fromkeys(record["variant"] for record in records))
    yield from _rows(["memory reserved", *variants])
    for case, found in _by_case(records).items():
        yield from _rows([case, *(_measured(found.get(variant)) for variant in variants)])[:1]


def _device_table(records: list[Record]) -> Iterator[str]:
    cases = _by_case(records)
    variants = list(dict.fromkeys(record["variant"] for record in records if not record["variant"].startswith("impl ")))
    if "burnish" in variants:
        floors = any(record["floor_us"] for record in records)
        yield from _rows(["case", *variants, "burnish", "against", *(["floor / time"] if floors else [])])
        for case, found in cases.items():
            cells = [case, *(_measured(found.get(v)) for v in variants)]
            against = {name: record for name, record in found.items() if name in variants}
            share = [_floor(found["burnish"])] if floors and "burnish" in found else []
            yield from _rows([*cells, *_comparison(against, "burnish"), *share])[:1]
        return
    # Op by Op there is no variant called burnish: the fastest Impl stands for it, by its name.
    yield from _rows(["case", *_PEERS, "best Impl", "its time", "it is", "against", "floor / time"])
    for case, found in cases.items():
        impls = [name for name in found if name not in _PEERS]
        if impls:
            best = min(impls, key=lambda name: float(found[name]["median_us"]))
            against = {name: found[name] for name in (*_PEERS, best) if name in found}
            cells = [case, *(_measured(found.get(peer)) for peer in _PEERS), best, _measured(found[best])]
            yield from _rows([*cells, *_comparison(against, best), _floor(found[best])])[:1]


def _kernel_table(records: list[Record]) -> Iterator[str]:
    """How many kernels each variant launches and how long that takes: "9 in 104 us". Ours is the last."""
    cases = _by_case(records)
    variants = sorted(dict.fromkeys(record["variant"] for record in records), key=lambda variant: variant == "burnish")
    yield from _rows(["kernels, and their time", *variants, "floor / time"])
    for case, found in cases.items():
        cells = [_counted(found.get(variant)) for variant in variants]
        yield from _rows([case, *cells, _floor(found["burnish"]) if "burnish" in found else ""])[:1]


def _rows(cells: list[str]) -> list[str]:
    """The cells as a Markdown row, and the rule that makes it a heading: first column left, the others right."""
    row = "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return [row, "| --- |" + " ---: |" * (len(cells) - 1)]


def _measured(record: Record | None) -> str:
    """A time, a size, or nothing; a star where the variant's numbers broke the rule."""
    if record is None:
        return ""
    mib = record.get("peak_mib", record.get("reserved_mib"))
    text = human_us(record["median_us"]) if mib is None else f"{mib:.0f} MiB"
    return f"{text} \\*" if record.get("inaccurate") else text


def _counted(record: Record | None) -> str:
    count = None if record is None else record["kernels"]
    return _measured(record) if count is None else f"{count} in {_measured(record)}"


def _comparison(found: dict[str, Record], ours: str) -> list[str]:
    """Ours against the best of the others: wins and losses in the same words."""
    own = f"{ours}-"  # without CUDA graphs, with checkpoints
    others = {name: record for name, record in found.items() if name != ours and not name.startswith(own)}
    if ours not in found or not others:
        return ["", ""]
    key = "peak_mib" if "peak_mib" in found[ours] else "median_us"
    best = min(others, key=lambda name: float(others[name][key]))
    ratio = others[best][key] / found[ours][key]
    return [f"{1 / ratio:.2f}x the memory" if key == "peak_mib" else f"{ratio:.2f}x as fast", best]


def _floor(record: Record) -> str:
    """How near to the device's own limit a time is."""
    return "" if record["floor_us"] is None else f"{record['floor_us'] / record['median_us']:.0%}"


def _footer(records: list[Record]) -> Iterator[str]:
    devices = ", ".join(dict.fromkeys(record["device"] for record in records))
    dates = sorted(record["date"][:10] for record in records)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    versions = records[-1]["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "triton") if name in versions)
    yield f"{devices}; {libraries}; {when}. Medians; ratios are of medians in one run."
    if any(record.get("inaccurate") for record in records):
        yield ""
        yield "\\* its numbers differ from eager's by more than the numerics rule allows."


if __name__ == "__main__":
    typer.run(main)
