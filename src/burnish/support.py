"""Which Impls run on a device at all, and why the others do not: every Impl asked about every sample of its Op."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from burnish.op import OPS, find_op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ImplSupport:
    """Whether one Impl takes any of its Op's samples on a device.

    dtypes: those of "float32", "bfloat16" and "float16" in which it takes one; none where it does not run there.
    reasons: why it does not: those that spoke against every sample, or where there are none such, all that spoke
    against the sample that it came nearest to taking. Empty where it runs.
    """

    op: str
    impl: str
    dtypes: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def runs(self) -> bool:
        return bool(self.dtypes)


def impl_support(device: torch.device | str) -> list[ImplSupport]:
    """Every Impl of every Op, by the Op's name, preferred first. It takes about a second: nothing is run or timed."""
    find_op("linear")  # registers them all
    found = []
    for name in sorted(OPS):
        op = OPS[name]
        samples = {dtype: list(op.samples(device, dtype)) for dtype in _DTYPES}
        for impl in op.impls.values():
            reasons = {
                dtype: [impl.why_not(*sample.args, **sample.kwargs) for sample in of_dtype]
                for dtype, of_dtype in samples.items()
            }
            dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in _DTYPES if not all(reasons[dtype]))
            against = [] if dtypes else _most_telling([given for of_dtype in reasons.values() for given in of_dtype])
            found.append(ImplSupport(name, impl.name, dtypes, tuple(against)))
    return found


def _most_telling(refusals: list[list[str]]) -> list[str]:
    """What all samples were refused for is about the device; the rest is about one sample's shapes or dtype."""
    common = [reason for reason in refusals[0] if all(reason in given for given in refusals)]
    return common or min(reversed(refusals), key=len)
