"""`quantize`: linear layers whose weights are read in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from burnish.quantize import Kind
from burnish.quantized_weights import check_kind
from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.scheduling.quantized_linear import QuantizedLinear
from burnish.scheduling.tracing import calls_more_than_forward

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@register
@dataclass(frozen=True)
class Quantize(Primitive):
    """Stores the weights of the Linears in the module in 8 or 4 bits, for products that are bound by reading them.

    It changes what the model computes: `verify` compares with the dequantized weights, and says how far the outputs are
    from the model's. For inference: quantized weights cannot be trained.

    Hugging Face's Conv1D is quantized too; what cannot be, and Linears that were merged before, stay as they are.
    """

    verb: ClassVar[str] = "quantize"
    kind: Kind = "int8"

    def check(self, schedule: Schedule) -> list[tuple[nn.Module, QuantizedLinear]]:
        from burnish.parallel.layers import is_linear

        module, label = schedule.mod, schedule.label
        check_kind(self.kind, module)
        if module.training:
            raise ValueError(
                f"quantize: {label} is in train mode, and quantized weights cannot be trained; call eval()"
            )
        linears = {path: part for path, part in module.named_modules() if is_linear(part)}
        if not linears:
            raise ValueError(f"quantize: {label} has no Linear")
        plan, refused = [], ""
        for path, linear in linears.items():
            where = path or label
            if calls_more_than_forward(linear):
                refused = refused or f"{where} has hooks, which would be lost"
            elif getattr(linear.weight, "_burnish_shard", None) is not None:
                refused = refused or f"{where} is divided among ranks"
            else:
                try:
                    plan.append((linear, QuantizedLinear(linear, self.kind)))
                except ValueError as error:
                    refused = refused or f"{where}: {error}"
        if not plan:
            raise ValueError(f"quantize: no Linear of {label} can be quantized: {refused}")
        return plan

    def apply(self, schedule: Schedule, plan: list[tuple[nn.Module, QuantizedLinear]]) -> int:
        for old, new in plan:
            schedule.tree.put(old, new)
        return len(plan)
