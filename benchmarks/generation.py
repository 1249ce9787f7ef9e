"""Group `generate`: whole texts, and the way from no cache to a captured step; bfloat16, random weights.

Peers are Hugging Face's `generate`, as it is and on its static cache, for which it compiles the step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import burnish
from benchmarks.decode import Steps, following
from benchmarks.gpu import Variant, kernels_of
from benchmarks.prefill import llama
from benchmarks.runner import Case, Record, Session
from burnish.runtime.kv_cache import KVCache

PROMPT, NEW = 512, 128
CONTEXT = 1024


def cases() -> Iterator[Case]:
    name = f"llama-8b-generate-p{PROMPT}-n{NEW}"
    yield Case(name, partial(_generate, name=name))
    name = f"llama-1b-stages-ctx{CONTEXT}"
    yield Case(name, partial(_stages, name=name))


@torch.no_grad()
def _generate(session: Session, *, name: str) -> list[Record]:
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    model: Any = llama("llama-8b", PROMPT)[0]
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), device="cuda")
    mask = torch.ones_like(ids)
    fast = burnish.optimize(copy.deepcopy(model))
    fast.generate(ids, max_new_tokens=NEW)  # captures

    def theirs(**options: Any) -> Variant:
        return lambda: model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
        )

    variants: dict[str, Variant] = {"burnish": lambda: fast.generate(ids, max_new_tokens=NEW)}
    if session.wants("compile-static"):
        variants["compile-static"] = theirs(cache_implementation="static")
    if session.wants("eager"):
        variants["eager"] = theirs()
    result = session.time(variants, rounds=1)
    cache = KVCache.of(fast, 1, PROMPT + NEW)

    def prefill() -> object:
        cache.reset()
        return fast(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    steps = Steps(fast, ids)
    parts = session.time({"first": lambda: fast.generate(ids, max_new_tokens=1), "prefill": prefill})
    step = following(session, {"step": steps.step})
    us = {part: timing.median_us for part, timing in {**result.timings, **parts.timings, **step.timings}.items()}
    a_token = (us["burnish"] - us["first"]) / (NEW - 1)
    session.console.print(result)
    session.console.print(
        f"  first token {us['first'] / 1e3:.2f} ms, {us['first'] / us['prefill']:.3f} of a prefill; then a token in "
        f"{a_token:.0f} us, where a step takes {us['step']:.0f}: {us['step'] / a_token:.1%} of the steps' rate"
    )
    return result.records(name, session.command(name))


@torch.no_grad()
def _stages(session: Session, *, name: str) -> list[Record]:
    """One token behind a context: the whole text again, from a cache that grows, from one that stays where it is, by
    the optimized model, and by its captured step with the choice of the token."""
    from transformers import DynamicCache, StaticCache

    model: Any = llama("llama-1b", CONTEXT)[0]
    model.config.use_cache = True
    ids = torch.randint(3, model.config.vocab_size, (1, CONTEXT), device="cuda")
    text = torch.cat([ids, ids[:, :1]], dim=1)
    growing = DynamicCache(config=model.config)
    model(ids, past_key_values=growing)
    static = StaticCache(config=model.config, max_cache_len=2 * CONTEXT)
    model(ids, past_key_values=static)
    fast = burnish.optimize(copy.deepcopy(model))
    cache = KVCache.of(fast, 1, 2 * CONTEXT)
    fast(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def by_growing_cache() -> object:
        growing.crop(CONTEXT - growing.get_seq_length())
        return _next(model(ids[:, :1], past_key_values=growing))

    def by_kv_cache() -> object:
        cache.advance(CONTEXT - cache.filled)
        return _next(fast(input_ids=ids[:, :1], past_key_values=cache, use_cache=True))

    def by_static_cache() -> object:
        for layer in static.layers:
            layer.cumulative_length.fill_(CONTEXT)
        return _next(model(ids[:, :1], past_key_values=static))

    variants: dict[str, Variant] = {
        "no-cache": lambda: _next(model(text, use_cache=False)),
        "dynamic-cache": by_growing_cache,
        "static-cache": by_static_cache,
        "kv-cache-optimized": by_kv_cache,
        "burnish": Steps(fast, ids).step,
    }
    for run in variants.values():
        run()
    kernels = {variant: len(kernels_of(run)) for variant, run in variants.items()}
    result = session.time(variants)
    session.console.print(result)
    session.console.print(f"  kernels {kernels}")
    return result.records(name, session.command(name), kernels=kernels)


def _next(output: Any) -> torch.Tensor:
    token: torch.Tensor = output.logits[:, -1:].argmax(dim=-1)
    return token
