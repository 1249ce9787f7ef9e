"""A MODEL by its name: which kind of name it is, and the model built or read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish._text import human_bytes
from burnish.isolated.folder import is_isolated
from burnish.models.factory import from_factory
from burnish.models.inputs import made_up, tokenized
from burnish.models.isolated import from_isolated
from burnish.models.library import minilm_folder, quiet_transformers
from burnish.models.presets import MINILM, NAMES, PRESETS, Preset, presets_like
from burnish.models.wanted import Loaded, ModelError, Wanted, first_line


def load(name: str, wanted: Wanted | None = None) -> Loaded:
    """The model called `name`, with inputs.

    Raises:
        ModelError: there is no such model, it does not fit into memory, or an option does not apply to it.
    """
    wanted = wanted or Wanted()
    if wanted.text and wanted.batch is not None:
        raise ModelError("--text: each text is a row of the batch; leave out --batch")
    is_folder = Path(name).is_dir()
    if wanted.factory is not None and not (is_folder and is_isolated(Path(name))):
        raise ModelError(f"--factory: it is for a folder that `burnish isolate` wrote, which {name} is not")
    if name == MINILM:
        return _pretrained(name, minilm_folder(), wanted)
    if name in PRESETS:
        return _preset(name, PRESETS[name], wanted)
    if wanted.layers is not None:
        raise ModelError(f"--layers: only presets can be built with fewer layers: {', '.join(NAMES)}")
    if is_folder and is_isolated(Path(name)):
        return from_isolated(name, wanted)
    if is_folder:
        if not Path(name, "config.json").is_file():
            raise ModelError(f"{name}: a Hugging Face model folder has a config.json, this one has none")
        return _pretrained(name, name, wanted)
    if ":" in name:
        return from_factory(name, wanted)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"{name!r} is no folder, no hub id and no preset; {presets_like(name)}")
    return _pretrained(name, name, wanted)


def is_remote(name: str) -> bool:
    """Whether `load(name)` asks the Hugging Face hub."""
    return name not in NAMES and ":" not in name and not Path(name).exists()


def _preset(name: str, preset: Preset, wanted: Wanted) -> Loaded:
    if wanted.text:
        raise ModelError(f"--text: {name} has random weights and no tokenizer; use {MINILM}, a folder or a hub id")
    dtype = wanted.dtype or torch.float32
    with quiet_transformers() as transformers, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, preset.config_class)(**preset.settings)
        _keep_layers(config, wanted.layers)
        build = getattr(transformers, preset.auto_class).from_config
        _check_memory(name, lambda: build(config, dtype=dtype), wanted.device)
        with wanted.device:
            model = build(config, dtype=dtype).eval()
    return Loaded(name, model, (), made_up(name, model, wanted), f"{type(model).__name__}, random weights")


def _pretrained(name: str, source: str, wanted: Wanted) -> Loaded:
    """From a folder, or from the hub where `source` is none."""
    is_folder = Path(source).is_dir()
    with quiet_transformers() as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=is_folder)
            _keep_layers(config, wanted.layers)
            named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
            model_class = getattr(transformers, named, transformers.AutoModel)
            dtype = wanted.dtype or torch.float32
            model = model_class.from_pretrained(source, config=config, dtype=dtype, local_files_only=is_folder)
            model = model.to(wanted.device).eval()
            kwargs = tokenized(name, source, model, wanted) if wanted.text else made_up(name, model, wanted)
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, ModelError):
                raise
            hint = "" if is_folder else f"; no folder here is called so; {presets_like(name)}"
            raise ModelError(f"{name} cannot be loaded: {first_line(error)}{hint}") from error
    place = "its package" if name == MINILM else source if is_folder else "the Hugging Face hub"
    return Loaded(name, model, (), kwargs, f"{type(model).__name__}, weights from {place}")


def _keep_layers(config: Any, layers: int | None) -> None:
    if layers is None:
        return
    names = [n for n in ("num_hidden_layers", "num_decoder_layers", "decoder_layers") if getattr(config, n, None)]
    for attribute in names:
        if not 1 <= layers <= getattr(config, attribute):
            raise ModelError(f"--layers={layers}: give 1 to {getattr(config, attribute)}, what the model has")
        setattr(config, attribute, layers)


def _check_memory(name: str, build: Callable[[], nn.Module], device: torch.device) -> None:
    """ModelError before anything is allocated, where the weights alone would not fit."""
    if device.type == "meta":
        return
    with torch.device("meta"):
        needed = sum(p.numel() * p.element_size() for p in build().parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if free is not None and needed > 0.9 * free:
        raise ModelError(
            f"{name} needs {human_bytes(needed)} for its weights and {human_bytes(free)} are free here; "
            "fewer --layers or --dtype bf16 would do"
        )


def free_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
