"""What `optimize` is asked for, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from burnish.op import find_impl
from burnish.quantize import Kind
from burnish.quantized_weights import check_kind
from burnish.rewrites import Rewrite, check_rewrites
from burnish.tuning import CacheMode


@dataclass(frozen=True)
class Settings:
    """The arguments of `optimize`."""

    verify: bool = True
    impls: Mapping[str, str] = field(default_factory=dict)
    cache: CacheMode = "readwrite"
    cuda_graphs: str = "auto"
    static_outputs: bool = False
    quantize: Kind | None = None
    rewrites: tuple[Rewrite, ...] = ()
    without: tuple[str, ...] = ()  # of default steps and rewrites, by name: `Schedule.undo` of a name
    padding: str = "keep"


def check_settings(settings: Settings, model: nn.Module) -> None:
    """TypeError, ValueError: a bad argument of `optimize`."""
    if settings.cuda_graphs not in ("auto", "never"):
        raise ValueError(f"cuda_graphs={settings.cuda_graphs!r}: use 'auto' or 'never'")
    if settings.cache not in ("readwrite", "readonly", "off"):
        raise ValueError(f"cache={settings.cache!r}: use 'readwrite', 'readonly' or 'off'")
    if settings.padding not in ("keep", "remove"):
        raise ValueError(f"padding={settings.padding!r}: use 'keep' or 'remove'")
    if not isinstance(settings.impls, Mapping):
        raise TypeError(
            f"impls: Impl names by Op name are needed, such as {{'attention': 'triton'}}, got {settings.impls!r}"
        )
    for op, impl in settings.impls.items():
        find_impl(op, impl)
    if settings.quantize is not None:
        check_kind(settings.quantize, model)
    check_rewrites(settings.rewrites)


def check_call(model: Any, args: Any, kwargs: Any) -> None:
    """TypeError for what is no model, or no inputs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an nn.Module is needed, not {type(model).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(
            f"args: a tuple of positional inputs is needed, not {type(args).__name__}; write (x,) for one input"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"kwargs: a mapping of keyword inputs is needed, not {type(kwargs).__name__}; write {{'mask': mask}}"
        )
