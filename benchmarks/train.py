"""Group `train`: a whole training step (forward, backward, optimizer), and the memory that it needs at its highest.

GPT-2 124M in nanoGPT's manner, float32 weights under bfloat16 autocast, and Llama 3.2 1B in bfloat16; fused AdamW. Each
variant trains a copy of its own. Ours is `torch.compile(model, backend="burnish", mode="reduce-overhead")`, and, as
"burnish-uncaptured", the same without a mode, so without CUDA graphs; "checkpointed" is by a schedule of two lines.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import burnish
from benchmarks.gpu import kernels_of, print_kernels
from benchmarks.prefill import llama
from benchmarks.runner import Case, CheckError, Record, Session
from burnish import numerics
from burnish.hardware import device

Way = Callable[[nn.Module], Callable[..., Tensor]]

WARM_UP_STEPS = 5


def cases() -> Iterator[Case]:
    for name, make, ways in (
        ("nanogpt-124m-step-b12-s1024", partial(nanogpt, 12, 1024), compiled),
        ("llama-1b-step-t4096", partial(llama_with_loss, 4096), compiled_and_liger),
        ("nanogpt-124m-checkpointed-b12-s1024", partial(nanogpt, 12, 1024), with_checkpoints),
    ):
        yield Case(name, partial(_run, name=name, make=make, ways=ways))


def nanogpt(batch: int, seq: int) -> tuple[nn.Module, tuple[Tensor, Tensor], bool]:
    """The model, its inputs, and whether it is trained under autocast."""
    from examples.gpt import GPT, PRESETS

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT(PRESETS["gpt2-124m"])
    ids = torch.randint(PRESETS["gpt2-124m"].vocab_size, (batch, seq + 1), device="cuda")
    return model.train(), (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), True


class WithLoss(nn.Module):
    """A causal language model from Hugging Face that gives its loss alone: the logits are nobody else's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=labels).loss
        return loss


def llama_with_loss(tokens: int) -> tuple[nn.Module, tuple[Tensor, Tensor], bool]:
    model, inputs = llama("llama-1b", tokens)
    ids = inputs["input_ids"]
    return WithLoss(model).train(), (ids, ids), False


def _liger(model: nn.Module) -> Callable[..., Tensor]:
    """Its rotation takes the place of a function of the module that all Llamas share: only while this one runs."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    apply_liger_kernel_to_llama(model=model.model)
    theirs, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, original

    def run(*inputs: Tensor) -> Tensor:
        modeling_llama.apply_rotary_pos_emb = theirs
        try:
            loss: Tensor = model(*inputs)
        finally:
            modeling_llama.apply_rotary_pos_emb = original
        return loss

    return run


def checkpointed(model: nn.Module) -> nn.Module:
    """With the activations of every block computed again in the backward pass."""
    schedule = burnish.create_schedule(model)
    schedule.find_all("blocks.*").checkpoint()
    return schedule.build()


def compiled() -> dict[str, Way]:
    return {
        "eager": lambda model: model,
        "compile-default": torch.compile,
        "compile-reduce-overhead": partial(torch.compile, mode="reduce-overhead"),
        "burnish-uncaptured": partial(torch.compile, backend="burnish"),
        "burnish": _captured,
    }


def compiled_and_liger() -> dict[str, Way]:
    found = importlib.util.find_spec("liger_kernel") is not None
    # Last: classes that it replaces are those of models yet to be made.
    return compiled() | ({"liger": _liger} if found else {})


def with_checkpoints() -> dict[str, Way]:
    return {
        "eager": lambda model: model,
        "eager-checkpointed": checkpointed,
        "burnish": _captured,
        "burnish-checkpointed": lambda model: _captured(checkpointed(model)),
    }


def _captured(model: nn.Module) -> Callable[..., Tensor]:
    fast: Callable[..., Tensor] = torch.compile(model, backend="burnish", mode="reduce-overhead")
    return fast


class Training:
    """One variant in training.

    Attributes:
        peak_mib: MiB allocated at the highest point of a step, weights and optimizer included.
    """

    def __init__(self, model: nn.Module, way: Way, inputs: tuple[Tensor, ...], autocast: bool) -> None:
        gc.collect()
        before = torch.cuda.memory_allocated()
        self.model, self.inputs, self.autocast = copy.deepcopy(model), inputs, autocast
        self.run = way(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.step()  # compiles, and measures
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP_STEPS):  # the first ones are what CUDA graphs are recorded of: replays count no memory
            self.step()
        torch.cuda.synchronize()
        self.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20

    def backward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            loss = self.run(*self.inputs)
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        return loss

    def gradients(self, weights: dict[str, Any]) -> list[Tensor]:
        self.model.load_state_dict(weights)
        self.backward()
        return [parameter.grad.clone() for parameter in self.model.parameters()]  # type: ignore[union-attr]


def _run(
    session: Session,
    *,
    name: str,
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...], bool]],
    ways: Callable[[], dict[str, Way]],
) -> list[Record]:
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    model, inputs, autocast = make()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = {way: make_fast for way, make_fast in ways().items() if way.startswith("burnish") or session.wants(way)}
    trained = {way: Training(model, make_fast, inputs, autocast) for way, make_fast in wanted.items()}
    launched = {way: kernels_of(training.step) for way, training in trained.items()}
    print_kernels(session, launched["burnish"])
    result = session.time({way: training.step for way, training in trained.items()})
    session.console.print(result)
    kernels = {way: len(found) for way, found in launched.items()}
    records = result.records(name, session.command(name), kernels=kernels, floor_us=_floor_us(model, inputs[0].numel()))
    us = {record["variant"]: record["median_us"] for record in records}
    for way, training in trained.items():
        ratio = us["burnish"] / us[way]
        session.console.print(
            f"  {way}: {us[way]:.0f} us, {training.peak_mib:.0f} MiB; burnish takes {ratio:.3f} of it"
        )
    _check(trained, model, weights)  # last: what was measured is shown, whatever becomes of it
    peaks = [
        {**record, "case": f"{name}: peak memory", "peak_mib": round(trained[record["variant"]].peak_mib, 1)}
        for record in records
    ]
    return [*records, *peaks]


def _check(trained: dict[str, Training], model: nn.Module, weights: dict[str, Any]) -> None:
    """Burnish's gradients by the rule, against those in float32; and the same bits each time."""
    if "eager" not in trained:
        raise CheckError("without eager there is nothing to check the gradients against")
    exact = copy.deepcopy(model).float()
    exact.load_state_dict(weights)
    exact(*trained["eager"].inputs).backward()
    true = [parameter.grad for parameter in exact.parameters()]
    eager = trained["eager"].gradients(weights)
    for way in (way for way in trained if way.startswith("burnish")):
        ours, again = (trained[way].gradients(weights) for _ in range(2))
        names = [name for name, _ in model.named_parameters()]
        if differ := [name for name, one, other in zip(names, ours, again, strict=True) if not torch.equal(one, other)]:
            raise CheckError(f"{way}: gradients of two passes differ: {', '.join(differ)}")
        if reason := numerics.check(ours, eager, true).reason:
            raise CheckError(f"{way}: {reason}")


def _floor_us(model: nn.Module, tokens: int) -> float:
    """The least time for the products of the weights: forward, and two backward."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return device().floor_us(6 * tokens * sum(layer.weight.numel() for layer in layers), 0, torch.bfloat16)
