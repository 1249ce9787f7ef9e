"""`decompose`: a linear layer as a product and a sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.scheduling.tracing import calls_more_than_forward

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


class SeparateBiasLinear(nn.Module):
    """x (..., in_features) -> x W^T + b (..., out_features): the product and the sum as two operations.

    It shares the parameters of a Linear, under the same names.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, self.weight)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@register
@dataclass(frozen=True)
class Decompose(Primitive):
    """Splits a Linear into the product and the sum with its bias, so that the sum can be fused with what follows.

    A Linear without bias stays what it is.
    """

    verb: ClassVar[str] = "decompose"

    def check(self, schedule: Schedule) -> nn.Linear:
        module = schedule.mod
        if type(module) is not nn.Linear:
            raise ValueError(f"decompose: {schedule.label} is a {type(module).__name__}, not a Linear")
        if calls_more_than_forward(module):
            raise ValueError(f"decompose: {schedule.label} has hooks or is checkpointed, which would be lost")
        return module

    def apply(self, schedule: Schedule, plan: nn.Linear) -> int:
        if plan.bias is not None:
            schedule.tree.put(plan, SeparateBiasLinear(plan))
        return 1
