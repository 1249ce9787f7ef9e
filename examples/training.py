"""Training: the same steps whatever runs the model, from a seed that decides weights, batches and dropout.

The recipe is nanoGPT's: AdamW with decay on matrices alone, gradients clipped to a norm of 1, a learning rate that
warms up and then falls along a cosine to a tenth.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from burnish._files import write_text
from examples.checkpoints import RECORD, TOKENIZER, Run, load, save
from examples.gpt import GPT, sample
from examples.options import DTYPES, Options
from examples.text import Tokens, draw_batch, load_tokenizer, train_tokenizer

TOLD_EVERY = 10  # steps: between them the host does not wait for the device
HELD_OUT_BATCHES = 8
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, by its own names
Report = Callable[["Trainer"], None]


def prepare(model: nn.Module, how: str) -> Callable[..., Any]:
    """What is called for the model, ready for training: this line is all that differs between the ways to run it."""
    import burnish

    if how == "compile":
        return torch.compile(model)
    if how == "burnish":
        return torch.compile(model, backend="burnish")
    return burnish.optimize(model) if how == "optimize" else model


def learning_rate(options: Options, step: int) -> float:
    """Of the step with that number, from 0."""
    warm_up = max(1, options.steps // 10)
    if step < warm_up:
        return options.lr * (step + 1) / warm_up
    done = (step - warm_up) / max(1, options.steps - warm_up)
    return options.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """One run: the model, its optimizer, and what was measured."""

    def __init__(self, run: Run, tokens: Tokens, tensors: dict[str, Tensor] | None = None) -> None:
        """From the seed, or with the `tensors` of a checkpoint. The first call is made here, and changes nothing."""
        self.run, self.tokens, self.options = run, tokens, run.options
        options = run.options
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.model = GPT(options.config).to(self.device).train()
        self.parameters = dict(self.model.named_parameters())
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
        self.call = prepare(self.model, options.how)
        self._first_call()
        if tensors is not None:
            self._restore(tensors)

    def steps(self, count: int) -> None:
        """Train so many steps; losses and the time of a step go into `run`. ValueError where a loss is not finite."""
        losses = []
        on_gpu = self.device.type == "cuda"
        if on_gpu:  # evaluating between steps takes memory for logits
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        for step in range(self.run.step, self.run.step + count):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.options, step)
            loss = self._loss(self.call, self.tokens.training, self.options.seed, step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        found = torch.stack(losses).tolist()  # waits for the device
        self.run.seconds.append((count, (time.perf_counter() - started) / count))
        if not all(map(math.isfinite, found)):
            raise ValueError(f"the loss is {found[-1]} at step {self.run.step + count}: a lower --lr may help")
        self.run.losses += found
        if on_gpu:
            self.run.peak_mib = max(self.run.peak_mib or 0.0, torch.cuda.max_memory_allocated(self.device) / 2**20)

    def evaluate(self) -> None:
        """The loss on text held out, the same windows each time, by the model as it is; into `run`."""
        self.model.eval()
        with torch.no_grad():
            losses = [self._loss(self.model, self.tokens.held_out, "held out", i) for i in range(HELD_OUT_BATCHES)]
        self.model.train()
        self.run.held_out[self.run.step] = float(torch.stack(losses).mean())

    def sample(self, tokenizer: Tokenizer, prompt: str, new_tokens: int = 120) -> str:
        """`prompt` continued by the model."""
        generator = torch.Generator().manual_seed(self.options.seed)
        self.model.eval()
        with self._autocast():
            ids = sample(self.model, tokenizer.encode(prompt).ids, new_tokens, self.options.vocab, 0.8, generator)
        self.model.train()
        return str(tokenizer.decode(ids))

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name."""
        found = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self.parameters.items():
            found[f"model.{name}"] = parameter.detach()
            state = self.optimizer.state[parameter]
            found |= {f"{key}.{name}": state[key] for key in _MOMENTS}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def _first_call(self) -> None:
        """Compiles what is compiled. `optimize` also stores weights as its products read them, and the optimizer's
        state, which is made after it, has to lie in memory as they do."""
        started = time.perf_counter()
        generators = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self._loss(self.call, self.tokens.training, self.options.seed, 0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(generators[0])
        torch.cuda.set_rng_state_all(generators[1])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.run.prepared_s = time.perf_counter() - started

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        kinds = {
            f"{kind}.{name}": p for name, p in self.parameters.items() for kind in ("model", "exp_avg", "exp_avg_sq")
        }
        generators = {"rng.cpu"} | ({"rng.cuda"} if self.device.type == "cuda" else set())
        if wrong := tensors.keys() ^ (kinds.keys() | generators):
            raise ValueError(f"the checkpoint is not of this model: it differs in {', '.join(sorted(wrong)[:3])}")
        for name, like in kinds.items():
            if tensors[name].shape != like.shape or tensors[name].dtype != like.dtype:
                raise ValueError(f"the checkpoint is not of this model: {name} is {tuple(tensors[name].shape)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.run.step), device=self.device),
                    **{key: torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"]) for key in _MOMENTS},
                }
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = DTYPES[self.options.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _loss(self, call: Callable[..., Any], tokens: Tensor, *seed: int | str) -> Tensor:
        ids, targets = draw_batch(tokens, self.options.batch, self.options.context, *seed)
        with self._autocast():
            loss: Tensor = call(ids.to(self.device), targets.to(self.device))
        return loss


def start(options: Options, text: str, folder: Path) -> tuple[Trainer, Tokenizer]:
    """A new run in `folder`. ValueError where a run is in it already, or the text is too short for the options."""
    if (folder / RECORD).exists():
        raise ValueError(f"{folder}: there is a run in it; --resume goes on with it")
    tokenizer = train_tokenizer(text, options.vocab)
    tokens = Tokens.of(text, tokenizer)
    tokens.check(options.context)
    write_text(folder / TOKENIZER, tokenizer.to_str())
    return Trainer(Run(options, _sha256(text)), tokens), tokenizer


def resume(text: str, folder: Path) -> tuple[Trainer, Tokenizer]:
    """The run in `folder` as it was last saved. ValueError where there is none, or where it learned another text."""
    run, tensors = load(folder)
    if run.text_sha256 != _sha256(text):
        raise ValueError(f"{folder}: its run learned another text")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if tokenizer.get_vocab_size() != run.options.vocab:
        raise ValueError(f"{folder / TOKENIZER}: it has not the run's {run.options.vocab} tokens")
    return Trainer(run, Tokens.of(text, tokenizer), tensors), tokenizer


def train(trainer: Trainer, folder: Path, report: Report) -> None:
    """To the end, saved on the way; `report` is called every few steps."""
    run, options = trainer.run, trainer.options
    while run.step < options.steps:
        every = (TOLD_EVERY, options.save_every, options.evaluate_every)
        trainer.steps(min(options.steps - run.step, *(n - run.step % n for n in every)))
        done = run.step == options.steps
        if done or run.step % options.evaluate_every == 0:
            trainer.evaluate()
        if done or run.step % options.save_every == 0:
            save(folder, run, trainer.state())
        report(trainer)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
