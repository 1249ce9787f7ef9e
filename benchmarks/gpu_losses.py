"""Cases of group `ops` on a GPU: cross entropy, forward and backward together, as a step of training has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import COMPILED, Variant, captured, kernels_of
from benchmarks.runner import Case, CheckError, Record, Session
from burnish import numerics
from burnish.hardware import device
from burnish.numerics import randn
from burnish.op import OPS
from burnish.peers import op_inputs as inputs
from burnish.tuning import Tuner

Loss = Callable[..., Tensor]


def cases() -> Iterator[Case]:
    name = "cross_entropy-8192x128256"
    yield Case(name, partial(_cross_entropy, name=name, rows=8192, size=128256))
    for rows, width, size in ((12288, 768, 50304), (4096, 2048, 128256)):
        name = f"linear_cross_entropy-{rows}x{width}x{size}"
        yield Case(name, partial(_linear_cross_entropy, name=name, rows=rows, width=width, size=size))


def eager_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """As Hugging Face has it."""
    return F.cross_entropy(logits.float(), target)


def eager_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


def _cross_entropy(session: Session, *, name: str, rows: int, size: int) -> list[Record]:
    # Drawn on the device: a billion logits from the CPU's generator would take half a minute.
    logits = torch.randn(rows, size, dtype=torch.bfloat16, device="cuda", generator=_generator()) * 2
    target = _targets(rows, size)
    leaves = (logits.requires_grad_(),)
    runs = _peers(session, eager_cross_entropy, leaves, target, _liger("liger_cross_entropy"))
    return _time(session, name, "cross_entropy", leaves, target, runs, eager_cross_entropy)


def _linear_cross_entropy(session: Session, *, name: str, rows: int, width: int, size: int) -> list[Record]:
    x = randn(rows, width, dtype=torch.bfloat16, device="cuda", seed=1)
    weight = (randn(size, width, device="cuda", seed=2) / width**0.5).bfloat16()
    leaves = (x.requires_grad_(), weight.requires_grad_())
    target = _targets(rows, size)
    liger = _liger("liger_fused_linear_cross_entropy")
    runs = _peers(session, eager_linear_cross_entropy, leaves, target, liger)
    return _time(session, name, "linear_cross_entropy", leaves, target, runs, eager_linear_cross_entropy)


def _generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def _targets(rows: int, size: int) -> Tensor:
    return inputs.classes(rows, size).cuda()


def _peers(
    session: Session, eager: Loss, leaves: tuple[Tensor, ...], target: Tensor, liger: Loss | None
) -> dict[str, Variant]:
    """Each with its backward pass, called plainly; torch.compile and, where it can be, eager as CUDA graphs too."""
    found = {"eager": _gradients(eager, leaves, target)}
    for variant, mode in COMPILED.items():
        if session.wants(variant) or session.wants(f"{variant}-graph"):
            torch.compiler.reset()
            found[variant] = _gradients(torch.compile(eager, mode=mode), leaves, target)
            found[f"{variant}-graph"] = captured(found[variant])
    if liger is not None and session.wants("liger"):
        # It writes the gradient over the logits, so it has its own, made anew before each timing by nobody: their
        # values do not count for its time. Its look at the number of targets waits for the device, and is no graph's.
        own = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
        found["liger"] = _gradients(liger, own, target)
    return found


def _gradients(loss: Loss, leaves: tuple[Tensor, ...], target: Tensor) -> Variant:
    return lambda: torch.autograd.grad(loss(*leaves, target), leaves)


def _liger(function: str) -> Loss | None:
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    found: Any = getattr(functional, function)
    return lambda *args: _loss_alone(found(*args))


def _loss_alone(result: Any) -> Tensor:
    """Some versions return more beside the loss."""
    return result if isinstance(result, Tensor) else result[0]


def _time(
    session: Session,
    name: str,
    op_name: str,
    leaves: tuple[Tensor, ...],
    target: Tensor,
    peers: dict[str, Variant],
    eager: Loss,
) -> list[Record]:
    op = OPS[op_name]
    training = OPS[f"{op_name}_with_gradient{'s' if op_name.startswith('linear') else ''}"]
    plain = _gradients(op, leaves, target)
    _check(plain, peers["eager"], leaves, target, eager)
    variants: dict[str, Variant] = {"burnish": captured(plain), "burnish-uncaptured": plain, **peers}
    # Each config of the forward pass, which does all the work where the loss's gradient is 1.
    bound = training.bind(*(leaf.detach() for leaf in leaves), target)
    with torch.no_grad():
        choice = Tuner("off").choose(training, bound, budget_us=1e6, thorough=True)[1]
    session.console.print(f"  forward: {choice.impl} {choice.config}: {choice.times_us}")
    kernels = {variant: len(kernels_of(run)) for variant, run in variants.items()}
    memory = {variant: _peak_mib(run) for variant, run in variants.items() if not variant.endswith("graph")}
    session.console.print(f"  peak MiB beyond the inputs: {memory}")
    result = session.time(variants, cold_l2=True)
    session.console.print(result)
    cost = training.cost(*bound)
    floor = device().floor_us(cost.flops, cost.bytes, leaves[0].dtype)
    records = result.records(name, session.command(name), kernels=kernels, floor_us=floor)
    times = {record["variant"]: record["median_us"] for record in records}
    others = [us for variant, us in times.items() if variant.startswith(("compile", "liger"))]
    ratio = f", {times['burnish'] / min(others):.3f} of the best peer" if others else ""
    session.console.print(f"  {name}: {times['burnish']:.1f} us{ratio}, {times['burnish'] / floor:.3f} floors")
    return records


def _check(run: Variant, eager: Variant, leaves: tuple[Tensor, ...], target: Tensor, reference: Loss) -> None:
    """On what float64 fits in memory for: a sixteenth of the rows, and the whole for what is no NaN."""
    for gradient in run():  # type: ignore[attr-defined]
        if not bool(gradient.isfinite().all()):
            raise CheckError("a gradient is not finite")
    rows = target.shape[0] // 16
    few = (leaves[0].detach()[:rows].clone().requires_grad_(), *leaves[1:])
    op = OPS["cross_entropy" if len(leaves) == 1 else "linear_cross_entropy"]
    found, expected = (torch.autograd.grad(f(*few, target[:rows]), few) for f in (op, reference))
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in few)
    truth = torch.autograd.grad(_in_float64(*wide, target[:rows]), wide)
    verdict = numerics.check(found, expected, truth)
    if not verdict.ok:
        raise CheckError(str(verdict.reason))


def _in_float64(*args: Tensor) -> Tensor:
    *product, target = args
    return F.cross_entropy(F.linear(*product) if len(product) == 2 else product[0], target)


def _peak_mib(run: Variant) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) >> 20
