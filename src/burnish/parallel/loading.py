"""Weights from safetensors, of which each rank reads its own slices: the whole model is never in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from burnish.parallel.divide import tensor_parallel
from burnish.parallel.group import Mesh, device_of, group_of, rank_and_size
from burnish.parallel.shard import Shard, shard_of, with_values

Files: TypeAlias = "str | PathLike[str] | Sequence[str | PathLike[str]]"


def load_sharded(
    model: nn.Module, files: Files, mesh: Mesh = None, *, device: torch.device | str | None = None
) -> nn.Module:
    """Gives a model that was made on the meta device its weights, each rank its part of them.

        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        load_sharded(model, "folder/of/safetensors")

    The model is divided first, by `tensor_parallel(model, mesh)`, unless that was done before (which is how another
    plan is given). Weights become of the model's dtype. Buffers that no file has are computed as Hugging Face models
    compute them.

    Args:
        files: a folder with `model.safetensors`, or with `model.safetensors.index.json` and what it lists, or any
            `*.safetensors`; or the files themselves. Names are the model's, with or without the prefix of its base
            model; of tied weights any one name will do.
        mesh: see `tensor_parallel`.
        device: where the weights are put. None: the current CUDA device, where there is one, else the CPU.

    Returns:
        `model`, in which nothing is on the meta device any more.

    Raises:
        FileNotFoundError: no such files.
        ValueError: a weight is in no file, or has another shape there. The model keeps its weights on the meta device.
    """
    group = group_of(mesh)
    device = device_of(group) if device is None else torch.device(device)
    paths = _paths(files)
    if not any(shard_of(parameter) for parameter in model.parameters()):
        tensor_parallel(model, mesh)
    with _opened(paths) as slices:
        loaded = _loaded(model, slices, device)
    replaced: dict[int, Tensor] = {}
    for owner, name, tensor in list(_tensors(model)):
        if id(tensor) not in replaced:
            values = loaded[id(tensor)]
            replaced[id(tensor)] = with_values(tensor, values) if isinstance(tensor, nn.Parameter) else values
        kept: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        kept[name] = replaced[id(tensor)]
    _compute_buffers(model, device)
    return model


def _loaded(model: nn.Module, slices: dict[str, Any], device: torch.device) -> dict[int, Tensor]:
    """The values of each parameter and persistent buffer, by its identity."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in _named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    prefix = getattr(model, "base_model_prefix", "")
    loaded = {}
    for key, tensor in tensors.items():
        source = next((slices[n] for name in names[key] for n in _spellings(name, prefix) if n in slices), None)
        if source is None:
            raise ValueError(f"files: {' or '.join(names[key])} is in none of them")
        loaded[key] = _read(names[key][0], source, tensor, device)
    return loaded


def _read(name: str, source: Any, tensor: Tensor, device: torch.device) -> Tensor:
    """This rank's part of one tensor in a file, of which no more is read."""
    shape, shard = list(source.get_shape()), shard_of(tensor)
    if shard is None:
        mine: Tensor = source[:] if shape else source[...]
    else:
        if len(shape) != tensor.dim():
            raise ValueError(f"files: {name} has the shape {tuple(shape)} there")
        pieces = [_along(source, shard, piece) for piece in shard.slices(name, shape[shard.axis])]
        mine = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=shard.axis)
    if mine.shape != tensor.shape:
        raise ValueError(f"files: {name} has the shape {tuple(shape)} there; it must be {_whole_shape(tensor, shard)}")
    return mine.to(device=device, dtype=tensor.dtype)


def _along(source: Any, shard: Shard, piece: slice) -> Tensor:
    part: Tensor = source[(*[slice(None)] * shard.axis, piece)]
    return part


def _whole_shape(tensor: Tensor, shard: Shard | None) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if shard is not None:
        shape[shard.axis] *= rank_and_size(shard.group_name)[1]
    return tuple(shape)


def _spellings(name: str, prefix: str) -> Iterable[str]:
    """The names that a checkpoint may have it under."""
    yield name
    if prefix:
        yield name.removeprefix(f"{prefix}.")
        yield f"{prefix}.{name}"


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter and persistent buffer, with its owner and its name there."""
    for _, owner in model.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, name, parameter
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield owner, name, buffer


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    paths = {id(module): path for path, module in model.named_modules()}
    for owner, name, tensor in _tensors(model):
        path = paths[id(owner)]
        yield f"{path}.{name}" if path else name, tensor


def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Fills what is on the meta device still: buffers that are in no checkpoint, such as rotary frequencies."""
    for path, owner in model.named_modules():
        left = {name: b for name, b in owner._buffers.items() if b is not None and b.is_meta}
        if not left:
            continue
        if not hasattr(model, "_init_weights"):
            raise ValueError(f"{path}.{next(iter(left))}: it is on the meta device, and nothing says how to compute it")
        owner._buffers.update({name: torch.empty_like(buffer, device=device) for name, buffer in left.items()})
        model._init_weights(owner)  # type: ignore[operator]


def _paths(files: Files) -> list[Path]:
    if not isinstance(files, (str, PathLike)):
        paths = [Path(file) for file in files]
    elif Path(files).is_dir():
        paths = _in_folder(Path(files))
    else:
        paths = [Path(files)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"files: there is no {path}")
    return paths


def _in_folder(folder: Path) -> list[Path]:
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if (index := folder / "model.safetensors.index.json").is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    raise FileNotFoundError(f"files: there is no *.safetensors in {folder}")


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """A slice of each tensor in the files, by name: what is read is what is asked of it."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        yield {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
