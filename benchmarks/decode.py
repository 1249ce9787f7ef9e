"""Group `decode`: one more token behind a context, weights random: what a step of greedy generation takes.

A step runs the model on the last token, appends to the cache, and chooses the next token on the device. Peers are
Hugging Face's model on its static cache, as it is and by torch.compile; of a step with quantized weights, the step
without. Times are of one step among 20 that follow each other, as they do in generation. After 100 steps the cache is
set back.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import burnish
from benchmarks.gpu import Variant, kernels_of, print_choices, print_kernels
from benchmarks.prefill import llama
from benchmarks.runner import Case, CheckError, Record, Session, verdicts
from burnish import numerics
from burnish.bench import Benchmark, Timing
from burnish.hardware import device
from burnish.runtime.kv_cache import LENGTH_STEP
from burnish.runtime.session import Sampling
from burnish.runtime.session import Session as Generation

STEPS = 100
AT_ONCE = 20
COMPILED = {"compile-reduce-overhead": "reduce-overhead", "compile-max-autotune": "max-autotune"}


def cases() -> Iterator[Case]:
    for model, batch, context in (
        ("llama-1b", 1, 1024),
        ("llama-8b", 1, 1024),
        ("llama-8b", 16, 1024),
        ("gpt2", 1, 512),
    ):
        name = f"{model}-decode-b{batch}-ctx{context}"
        yield Case(name, partial(_run, name=name, model_name=model, batch=batch, context=context))
    for kind in ("int8", "int4"):
        name = f"llama-8b-decode-b1-ctx1024-{kind}"
        yield Case(name, partial(_run_quantized, name=name, kind=kind))


@torch.no_grad()
def _run(session: Session, *, name: str, model_name: str, batch: int, context: int) -> list[Record]:
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    model: Any = gpt2() if model_name == "gpt2" else llama(model_name, context)[0]
    model.config.use_cache = True
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device="cuda")
    token = torch.randint(3, model.config.vocab_size, (batch, 1), device="cuda")
    eager = _HuggingFace(model, ids)
    eager_logits = eager.logits(token)
    found: dict[str, Variant] = {"eager": eager.step} if session.wants("eager") else {}
    for variant, mode in COMPILED.items():
        if session.wants(variant):
            torch.compiler.reset()
            found[variant] = _HuggingFace(model, ids, torch.compile(model, mode=mode)).step
            for _ in range(3):
                found[variant]()
    fast = burnish.optimize(copy.deepcopy(model))  # it packs weights, and the peers' graphs read theirs
    mine = Steps(fast, ids)
    mine_logits = mine.logits(token)
    if model_name != "llama-8b":  # float64 copies of 8 billion weights do not fit
        exact = copy.deepcopy(model).double()
        true = numerics.oracle(exact, input_ids=torch.cat([ids, token], dim=1), use_cache=False).logits[:, -1]
        if reason := verdicts({"burnish": mine_logits}, eager_logits, true)["burnish"]:
            raise CheckError(f"burnish: {reason}")
        del exact
    return _timed(session, name, fast, {"burnish": mine.step, **found}, floor_us(model, batch, context))


@torch.no_grad()
def _run_quantized(session: Session, *, name: str, kind: Literal["int8", "int4"]) -> list[Record]:
    model: Any = llama("llama-8b", 1024)[0]
    model.config.use_cache = True
    ids = torch.randint(3, model.config.vocab_size, (1, 1024), device="cuda")
    fast = burnish.optimize(model, quantize=kind)
    variants: dict[str, Variant] = {"burnish": Steps(fast, ids).step}
    if session.wants("burnish-bfloat16"):
        variants["burnish-bfloat16"] = Steps(burnish.optimize(model), ids).step
    variants["burnish"]()
    schedule: Any = fast.schedule
    change = schedule.quantizations[-1]
    session.console.print(f"  {change}")
    return _timed(session, name, fast, variants, floor_us(model, 1, 1024, change.bytes_before - change.bytes_after))


def _timed(session: Session, name: str, fast: nn.Module, variants: dict[str, Variant], floor: float) -> list[Record]:
    launched = {variant: kernels_of(run) for variant, run in variants.items()}
    print_kernels(session, launched["burnish"])
    result = following(session, variants)
    session.console.print(result)
    schedule: Any = fast.schedule
    print_choices(session, schedule.served[-1])
    seconds = [f"{served.seconds:.1f} s" for served in schedule.served]
    session.console.print(f"  until the prompt and the step were served, in this order: {', '.join(seconds)}")
    kernels = {variant: len(names) for variant, names in launched.items()}
    records = result.records(name, session.command(name), kernels=kernels, floor_us=floor)
    us = {record["variant"]: record["median_us"] for record in records}
    best = min((us[variant] for variant in COMPILED if variant in us), default=None)
    against = "" if best is None else f", {us['burnish'] / best:.3f} of the best torch.compile"
    session.console.print(
        f"  {name}: burnish {us['burnish']:.1f} us, {us['burnish'] / floor:.2f} floors{against}; kernels {kernels}"
    )
    return records


def following(session: Session, steps: Mapping[str, Variant]) -> Benchmark:
    """Times of one step among AT_ONCE that follow each other."""

    def several(run: Variant) -> object:
        for _ in range(AT_ONCE - 1):
            run()
        return run()

    result = session.time({name: partial(several, run) for name, run in steps.items()})
    shared = {
        name: Timing(tuple(tuple(us / AT_ONCE for us in block) for block in timing.rounds))
        for name, timing in result.timings.items()
    }
    return replace(result, timings=shared)


def gpt2() -> nn.Module:
    """GPT-2 small with random weights, bfloat16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config()).eval().to("cuda", torch.bfloat16)
    return model


