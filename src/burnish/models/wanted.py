"""What the user asks for and gets, and how a model says that it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_BATCH, DEFAULT_SEQ = 1, 128


class ModelError(ValueError):
    """A model that cannot be had, or options that do not fit it; the message is one line that says what would do."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked for beside the model's name; None where nothing was asked.

    batch, seq: sizes of the made-up inputs. dtype: of weights and floating inputs. layers: keep so many (presets only).
    text: sentences to tokenize in place of made-up ids, one row each. factory: `package.module:function` that builds
    the model around an isolated submodule, where its code is the user's own.
    """

    batch: int | None = None
    seq: int | None = None
    dtype: torch.dtype | None = None
    layers: int | None = None
    text: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    factory: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with inputs: `model(*args, **kwargs)` works. `origin` says in a line what it is."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str


def converted(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """`value` on the device, and in the dtype too if it is a floating tensor; whatever is no tensor stays as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
