"""`tensor_parallel(model, mesh)`: each rank keeps, and computes, its part of every layer that the plan divides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from burnish.parallel.group import Mesh, group_of, rank_and_size
from burnish.parallel.heads import heads_of
from burnish.parallel.layers import (
    axes_of,
    become_column_parallel,
    become_row_parallel,
    become_vocab_parallel,
    is_linear,
)
from burnish.parallel.plan import Plan, merged_parts, plan_of, styles_of
from burnish.parallel.sequence import divide_sequences, stack_of
from burnish.parallel.shard import Shard, shard_of, shard_parameter, sum_gradients


@dataclass
class _Division:
    """What is to be done to one module.

    Attributes:
        cuts: how each of its parameters is cut, by name.
        summed: the parameters whose gradients are summed.
        change: what makes a parallel layer of it then.
    """

    path: str
    module: nn.Module
    cuts: dict[str, Shard] = field(default_factory=dict)
    summed: tuple[str, ...] = ()
    change: Callable[[nn.Module], None] | None = None


def tensor_parallel(
    model: nn.Module, mesh: Mesh = None, plan: Plan | None = None, *, sequence_parallel: bool = False
) -> nn.Module:
    """Divides `model` among the ranks of `mesh`, in place: what it computes stays the same, on every rank.

    Parameters become this rank's slices under their old names, tied ones stay tied, and whoever shares the whole
    parameters with `model` keeps them. Every rank has to call this with the same model, and then the model with the
    same inputs.

    Args:
        mesh: a DeviceMesh of one dimension, a process group, or None for all processes.
        plan: styles by module path, `*` standing for the number of a layer (see `burnish.parallel.STYLES`). None: the
            model's own (Hugging Face's `_tp_plan`); where it has none, by its layers' names: columns, then rows.
        sequence_parallel: what lies between the divided layers, norms and sums, works on this rank's slice of the
            sequence; its length has to divide. For training and long prompts, not for steps of one token.

    Returns:
        `model`.

    Raises:
        ValueError: sizes or heads that do not divide, with the parameter's name; a plan that does not fit. The model is
            then as it was.
    """
    group_name = group_of(mesh).group_name
    if any(shard_of(parameter) for parameter in model.parameters()):
        raise ValueError("model: it is divided already")
    _, ranks = rank_and_size(group_name)
    plan = plan_of(model) if plan is None else plan
    styles = _with_tied(model, styles_of(model, plan))
    divisions = [_division(model, path, style, styles, group_name) for path, style in styles.items()]
    columns = {d.path: d.cuts["weight"].parts for d in divisions if styles[d.path] in ("colwise", "colwise_qkv")}
    heads = heads_of(model, columns)
    for attention in heads:
        attention.check(ranks)
    _check(divisions)
    stack = stack_of(model, styles) if sequence_parallel else None

    for division in divisions:
        for name, shard in division.cuts.items():
            path = f"{division.path}.{name}"
            if shard_of(model.get_parameter(path)) is None:  # else it is tied to one that was cut before
                shard_parameter(model, path, shard.axis, mesh, parts=shard.parts)
        for name in division.summed:
            sum_gradients(model, f"{division.path}.{name}", mesh)
        if division.change is not None:
            division.change(division.module)
    for attention in heads:
        attention.divide(ranks)
    if heads:
        model.ranks_sharing_heads = ranks  # type: ignore[assignment]  # for whoever makes a KV cache
    if stack is not None:
        divide_sequences(model, stack, mesh)
    return model


def _division(model: nn.Module, path: str, style: str, styles: dict[str, str], group_name: str) -> _Division:
    module = model.get_submodule(path)
    if style == "replicate":
        return _Division(path, module)
    if style == "replicated_with_grad_allreduce":
        return _Division(path, module, summed=tuple(name for name, _ in module.named_parameters()))
    if style == "embedding_rowwise":
        if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
            raise ValueError(f"plan: {path} is to be {style!r}, for which a plain nn.Embedding is needed")
        change = partial(become_vocab_parallel, group_name=group_name)
        return _Division(path, module, {"weight": Shard(0, group_name)}, change=change)
    if not is_linear(module):
        kind = type(module).__name__
        raise ValueError(f"plan: {path} is to be {style!r}, for which an nn.Linear is needed, not {kind}")
    outputs, inputs = axes_of(module)
    if style.startswith("rowwise"):
        splits = style == "rowwise_split_input"
        change = partial(become_row_parallel, group_name=group_name, splits=splits)
        return _Division(path, module, {"weight": Shard(inputs, group_name)}, change=change)
    gathers = style == "colwise_gather_output"
    parts = merged_parts(path, module, styles, model) if style == "colwise_qkv" else ()
    cuts = {"weight": Shard(outputs, group_name, parts)}
    if getattr(module, "bias", None) is not None:
        cuts["bias"] = Shard(0, group_name, parts)
    change = partial(become_column_parallel, group_name=group_name, gathers=gathers)
    return _Division(path, module, cuts, change=change)


def _with_tied(model: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    """The styles, and those of the modules that share a divided weight: an embedding and the head."""
    tied = {True: "embedding_rowwise", False: "colwise_gather_output"}
    weights = {id(getattr(model.get_submodule(path), "weight", styles)): style for path, style in styles.items()}
    for path, module in model.named_modules(remove_duplicate=False):
        style = weights.get(id(getattr(module, "weight", None)))
        if path not in styles and style in tied.values():
            styles = {**styles, path: tied[isinstance(module, nn.Embedding)]}
    return styles


def _check(divisions: list[_Division]) -> None:
    """ValueError before anything is cut."""
    cut: dict[int, Shard] = {}
    for division in divisions:
        for name, shard in division.cuts.items():
            parameter = getattr(division.module, name)
            path = f"{division.path}.{name}"
            if cut.setdefault(id(parameter), shard) != shard:
                raise ValueError(f"{path}: it is tied to a parameter that is divided otherwise")
            shard.slices(path, parameter.shape[shard.axis])
