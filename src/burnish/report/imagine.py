"""A model on a GPU that is not here: its graph rewritten as it would be there, every time predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from burnish.capture import capture
from burnish.report.as_called import attention_nodes
from burnish.report.data import Explanation
from burnish.report.explain import SDPA, Story, profile_of
from burnish.report.fusions import rewritten
from burnish.report.measure import flat
from burnish.report.predict import CostModel
from burnish.report.rows import Seen, rows_of
from burnish.report.sizes import work_in_calls, work_on_fakes
from burnish.rewrites import Rewrite
from burnish.targets import find_target

_THERE = torch.device("cuda:0")
_NOTE = (
    "Predicted from the ops' costs: their kernels one after the other, in one CUDA graph. Without a graph, "
    "the host adds its time."
)


def imagine(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: str,
    rewrites: Sequence[Rewrite],
    on_progress: Callable[[str], None],
) -> Explanation:
    """What `model(*args, **kwargs)` would take on the GPU called `target`, as it is and fused. Nothing is computed.

    ValueError for an unknown target.
    """
    gpu = find_target(target)
    costs = CostModel.of(gpu, cuda=True)
    on_progress("capturing the graph")
    program = capture(model, args, kwargs, attention_interface=not _written_out(model))
    leaves = flat(args, kwargs)
    move(program.captured, _THERE)
    on_progress("looking for what can be fused")
    names = dict.fromkeys(attention_nodes(program.captured.graph), SDPA)
    before = Seen(program.captured, work_on_fakes(program.captured, leaves, _THERE), names=names)
    done = rewritten(program.captured, rewrites)
    made = Seen(done.graph_module, work_in_calls(done.graph_module, leaves, _THERE))
    story = Story(program, before, done, made, costs)
    there = f"{gpu.label} (not here)"
    as_it_was = profile_of("as it was", there, before, story.rows, costs)
    fused = profile_of("fused", there, made, rows_of(made, story.folding, costs), costs)
    return story.explanation(model, leaves, as_it_was, fused, notes=(_NOTE,))


def move(graph_module: fx.GraphModule, device: torch.device) -> None:
    """Says of every value of a captured graph that it is on `device`: rewrites ask, and decide by it."""

    def there(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            with value.fake_mode:
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        return value

    def argument(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph_module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(there, node.meta["val"])
        node.args = pytree.tree_map(argument, node.args)
        node.kwargs = pytree.tree_map(argument, node.kwargs)


def _written_out(model: nn.Module) -> bool:
    """Whether a Hugging Face model computes attention by products and a softmax of its own."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) == "eager"
