"""What `--quantize` changes: a model's perplexity before and after, and the time where no kernel reads such weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.models import Loaded
    from burnish.quantize import Kind
    from burnish.runtime.module import OptimizedModule


def measure_perplexity(fast: OptimizedModule, loaded: Loaded) -> str | None:
    """Measures it, for the report, and says of what: a text where the model has a tokenizer, else the example's tokens.
    None where the model does not predict the next token."""
    model: Any = loaded.model
    if not hasattr(model, "can_generate") or getattr(model.config, "is_encoder_decoder", False):
        return None
    if not model.can_generate() or model.main_input_name != "input_ids":
        return None
    from burnish.likelihood import perplexity_change

    ids, text = _text(loaded), "a page of Pride and Prejudice"
    if ids is None:
        ids, text = loaded.kwargs.get("input_ids"), "the example's tokens"
    if ids is None or ids.dim() != 2 or ids.shape[1] < 2:
        return None
    perplexity_change(fast, ids)
    return f"{text}, {ids.numel()} tokens"


def why_slow(kind: Kind, loaded: Loaded) -> str | None:
    """What to know of a model that no kernel reads quantized; None where one does."""
    import torch

    weight = next(loaded.model.parameters())
    if weight.is_cuda and weight.dtype is not torch.float32:
        return None
    where = "in float32" if weight.is_cuda else "on the CPU"
    return f"{kind}: {where} each call dequantizes the weights first, and takes longer than without --quantize"


def _text(loaded: Loaded) -> Tensor | None:
    """The text's tokens, as many as the model has positions for; None where it has no tokenizer."""
    from burnish.likelihood import TEXT
    from burnish.models import PRESETS, quiet_transformers

    name: str = loaded.name
    if name in PRESETS or (":" in name and not Path(name).is_dir()):
        return None
    with quiet_transformers() as transformers:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
        except (OSError, ValueError, ImportError):
            return None
        ids: Tensor = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    ids = ids[:, :longest] if isinstance(longest, int) else ids
    return ids.to(next(loaded.model.parameters()).device)
