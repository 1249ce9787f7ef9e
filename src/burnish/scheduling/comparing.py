"""A scheduled model's outputs and gradients against those of the model as it was, by the one rule of numerics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish._unchanged import nothing_changed
from burnish.numerics import Verdict, check
from burnish.parallel.agreement import Agreement
from burnish.scheduling.calls import ExampleInputs
from burnish.scheduling.clone import structural_clone
from burnish.scheduling.fresh_inputs import same_inputs_again
from burnish.scheduling.randomness import Draws, Float64, generator_states
from burnish.scheduling.state_dict import places_of

Named = dict[str, Any]
_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass
class Results:
    """Of one run: outputs and gradients by name, and the states of the random generators afterwards."""

    outputs: Named
    gradients: Named
    generators: list[Tensor]


@dataclass
class Comparison:
    """What was found. `closest` is the result that came closest to what is allowed for it, or the worst wrong one.

    Attributes:
        outputs, gradients: how many were compared.
        notes: what could not be compared as it was asked for, one line each.
    """

    ok: bool
    outputs: int
    gradients: int
    closest: str
    verdict: Verdict
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """How much of the allowed error the closest one makes."""
        return _share(self.verdict)


@dataclass(frozen=True)
class Setting:
    """How models are compared: in which mode, with gradients or without, and from which seed random numbers come."""

    training: bool
    gradients: bool
    seed: int


class Reference:
    """What the model as it was computes on some inputs: in its own dtype (eager), and in float64 (the oracle).

    Attributes:
        draws: of random numbers, in order; `aligned`: whether they are the same ones in float64.
        note: what must be said of a model whose own errors are large.
        unsteady: an output that a second call does not give again: by such a model nothing can be verified.
    """

    def __init__(
        self, original: nn.Module, names: Mapping[str, Tensor], inputs: ExampleInputs, setting: Setting
    ) -> None:
        """
        Args:
            original: the model; nothing in it is changed.
            names: the names that its weights have, by which gradients are compared.

        Raises what the model raises.
        """
        self.original, self.names, self.inputs, self.setting = original, names, inputs, setting
        model = structural_clone(original)
        if model.training != setting.training:
            model.train(setting.training)
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad} if setting.gradients else {}
        exact = _in_float64(model)
        exact_parameters = dict(exact.named_parameters())
        with Draws() as eager_draws:
            self.eager = run(model, inputs, wanted, setting.seed)
        with Float64(_dtype_of(model)) as exact_draws:
            wide = pytree.tree_map_only(Tensor, _double, (inputs.args, dict(inputs.kwargs)))
            self.exact = run(exact, ExampleInputs(*wide), {n: exact_parameters[n] for n in wanted}, setting.seed)
        self.draws = eager_draws.draws
        self.aligned = self.draws == exact_draws.draws
        self.note: str | None = None
        self.unsteady: str | None = None
        if self.aligned and _is_far(self.eager.outputs, self.exact.outputs):
            again = run(model, inputs, {}, setting.seed).outputs
            self.note = "little is verified: the model's own rounding errors are large on these inputs"
            self.unsteady = next((name for name in again if not _same(again[name], self.eager.outputs[name])), None)

    def compare(self, model: nn.Module, agreement: Agreement) -> Comparison:
        """Compares a scheduled model, which is left as it is. What it raises is what is wrong.

        Args:
            agreement: with the ranks among which it is divided: it is right where it is so on all of them.
        """
        if self.draws and not self.aligned:
            return self._in_eval_mode(model, agreement, "the random numbers of this dtype cannot be drawn in float64")
        found = self._compared(model)
        ok = agreement.all(found.ok)
        if not ok and self.draws and not agreement.all(self._draws_alike(model)):
            return self._in_eval_mode(model, agreement, "its dropout draws other random numbers than the model's")
        return _wrong("the model", "it is wrong on another rank") if found.ok and not ok else found

    def _in_eval_mode(self, model: nn.Module, agreement: Agreement, reason: str) -> Comparison:
        setting = Setting(False, self.setting.gradients, self.setting.seed)
        found = Reference(self.original, self.names, self.inputs, setting).compare(model, agreement)
        found.notes.append(f"compared in eval mode: {reason}")
        return found

    def _run(self, model: nn.Module) -> tuple[Results, list[str]]:
        places = places_of(model, self.names)
        wanted, lost = {}, []
        for name in self.eager.gradients:
            if name in places and places[name][0].requires_grad:
                wanted[name] = places[name]
            else:
                lost.append(name)
        parameters = {str(id(tensor)): tensor for tensor, _ in wanted.values()}
        with _mode(model, self.setting.training):
            results = run(model, self.inputs, parameters, self.setting.seed)
        results.gradients = {
            name: _whole(results.gradients[str(id(tensor))], tensor, rows) for name, (tensor, rows) in wanted.items()
        }
        return results, lost

    def _compared(self, model: nn.Module) -> Comparison:
        try:
            mine, lost = self._run(model)
        except Exception as error:  # the model's own code, with steps applied to it
            told = (str(error).splitlines() or [""])[0]
            return _wrong("the call", f"it raises {type(error).__name__}: {told}")
        if mine.outputs.keys() != self.eager.outputs.keys():
            texts = [", ".join(each) or "nothing" for each in (mine.outputs, self.eager.outputs)]
            return _wrong("the structure", f"it returns {texts[0]} where the model returns {texts[1]}")
        pairs = [
            *((name, mine.outputs, self.eager.outputs, self.exact.outputs) for name in self.eager.outputs),
            *((name, mine.gradients, self.eager.gradients, self.exact.gradients) for name in mine.gradients),
        ]
        verdicts = [(name, check(*(results[name] for results in three))) for name, *three in pairs]
        wrong = [pair for pair in verdicts if not pair[1].ok]
        wrong_outputs = [pair for pair in wrong if pair[0] in mine.outputs]  # whose gradients must be wrong too
        shown = wrong_outputs or wrong or verdicts
        name, verdict = max(shown, key=lambda pair: _share(pair[1]), default=("nothing", _NOTHING))
        notes = [self.note] if self.note else []
        if lost:
            notes.append(f"no gradient was compared of {', '.join(lost)}: no parameter has its values any more")
        counts = len(mine.outputs), len(mine.gradients)
        return Comparison(not wrong, *counts, _called(name, mine.outputs), verdict, notes)

    def _draws_alike(self, model: nn.Module) -> bool:
        try:
            with Draws() as recorded, _mode(model, self.setting.training):
                run(model, self.inputs, {}, self.setting.seed)
            plain = self._run(model)[0].generators
        except Exception:
            return True  # it does not run: its random numbers are not what is wrong
        with Draws():  # what torch.compile has made runs as it was written here, with PyTorch's random numbers
            right_as_written = self._compared(model).ok
        same = all(torch.equal(a, b) for a, b in zip(plain, self.eager.generators, strict=True))
        return same and recorded.draws == self.draws and not right_as_written


def run(model: nn.Module, inputs: ExampleInputs, parameters: Mapping[str, Tensor], seed: int) -> Results:
    """Calls a model, and differentiates its outputs by these parameters. `grad` of none is touched, and no random
    numbers or statistics change outside.

    Each entry of the floating outputs contributes to the gradients with another weight, from 0.5 to 1.5.
    """
    copied = same_inputs_again(inputs)
    with nothing_changed(model), torch.set_grad_enabled(bool(parameters)):
        torch.manual_seed(seed)
        result = model(*copied.args, **copied.kwargs)
        generators = generator_states()
        leaves = pytree.tree_flatten_with_path(result)[0]
        outputs = {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, _PLAIN)}
        gradients = _gradients(outputs, parameters) if parameters else {}
        kept = {name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for name, leaf in outputs.items()}
    return Results(kept, gradients, generators)


def _gradients(outputs: Named, parameters: Mapping[str, Tensor]) -> Named:
    roots = [leaf for leaf in outputs.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    weights = [_weights(root) for root in roots]
    found: Any = [None] * len(parameters)
    if roots:
        found = torch.autograd.grad(roots, list(parameters.values()), weights, allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}


def _weights(root: Tensor) -> Tensor:
    steps = torch.arange(root.numel(), device=root.device).remainder_(64).view(root.shape)
    return steps.to(root.dtype) / 64 + 0.5  # the very same numbers in every dtype


def _whole(gradient: Tensor, parameter: Tensor, rows: slice | None) -> Tensor:
    from burnish.parallel.shard import shard_of

    shard = shard_of(parameter)
    whole = gradient if shard is None else shard.joined(gradient)
    return whole if rows is None else whole[rows]


def _in_float64(model: nn.Module) -> nn.Module:
    results = {
        id(value): value.detach().clone()  # a weight that is computed from others, which deepcopy refuses
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, results).double()


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _dtype_of(model: nn.Module) -> torch.dtype:
    floats = (t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return next(floats, torch.get_default_dtype())


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in eval or train mode; parts that are in another one stay so unless the whole model changes."""
    before = [(module, module.training) for module in model.modules()]
    if model.training != training:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _is_far(eager: Named, exact: Named) -> bool:
    """Whether eager is further from float64 than rounding errors add up to."""
    return any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not relative_error(value, exact[name]) <= torch.finfo(value.dtype).eps ** 0.5
        for name, value in eager.items()
    )


def relative_error(new: Tensor, old: Tensor) -> float:
    """Root mean square, of what is finite."""
    finite = old.isfinite() & new.isfinite()
    new, old = new[finite].double(), old[finite].double()
    return float((new - old).norm() / old.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


_NOTHING = Verdict(True, 0.0, 0.0, 0.0)


def _wrong(what: str, reason: str) -> Comparison:
    return Comparison(False, 0, 0, what, Verdict(False, float("inf"), 0.0, 0.0, reason))


def _called(name: str, outputs: Named) -> str:
    return f"output{name}" if name in outputs else f"the gradient of {name}"


def _share(verdict: Verdict) -> float:
    return verdict.error / verdict.allowed if verdict.allowed else verdict.error


__all__ = ["Comparison", "Reference", "Results", "Setting", "relative_error", "run"]
