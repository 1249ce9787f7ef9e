"""Trials in a JSON file, so that a search that was interrupted goes on, and none is run twice."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from burnish._files import write_text
from burnish.scheduling.search.trial import Trial

FORMAT = 1


class Store:
    """The trials of one task in a file; those of other tasks, devices and versions stay in it as they are.

    Args:
        path: of the file; None keeps nothing.
        task: names what was tried and where: only trials with this name count.
    """

    def __init__(self, path: Path | None, task: str) -> None:
        self._path, self._task = path, task
        self._records = [] if path is None else list(_read(path))

    def trials(self) -> list[Trial]:
        return [Trial.from_dict(record["trial"]) for record in self._records if record["task"] == self._task]

    def add(self, trial: Trial) -> None:
        """Adds a trial, and writes the file anew, whole or not at all."""
        if self._path is not None:
            self._records.append({"task": self._task, "trial": trial.to_dict()})
            write_text(self._path, json.dumps({"format": FORMAT, "trials": self._records}, indent=1) + "\n")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that are in order, or none. A warning tells of the others."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("trials"), list):
            raise ValueError("not a file of trials")
    except FileNotFoundError:
        return
    except ValueError as error:  # of JSON and of UTF-8 too
        kept = path.with_name(f"{path.name}.unreadable")
        path.replace(kept)  # it may be something else, by a mistake in the path
        warnings.warn(f"{path} cannot be read ({error}): it is {kept.name} now, the search begins anew", stacklevel=4)
        return
    damaged = 0
    for record in data["trials"]:
        try:
            if record.keys() != {"task", "trial"} or not isinstance(record["task"], str):
                raise ValueError("not a record")
            Trial.from_dict(record["trial"])
            yield record
        except (AttributeError, ValueError):
            damaged += 1
    if damaged:
        warnings.warn(f"{path}: {damaged} of {len(data['trials'])} trials are damaged and run again", stacklevel=4)
