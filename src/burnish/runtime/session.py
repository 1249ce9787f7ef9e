"""`Session`: the memory of a batch that is generated, and the step on it; on CUDA each step is one graph.

A step takes the last token, appends to the cache, samples the next token and writes it where the one after it will be
read: the host launches steps and waits for none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from burnish import ops
from burnish.op import Op
from burnish.ops._triton import triton_why_not
from burnish.ops.sample_token import kept_scores
from burnish.parallel.shutdown import drop_before_shutdown
from burnish.prepare import GraphEntry, PlainEntry
from burnish.runtime.allowed_tokens import AllowedTokens, TokenRules
from burnish.runtime.cuda_graph import GraphMemory
from burnish.runtime.encoder_decoder_cache import EncoderDecoderKVCache
from burnish.runtime.kv_cache import KVCache
from burnish.runtime.module import STALE, OptimizedModule
from burnish.tuning import Tuner


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: arguments of the Ops `sample_token` and `penalize_repetition`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos: tuple[int, ...] = ()
    pad: int = 0
    strings: bool = False
    rules: TokenRules = field(default_factory=TokenRules)

    @property
    def may_end(self) -> bool:
        """Whether a row may end before the others, at a token or a string."""
        return bool(self.eos) or self.strings

    @classmethod
    def of(cls, config: Any) -> Sampling:
        """That of a Hugging Face GenerationConfig."""
        eos = _tokens(config.eos_token_id)
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), 0)
        filters = ("temperature", "top_k", "top_p", "min_p") if config.do_sample else ()
        given = {name: getattr(config, name) for name in (*filters, "repetition_penalty")}
        given = {name: value for name, value in given.items() if value is not None}
        rules = TokenRules(
            _tokens(config.suppress_tokens),
            _tokens(config.begin_suppress_tokens),
            config.forced_bos_token_id,
            _tokens(config.forced_eos_token_id),
        )
        return cls(bool(config.do_sample), **given, eos=eos, pad=pad, strings=bool(config.stop_strings), rules=rules)


def _tokens(given: Any) -> tuple[int, ...]:
    """None, a token or several."""
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


class Session:
    """The memory of one batch that is generated, and the step on it; it serves one prompt after another.

    Args:
        padded: whether prompts may be padded, on the left.
        cache: one for so many rows and tokens; None: a KVCache.

    Attributes:
        cache: the keys and values so far.
        sequences: (batch, max length) int64, prompt and new tokens.
        finished: (batch,) bool, rows that have ended.
    """

    def __init__(
        self,
        model: OptimizedModule,
        batch: int,
        max_length: int,
        padded: bool,
        sampling: Sampling,
        cache: KVCache | EncoderDecoderKVCache | None = None,
    ) -> None:
        self.model, self.sampling = model, sampling
        self.cache = KVCache.of(model, batch, max_length) if cache is None else cache
        device = self.cache.lengths.device
        self.sequences = torch.zeros(batch, max_length, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self._eos = torch.tensor(sampling.eos, dtype=torch.int64, device=device)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        # With left padding only: which positions are real, where rows begin, and the position of the next token.
        self._mask = torch.ones(batch, max_length, dtype=torch.int64, device=device) if padded else None
        self._start = torch.zeros(batch, dtype=torch.int64, device=device) if padded else None
        self._position = torch.zeros(batch, 1, dtype=torch.int64, device=device) if padded else None
        self._prompt = 0  # tokens that were given
        self._allowed: AllowedTokens | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory: GraphMemory | None = None
        self._logits: Tensor | None = None  # what the graph leaves there
        self._entry: Any = None  # a PlainEntry, or what runs the model as it was
        self._is_ready = False
        self._functions: dict[str, Callable[..., Any]] = {}

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, seed: int, last: bool = False) -> Tensor:
        """Runs the prompt and chooses the first token, which is also the `last` where no more are wanted. Returns the
        logits that it was chosen from, (batch, vocab)."""
        self._begin(input_ids, seed)
        length = input_ids.shape[1]
        call: dict[str, Any] = {"input_ids": input_ids, "past_key_values": self.cache, "use_cache": True}
        if self._mask is not None and self._start is not None and self._position is not None:
            assert attention_mask is not None
            self._mask.fill_(1)
            self._mask[:, :length] = attention_mask
            self._start.copy_(length - attention_mask.sum(dim=1))
            self._position[:, 0] = attention_mask.sum(dim=1)
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            call |= {"attention_mask": attention_mask, "position_ids": positions}
        if "logits_to_keep" in self.model._names:
            call["logits_to_keep"] = 1
        return self._first_token(self.model(**call).logits[:, -1], last)

    def _begin(self, tokens: Tensor, seed: int) -> None:
        """Forgets the prompt before, and notes the tokens that this one begins with."""
        self.cache.reset()
        self.finished.zero_()
        self.seed.fill_(seed)
        self._prompt = tokens.shape[1]
        self.sequences[:, : self._prompt] = tokens

    def _first_token(self, logits: Tensor, last: bool) -> Tensor:
        if self._allowed is None and self.sampling.rules != TokenRules():
            self._allowed = AllowedTokens(self.sampling.rules, logits)
        if self._allowed is not None:
            self._allowed.move_to(self._prompt, self._prompt, last)
        self._choose(logits, self.cache.lengths - 1)
        return logits

    def step(self, last: bool = False) -> Tensor:
        """Runs one token and chooses the next, the `last` one that is wanted or not. Returns the logits, which the next
        step may overwrite."""
        self.cache.check_room(1)
        if self._allowed is not None:
            self._allowed.move_to(self.cache.filled + 1, self._prompt, last)
        if not self._is_ready or self._moved():
            self._prepare()
        logits = self._run() if self._graph is None else self._replayed(self._graph)
        self.cache.filled += 1
        return logits

    def _replayed(self, graph: torch.cuda.CUDAGraph) -> Tensor:
        graph.replay()
        assert self._logits is not None
        return self._logits

    def _moved(self) -> bool:
        return isinstance(self._entry, PlainEntry) and self._entry.places.read() is None

    def _prepare(self) -> None:
        """Chooses what serves the steps, and captures one, where it can be: once, and again when a weight has moved."""
        self._graph, self._entry, self._is_ready = None, self._entry_of_step(), True
        if not isinstance(self._entry, PlainEntry) or not self._token.is_cuda:
            return
        self._memory = self._memory or GraphMemory()
        saved = [(t, t.clone()) for t in self._changed()]
        try:
            self._run()  # compiles and loads what a capture must not
            for tensor, before in saved:
                tensor.copy_(before)
            self._graph, self._logits = self._memory.capture(self._run)
            drop_before_shutdown(self)
        except RuntimeError as error:
            warnings.warn(f"generate: the steps are not captured: {str(error).splitlines()[0]}", stacklevel=2)
            for tensor, before in saved:
                tensor.copy_(before)

    def drop(self) -> None:
        """Frees the graph of the step. The next step captures anew."""
        self._graph, self._logits, self._is_ready = None, None, False

    def _changed(self) -> list[Tensor]:
        """What a step changes that a second run would change again."""
        counters = [self.cache.lengths, self._token, self.finished, self.sequences]
        return counters if self._position is None else [*counters, self._position]

    def _call(self) -> dict[str, Any]:
        """The model's call for one more token."""
        call: dict[str, Any] = {"input_ids": self._token, "past_key_values": self.cache, "use_cache": True}
        if self._mask is not None:
            call |= {"attention_mask": self._mask, "position_ids": self._position}
        return call

    def _entry_of_step(self) -> Any:
        """What serves a step: chosen and verified as for any call."""
        model = self.model
        call = model._call((), self._call())
        key = None if call is None else model._key(call, differentiable=False)
        if call is None or key is None:
            return None
        if key not in model._entries:
            model._make_entry(key, call, differentiable=False)
        entry = model._entries[key]
        if entry(call) is STALE:
            return None
        return entry.plain if isinstance(entry, GraphEntry) else entry

    def _run(self) -> Tensor:
        call = self._call()
        if isinstance(self._entry, PlainEntry):
            flat = self.model._call((), call)
            assert flat is not None
            result = self._entry.unflatten(self._entry.run(flat.leaves))
        else:
            result = self.model._original(**call)
        logits: Tensor = self.cache.put_into(result).logits[:, -1]
        self._choose(logits, self.cache.lengths, advance=True)
        return logits

    def _choose(self, logits: Tensor, fed: Tensor, advance: bool = False) -> None:
        """The token after the one at the place `fed`, from which the logits are; `advance` notes that it was fed."""
        how = self.sampling
        if self._allowed is not None:
            logits = self._allowed.apply(logits)
        if how.repetition_penalty != 1.0:
            logits = self._fastest(ops.penalize_repetition, *self._penalized(logits, fed + 1))
        drawn = (logits, self.seed, fed, how.temperature, how.top_k, how.top_p, how.min_p, how.do_sample)
        token = self._fastest(ops.sample_token, *drawn)
        if not triton_why_not(logits):
            from burnish.kernels.next_token import next_token

            places = (self._token, self.sequences, fed, self._position)
            next_token(token, self.finished, self._eos, *places, how.pad, how.may_end, advance)
            return
        if how.may_end:
            token = torch.where(self.finished, how.pad, token)
            self.finished |= torch.isin(token, self._eos)
        self._token.copy_(token[:, None])
        self.sequences.index_copy_(1, fed.reshape(1) + 1, self._token)
        if advance:
            fed.add_(1)
            if self._position is not None:
                self._position.add_(1)

    def _fastest(self, op: Op, *args: Any) -> Any:
        """The Op by the Impl that is fastest here: all its calls are alike."""
        if op.name not in self._functions:
            op.check(*args)
            tuner: Tuner = self.model.serving.tuner  # type: ignore[attr-defined]  # a Resolver is a Serving here
            chosen = tuner.choose(op, args, budget_us=Tuner.FIRST_BUDGET_US, thorough=True)
            self._functions[op.name], _ = chosen
        return self._functions[op.name](*args)

    def scores(self, logits: Tensor) -> Tensor:
        """What the token was chosen by that these logits led to: penalized, divided, filtered; float32."""
        how, scores = self.sampling, logits.float()
        if self._allowed is not None:
            scores = self._allowed.apply(scores)
        if how.repetition_penalty != 1.0:
            scores = ops.penalize_repetition(*self._penalized(scores, self.cache.lengths))
        return (
            kept_scores(scores, how.temperature, how.top_k, how.top_p, how.min_p) if how.do_sample else scores.clone()
        )

    def _penalized(self, logits: Tensor, count: Tensor) -> tuple[Any, ...]:
        return logits, self.sequences, count, self.sampling.repetition_penalty, self._start
