"""An Op or a model timed against its peers, at one size or several: what `burnish bench` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import burnish
from burnish.cli.stages import copy_of
from burnish.cli.words import named_inputs
from burnish.models import Loaded, ModelError
from burnish.models.inputs import longest
from burnish.op import find_op
from burnish.peers import SIZED, default_sizes, model_peers, op_peers, sized_arguments
from burnish.peers.graphs import in_graphs
from burnish.peers.resize import axis_of, resized
from burnish.sweep import OURS, Sweep
from burnish.tuning import CacheMode, Tuner

_MODEL_SIZES: dict[str, dict[str, tuple[int, ...]]] = {  # by what they count, and the kind of device
    "tokens": {"cpu": (1, 4, 16, 64, 256), "cuda": (1, 16, 128, 512, 2048)},
    "rows": {"cpu": (1, 2, 4, 8), "cuda": (1, 4, 16, 64)},
}
_ROUNDS = 3  # at each size
_SECONDS, _SECONDS_ALONE = 0.5, 2.0  # of timed time for each variant: at each of several sizes, at one

Update = Callable[[str], None]


@dataclass(frozen=True)
class Timed:
    """A model timed on its inputs as they are. `missing`: why a peer could not be timed; `kept`: why the original
    serves, or None."""

    loaded: Loaded
    result: burnish.Benchmark
    missing: dict[str, str]
    kept: str | None


@dataclass
class Swept:
    """What was measured; `missing`: why a peer could not be timed, at some size at least; `kept`: why the original
    served, at some size."""

    sweep: Sweep
    missing: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def time_model(
    loaded: Loaded,
    impls: dict[str, str],
    cache: CacheMode,
    peers: Mapping[str, Any],
    seconds: float | None,
    update: Update,
    padding: str = "keep",
) -> Timed:
    """The model as it was, optimized, and by its peers."""
    # A copy: packing lays the weights out anew, and eager has to be timed on the layout that PyTorch gave them.
    eager = copy_of(loaded)
    update(f"optimizing {loaded.name}")
    fast = burnish.optimize(loaded.model, loaded.args, loaded.kwargs, impls=impls, cache=cache, padding=padding)
    update("preparing the peers")
    others, missing = model_peers(eager, loaded.args, loaded.kwargs, **peers)
    variants: dict[str, Callable[..., object]] = {"eager": others.pop("eager"), OURS: fast, **others}
    with torch.inference_mode():
        result = burnish.benchmark(
            variants,
            loaded.args,
            loaded.kwargs,
            seconds=_SECONDS_ALONE if seconds is None else seconds,
            on_progress=lambda variant, block, blocks: update(f"timing {variant}, block {block} of {blocks}"),
        )
    return Timed(loaded, result, missing, fast.report().served[0].kept_original)


def sweep_op(
    name: str,
    sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype | None,
    impls: dict[str, str],
    cache: CacheMode,
    modes: Sequence[str],
    seconds: float | None,
    update: Update,
) -> Swept:
    """The Op by the Impl that is fastest for each size, against its peers. On CUDA as CUDA graphs,
    with other data in the L2 cache."""
    op, axis, on_cuda = find_op(name), SIZED[name].axis, device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    tuner = Tuner(cache, impls)
    info = burnish.device(device, measure=on_cuda)
    results, floors, chosen = {}, {}, {}
    seen: list[list[str]] = []
    swept_missing: dict[str, str] = {}
    for size in sizes or default_sizes(name, device):
        args = op.bind(*sized_arguments(name, size, device, dtype))
        seen.append(_shapes(zip(op.signature.parameters, args, strict=True)))
        update(f"{name}, {size} {axis}: choosing an Impl")
        with torch.inference_mode():
            function, choice = tuner.choose(op, args, budget_us=Tuner.FIRST_BUDGET_US, thorough=True)
        others, missing = op_peers(name, args, modes)
        swept_missing |= missing
        variants: dict[str, Callable[..., object]] = {"eager": others.pop("eager"), OURS: function, **others}
        if on_cuda:
            with torch.inference_mode():
                variants = in_graphs(variants, args)
        results[size] = _timed(variants, args, {}, seconds, on_cuda, update, f"{name}, {size} {axis}")
        chosen[size] = choice.impl
        if on_cuda:
            cost = op.cost(*args)
            floors[size] = info.floor_us(cost.flops, cost.bytes, dtype)
    tuner.save()
    about = ", ".join([*_in_common(seen[0], seen[-1]), str(dtype).removeprefix("torch.")])
    return Swept(Sweep(name, about, axis, results, floors, chosen), swept_missing)


def sweep_model(
    loaded: Loaded,
    sizes: Sequence[int],
    impls: dict[str, str],
    cache: CacheMode,
    peers: Mapping[str, Any],
    seconds: float | None,
    update: Update,
    padding: str = "keep",
) -> Swept:
    """The model on its inputs made longer and shorter, optimized once, against its peers."""
    eager = copy_of(loaded)
    update(f"optimizing {loaded.name}")
    fast = burnish.optimize(loaded.model, loaded.args, loaded.kwargs, impls=impls, cache=cache, padding=padding)
    if not fast.schedule.programs:
        raise ModelError(f"{loaded.name} cannot be captured: {fast.report().served[0].kept_original}")
    program = fast.schedule.program
    axis = axis_of(program, loaded.args, loaded.kwargs)
    if axis is None:
        raise ModelError(f"--sizes: {loaded.name} has no size that is free to choose")
    most = longest(loaded.model) if axis.name == "tokens" else None
    if sizes and most is not None and sizes[-1] > most:
        raise ModelError(f"--sizes {sizes[-1]}: {loaded.name} has positions for {most} tokens")
    kind = "cuda" if any(parameter.is_cuda for parameter in loaded.model.parameters()) else "cpu"
    defaults = [size for size in _MODEL_SIZES[axis.name][kind] if most is None or size <= most]
    results, swept_missing = {}, dict[str, str]()
    seen: list[list[str]] = []
    for size in sizes or defaults:
        args, kwargs = resized(program, loaded.args, loaded.kwargs, axis, size)
        seen.append(_shapes(named_inputs(loaded.model, args, kwargs).items()))
        where = f"{loaded.name}, {size} {axis.name}"
        update(f"{where}: preparing the peers")
        others, missing = model_peers(eager, args, kwargs, **peers)
        swept_missing |= missing
        variants: dict[str, Callable[..., object]] = {"eager": others.pop("eager"), OURS: fast, **others}
        results[size] = _timed(variants, args, kwargs, seconds, False, update, where)
    about = "; ".join([loaded.origin, ", ".join(_in_common(seen[0], seen[-1]))])
    kept = [served.kept_original for served in fast.report().served if served.kept_original is not None]
    return Swept(Sweep(loaded.name, about, axis.name, results), swept_missing, kept)


def _timed(
    variants: Mapping[str, Callable[..., object]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    seconds: float | None,
    cold_l2: bool,
    update: Update,
    where: str,
) -> burnish.Benchmark:
    with torch.inference_mode():
        return burnish.benchmark(
            variants,
            args,
            kwargs,
            seconds=_SECONDS if seconds is None else seconds,
            rounds=_ROUNDS,
            cold_l2=cold_l2,
            on_progress=lambda variant, block, blocks: update(f"{where}: timing {variant}, block {block} of {blocks}"),
        )


def _shapes(named: Any) -> list[str]:
    return [
        f"{name} {'x'.join(map(str, value.shape))}"
        for name, value in named
        if isinstance(value, Tensor) and value.dim()
    ]


def _in_common(first: Sequence[str], last: Sequence[str]) -> list[str]:
    """The shapes with an n for what is not the same at both sizes: "x 1xnx1024"."""
    if first == last:
        return list(first)
    merged = []
    for one, other in zip(first, last, strict=True):
        name, _, shape = one.rpartition(" ")
        sizes = zip(shape.split("x"), other.rpartition(" ")[2].split("x"), strict=True)
        merged.append(f"{name} {'x'.join(a if a == b else 'n' for a, b in sizes)}")
    return merged
