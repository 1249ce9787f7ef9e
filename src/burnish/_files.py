"""Where Burnish keeps what it measured, and writing a file so that no reader ever sees half of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """The user's cache folder for Burnish (platformdirs; `XDG_CACHE_HOME` moves it on Linux). Not created here."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("burnish"), *parts)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all; folders on the way are created. OSError where that is impossible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o644)  # mkstemp's 0600 would hide a committed result or a shared cache from everybody else
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
