"""`burnish.optimize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from burnish.quantize import Kind
from burnish.rewrites import Rewrite, check_rewrites
from burnish.runtime.module import OptimizedModule
from burnish.serving import Serving
from burnish.settings import Settings, check_call
from burnish.tuning import CacheMode


def optimize(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    impls: Mapping[str, str] | None = None,
    cache: CacheMode = "readwrite",
    cuda_graphs: str = "auto",
    static_outputs: bool = False,
    quantize: Kind | None = None,
    rewrites: Sequence[Rewrite] = (),
    padding: str = "keep",
) -> OptimizedModule:
    """Makes `model` fast: captures it, fuses what Ops can do, chooses each Op's fastest Impl here, and verifies it.

    Args:
        model: any nn.Module. Its weights are shared, not copied; some become views of packed tensors.
        args, kwargs: example inputs. With them everything happens now, without them at the first call.
        verify: compare every rewritten value with a float64 oracle on the first call's activations; what fails is
            undone. Of a batch with many tokens, some samples are compared.
        impls: Impl names by Op name that are to be used, e.g. `{"attention": "torch_flash"}`; never falls back.
        cache: measured choices and captured graphs on disk: "readwrite", "readonly" or "off".
        cuda_graphs: "auto" or "never". With "auto" each signature on a CUDA device becomes a CUDA graph, the 64 used
            last are kept; `.report()` says why one could not be captured. On the CPU there are none.
        static_outputs: return a CUDA graph's own output tensors, which the next call overwrites, instead of copies.
        quantize: "int8", "int4" or "fp8": products read copies of their weights in so many bits, which changes what the
            model computes: `.report()` says by how much. Every value is verified against the dequantized weights. Where
            gradients are wanted, the float weights are used. See docs/quantization.md.
        rewrites: your own, in order: they run before the built-in ones, which take what they leave, and are verified
            like them. See docs/tutorial-new-model.md.
        padding: "keep" or "remove". With "remove" calls compute the real tokens of their padding mask alone; results
            have zeros at padding. `.report()` says what kept a model from it. See docs/ragged.md.

    Returns:
        A module with the same forward, outputs and parameters. New batch and sequence sizes need no new capture. What
        cannot be captured runs as it was: `.report()` says why.

    Raises:
        TypeError, ValueError: a bad argument; a rewrite whose pattern cannot be matched, or whose replacement does not
            fit it; the model's own error for bad example inputs.
    """
    check_call(model, args, kwargs)
    if isinstance(model, OptimizedModule):
        raise TypeError("model: this one is optimized already; give the module it was made from")
    check_rewrites(rewrites)
    settings = Settings(
        verify, impls or {}, cache, cuda_graphs, static_outputs, quantize, tuple(rewrites), padding=padding
    )
    fast = Serving(model, settings).build()
    if args or kwargs:
        with torch.no_grad():
            fast(*args, **(kwargs or {}))
    return fast
