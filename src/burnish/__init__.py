"""Burnish makes PyTorch transformers fast, step by step, and shows its work.

`optimize` is the one-line way, `explain` says where the time goes before; `ops`, `use` and `why_not` give every fused
Op with an explicit choice of implementation; `replace_pattern`, `explain_match`, `graph_report` and `draw` work on any
fx graph.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish import ops, pattern
    from burnish.bench import Benchmark, benchmark
    from burnish.graph.matcher import explain_match, find_matches
    from burnish.graph.rewriter import replace_pattern
    from burnish.graph.show import draw, graph_report
    from burnish.hardware import DeviceInfo, device
    from burnish.isolated import Isolated, isolate
    from burnish.likelihood import perplexity, perplexity_change
    from burnish.onnx import OnnxFile, to_onnx
    from burnish.op import use, why_not
    from burnish.optimizing import optimize
    from burnish.report import Report
    from burnish.report.explain import explain
    from burnish.rewrites import Rewrite
    from burnish.scheduling import Schedule, create_schedule, search_schedules

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: `import burnish` costs next to nothing beyond `import torch`.
_HOME = {
    "Benchmark": "bench",
    "DeviceInfo": "hardware",
    "Isolated": "isolated",
    "OnnxFile": "onnx",
    "Report": "report",
    "Rewrite": "rewrites",
    "Schedule": "scheduling",
    "benchmark": "bench",
    "create_schedule": "scheduling",
    "device": "hardware",
    "draw": "graph.show",
    "explain": "report.explain",
    "explain_match": "graph.matcher",
    "find_matches": "graph.matcher",
    "graph_report": "graph.show",
    "isolate": "isolated",
    "optimize": "optimizing",
    "perplexity": "likelihood",
    "perplexity_change": "likelihood",
    "replace_pattern": "graph.rewriter",
    "search_schedules": "scheduling",
    "to_onnx": "onnx",
    "use": "op",
    "why_not": "op",
}
_MODULES = ("ops", "pattern")

__all__ = [
    "Benchmark",
    "DeviceInfo",
    "Isolated",
    "OnnxFile",
    "Report",
    "Rewrite",
    "Schedule",
    "__version__",
    "benchmark",
    "create_schedule",
    "device",
    "draw",
    "explain",
    "explain_match",
    "find_matches",
    "graph_report",
    "isolate",
    "ops",
    "optimize",
    "pattern",
    "perplexity",
    "perplexity_change",
    "replace_pattern",
    "search_schedules",
    "to_onnx",
    "use",
    "why_not",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"burnish.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'burnish' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"burnish.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
