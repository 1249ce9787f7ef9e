"""What the model calls where capture put the attention Op: torch's own function, with the mask of a real call.

Capture takes Hugging Face's attention over, and with it the making of masks (see `burnish.huggingface`). To measure
the model as it was, each such node runs the call that the model itself makes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from burnish import ops


class AttentionCalls(TorchFunctionMode):
    """Within the `with`, notes every call of `scaled_dot_product_attention`, in `calls`: a function of (q, k, v) for
    each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[..., Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls.append(_the_same(*args, **kwargs))
        return func(*args, **kwargs)


def _the_same(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    heads = key.shape[1]

    def call(q: Tensor, k: Tensor, v: Tensor, *of_the_op: Any) -> Tensor:
        if k.shape[1] != heads:  # the model repeats the heads of grouped keys and values, the Op does without
            k, v = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, *args, **kwargs)
        return out.transpose(1, 2).contiguous().transpose(1, 2)  # as transformers does, and as the Op stores it

    return call


def attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that capture put there, in order."""
    return [node for node in graph.nodes if node.target is ops.attention.overload]
