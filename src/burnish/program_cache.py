"""Captured Programs, remembered on disk: a fresh process then skips `torch.export`, which takes most of a first call.

One JSON file for each Program, in the same folder as the measured choices. A remembered Program is a guess: whoever
reads one compares what it computes with what the model computes, and forgets it where that differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from burnish import huggingface
from burnish._files import cache_folder, write_text
from burnish.capture import Program, reject
from burnish.graph_json import NotData
from burnish.program_json import inputs_of_data, program_from_data, program_to_data
from burnish.program_key import Key, NoKey, key_of
from burnish.runtime.module import Call
from burnish.tuning import CacheMode
from burnish.verify import random_node

FORMAT = 1
MAX_FILES = 64  # 0.1 to 1 MB each; the one that was used least recently goes


class ProgramCache:
    """The Programs that earlier processes captured.

    Args:
        mode: "readwrite", "readonly" (never writes, deletes or touches a file) or "off".

    Attributes:
        why_not: why the last capture was not remembered, or could not be; None where nothing stood in the way.
    """

    def __init__(self, mode: CacheMode = "readwrite") -> None:
        self.mode = mode
        self.why_not: str | None = None

    def at(self, model: nn.Module, call: Call) -> Remembered:
        """The place of what a capture of `model` for `call` makes. Has to be asked for before that capture."""
        self.why_not, key = None, None
        if self.mode == "off":
            self.why_not = "the cache is off"
        else:
            try:
                key = key_of(model, call)
            except NoKey as reason:
                self.why_not = str(reason)
            except Exception as error:  # an attribute's own code: whatever it raises, capturing works without a key
                self.why_not = f"{type(error).__name__}: {error}"
        return Remembered(self, model, call, key)


@dataclass
class Remembered:
    """What is remembered for one model and one call."""

    cache: ProgramCache
    model: nn.Module
    call: Call
    key: Key | None
    _read: Path | None = None

    def read(self) -> Program | None:
        """The remembered Program that serves this call, if there is one. What is not readable counts as absent."""
        if self.key is None:
            return None
        huggingface.teach_pytree_caches()
        for path in sorted(cache_folder().glob(f"program-{self.key.digest[:40]}-*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                if content["format"] != FORMAT or content["key"] != self.key.digest:
                    continue
                if reject(inputs_of_data(content["program"]), self.call.leaves) is not None:
                    continue
                program = program_from_data(content["program"], self.model, self.call.structure(), self.call.leaves)
            except Exception:  # torn, edited, or of another torch: whatever is wrong with it, a capture puts it right
                continue
            self._read = path
            if self.cache.mode == "readwrite":
                _touch(path)
            return program
        return None

    def forget(self) -> None:
        """Deletes what was read."""
        if self._read is not None and self.cache.mode == "readwrite":
            _delete(self._read)

    def write(self, program: Program) -> None:
        """Remembers a fresh capture, before any step is applied to it. A folder that cannot be written is no error."""
        if self.key is None or self.cache.mode != "readwrite":
            return
        if name := random_node(program.captured.graph):
            self.cache.why_not = f"{name} is random: nothing could tell whether the remembered graph is right"
            return
        try:
            data = program_to_data(program, self.model, self.key.tensors)
        except NotData as reason:
            self.cache.why_not = f"the graph has {reason}"
            return
        content = json.dumps({"format": FORMAT, "key": self.key.digest, "program": data}, separators=(",", ":"))
        # Sizes that a model fixes are no part of the key: one key has as many Programs as the model has such sizes.
        variant = hashlib.sha256(repr(program.inputs).encode()).hexdigest()[:8]
        path = cache_folder() / f"program-{self.key.digest[:40]}-{variant}.json"
        try:
            write_text(path, content)
        except OSError as error:
            self.cache.why_not = str(error)
            return
        for old in program_files()[MAX_FILES:]:
            _delete(old)


def program_files() -> list[Path]:
    """All remembered Programs, the most recently used first."""
    found = []
    for path in cache_folder().glob("program-*.json"):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except OSError:  # another process deleted it meanwhile
            continue
    return [path for _, path in sorted(found, reverse=True)]


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        return


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
