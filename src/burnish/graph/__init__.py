"""Match and rewrite any torch.fx graph. Knows nothing of Burnish's Ops.

`trace` makes a graph, `find_matches` and `explain_match` search it, `replace_pattern` changes it, `graph_report` and
`draw` show it.
"""

from burnish.graph.matcher import (
    Explanation,
    GraphIndex,
    Match,
    Matches,
    NearMiss,
    Pattern,
    explain_match,
    find_matches,
)
from burnish.graph.nested import Found, find_in_module
from burnish.graph.rewriter import erase, replace_pattern
from burnish.graph.show import GraphReport, draw, graph_report
from burnish.graph.trace import clean, trace

__all__ = [
    "Explanation",
    "Found",
    "GraphIndex",
    "GraphReport",
    "Match",
    "Matches",
    "NearMiss",
    "Pattern",
    "clean",
    "draw",
    "erase",
    "explain_match",
    "find_in_module",
    "find_matches",
    "graph_report",
    "replace_pattern",
    "trace",
]
