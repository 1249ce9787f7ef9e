"""What a MODEL on the command line is: a preset, a Hugging Face folder or hub id, `package.module:factory`, or a folder
that `burnish isolate` wrote.

`load` builds the model in eval mode and makes inputs that fit it. Only a hub id that is no folder reaches for
the network.
"""

from burnish.models.library import minilm_folder, quiet_transformers
from burnish.models.loading import free_memory, is_remote, load
from burnish.models.presets import MINILM, NAMES, PRESETS
from burnish.models.wanted import DTYPES, Loaded, ModelError, Wanted

__all__ = [
    "DTYPES",
    "MINILM",
    "NAMES",
    "PRESETS",
    "Loaded",
    "ModelError",
    "Wanted",
    "free_memory",
    "is_remote",
    "load",
    "minilm_folder",
    "quiet_transformers",
]
