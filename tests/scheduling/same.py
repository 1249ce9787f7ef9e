"""What a schedule must not change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish.numerics import assert_close, check
from tests.e2e.float64 import gradients, gradients_in_float64, loss, outputs_in_float64


def assert_same_outputs(built: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs equal by the rule of numerics."""
    with torch.no_grad():
        result, eager = built(*args, **kwargs), model(*args, **kwargs)
    exact = outputs_in_float64(model, args, kwargs)
    assert_close(pytree.tree_leaves(result), pytree.tree_leaves(eager), exact)


def assert_same_names(built: nn.Module, model: nn.Module) -> None:
    """The built module's state_dict is the model's, and takes the model's checkpoint with other values."""
    state, expected = built.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    built = copy.deepcopy(built)
    other = {name: torch.randn_like(v) if v.is_floating_point() else v for name, v in expected.items()}
    other = {name: other[tied] for name, tied in _first_names(model).items()}
    assert str(built.load_state_dict(other)) == "<All keys matched successfully>"
    for name, value in built.state_dict().items():
        assert torch.equal(value, other[name]), name


def _first_names(model: nn.Module) -> dict[str, str]:
    """Tied weights have one value."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def assert_same_gradients(built: nn.Module, model: nn.Module, **kwargs: Any) -> None:
    """Gradients equal by the rule of numerics, by the original names. Neither may be random."""
    model.zero_grad()
    loss(model(**kwargs)).backward()
    eager = gradients(copy_with_gradients(model))
    model.zero_grad()
    built.zero_grad()
    loss(built(**kwargs)).backward()
    result = gradients_by_name(built)
    exact = gradients_in_float64(model, kwargs)
    for name, gradient in eager.items():
        verdict = check(result[name], gradient, exact[name])
        assert verdict.ok, f"{name}: {verdict.reason}"


def copy_with_gradients(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    return copied


def gradients_by_name(built: nn.Module) -> dict[str, Tensor]:
    """The gradients under the names of the state_dict: where a parameter is merged, each name has its rows."""
    kept = [(p, p.detach().clone()) for p in built.parameters()]
    with torch.no_grad():
        for parameter, _ in kept:
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    named = {name: value.clone() for name, value in built.state_dict().items()}
    with torch.no_grad():
        for parameter, value in kept:
            parameter.copy_(value)
    return named


def fingerprint(model: nn.Module) -> list[Any]:
    """Which modules and tensors are where, by identity, and what each module knows."""
    rows: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        tables = (module._parameters, module._buffers, module._modules, module._forward_hooks)
        rows.append((path, id(module), type(module), sorted(vars(module)), module.training))
        rows.append([[(key, id(value)) for key, value in table.items()] for table in tables])
    return rows
