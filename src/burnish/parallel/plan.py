"""Which layers of a model are divided, and how: the model's own plan, or what its layers' names say.

Plans are Hugging Face's: module paths with `*` for the numbers of layers, and a style for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from burnish.parallel.layers import features_of, is_linear

Plan = Mapping[str, str]

STYLES = {
    "colwise": "output features are divided",
    "colwise_qkv": "the same of queries, keys and values in one, one behind the other: each by itself",
    "colwise_gather_output": "output features are divided, and the result is put together again",
    "rowwise": "input features are divided, and the result is summed",
    "rowwise_split_input": "the same, of an input that is whole",
    "embedding_rowwise": "the vocabulary is divided, and the result is summed",
    "replicated_with_grad_allreduce": "whole on each rank, for parts of its own: the gradients are summed",
    "replicate": "whole on each rank",
}
_OLDER_NAMES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}

# Columns, then rows, by the names that the families have: Llama and most others, GPT-2, GPT-J, BERT, ViT, DistilBERT,
# T5, OPT and Whisper, GPT-NeoX, and Meta's own.
_COLUMNS = re.compile(
    r"(^|\.)([qkv]_proj|[qkv]_lin|w[qkv]|(self|attention)\.(query|key|value)|c_attn|qkv|Wqkv"
    r"|gate_proj|up_proj|c_fc|fc1|fc_in|lin1|wi|wi_[01]|w1|w3|intermediate\.dense|dense_h_to_4h)$"
)
_ROWS = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|out_lin|wo|attention\.output\.dense|attention\.dense"
    r"|down_proj|fc2|fc_out|lin2|w2|output\.dense|dense_4h_to_h)$"
)
_QUERIES_KEYS_VALUES = re.compile(r"(^|\.)(c_attn|qkv|Wqkv)$")  # one behind the other, wherever these names stand


def plan_of(model: nn.Module) -> dict[str, str]:
    """The model's own plan; where it has none for the layers, what their names say. ValueError where neither says
    anything."""
    own: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    if any(style.startswith("rowwise") for style in own.values()):
        return own
    if plan := _inferred(model) | own:
        return plan
    raise ValueError(
        f"plan: {type(model).__name__} has none, and none of its layers has a name that says how to divide it; give "
        "one, such as {'layers.*.fc1': 'colwise', 'layers.*.fc2': 'rowwise'}"
    )


def styles_of(model: nn.Module, plan: Plan) -> dict[str, str]:
    """The style of each module that the plan names, by path. ValueError for unknown styles, and patterns that match
    nothing."""
    found: dict[str, str] = {}
    matched = set()
    for path, _ in model.named_modules(remove_duplicate=False):
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)
        if (key := pattern if pattern in plan else path) in plan:
            matched.add(key)
            found[path] = _OLDER_NAMES.get(plan[key], plan[key])
    for path, style in found.items():
        if style not in STYLES:
            raise ValueError(f"plan: {path} is to be {style!r}; there are: {', '.join(STYLES)}")
    if not matched:
        raise ValueError(f"plan: no module has the name {next(iter(plan), '')!r}, or another of the plan's")
    return found


def merged_parts(path: str, column: nn.Module, styles: Mapping[str, str], model: nn.Module) -> tuple[int, ...]:
    """The sizes of queries, keys and values in the output of one layer for all three, one behind the other."""
    scope = path.rpartition(".")[0]
    outputs, _ = features_of(column)
    for other, style in styles.items():
        if style.startswith("rowwise") and other.rpartition(".")[0] == scope:
            _, queries = features_of(model.get_submodule(other))
            keys = (outputs - queries) // 2
            return (queries, keys, keys)
    raise ValueError(f"plan: {path} has queries, keys and values in one, but nothing beside it takes the heads")


def _inferred(model: nn.Module) -> dict[str, str]:
    """Columns and rows by name, where a layer of the model has both."""
    columns, rows = (
        [path for path, module in model.named_modules() if is_linear(module) and names.search(path)]
        for names in (_COLUMNS, _ROWS)
    )
    scopes = {_scope(path) for path in columns} & {_scope(path) for path in rows}
    plan = {path: "rowwise" for path in rows if _scope(path) in scopes}
    for path in columns:
        if _scope(path) in scopes:
            plan[path] = "colwise_qkv" if _QUERIES_KEYS_VALUES.search(path) else "colwise"
    return plan


def _scope(path: str) -> str:
    """The layer that a module is in: its path up to the last number."""
    numbered: Any = re.match(r"(.*(?:^|\.)\d+)(?:\.|$)", path)
    return numbered.group(1) if numbered else ""