def floor_us(model: Any, batch: int, context: int, saved_bytes: int = 0) -> float:
    """The least time to read the weights of all products, less `saved_bytes`, and the keys and values once."""
    config = model.config.get_text_config()
    products = [m.weight for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(weight.nbytes for weight in products)
    dtype = products[0].dtype
    cache = 2 * config.num_hidden_layers * batch * heads * context * width * dtype.itemsize
    flops = 2 * batch * sum(weight.numel() for weight in products)
    return device().floor_us(flops, weights - saved_bytes + cache, dtype)


class Steps:
    """Steps of `fast.generate` behind the tokens `ids`; without `reads_prompt` behind random keys and values in their
    place, so that nothing but a step has to be tuned."""

    def __init__(self, fast: Any, ids: Tensor, reads_prompt: bool = True) -> None:
        batch, self.context = ids.shape
        longest = -(-(self.context + 2 * STEPS) // LENGTH_STEP) * LENGTH_STEP
        self.session = Generation(fast, batch, longest, False, Sampling())
        if reads_prompt:
            self.session.prefill(ids, None, 0)
        else:
            for layer in self.session.cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
            self.session.cache.advance(self.context)

    def step(self) -> Tensor:
        cache = self.session.cache
        if cache.filled >= self.context + STEPS:
            cache.advance(self.context - cache.filled)
        return self.session.step()

    def logits(self, token: Tensor) -> Tensor:
        """Those of the next step, for this token."""
        self.session._token.copy_(token)
        return self.session.step().clone()


class _HuggingFace:
    """Steps of the model on a static cache."""

    def __init__(self, model: Any, ids: Tensor, function: Callable[..., Any] | None = None) -> None:
        from transformers import StaticCache

        self.context = self.filled = ids.shape[1]
        self.function = model if function is None else function
        self.cache = StaticCache(config=model.config, max_cache_len=self.context + 2 * STEPS)
        self.token = model(ids, past_key_values=self.cache).logits[:, -1:].argmax(-1)

    def step(self) -> Tensor:
        if self.filled >= self.context + STEPS:
            self.filled = self.context
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.context)
        logits = self.logits(self.token)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def logits(self, token: Tensor) -> Tensor:
        self.filled += 1
        logits: Tensor = self.function(token, past_key_values=self.cache).logits[:, -1]
        return logits
