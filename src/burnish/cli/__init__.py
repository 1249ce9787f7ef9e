"""The command `burnish`: thin over the same functions that Python code calls.

Results go to stdout (as JSON with `--json`), progress and errors to stderr; an error is one line and exit code 2.
"""

from __future__ import annotations

# Importing them registers their commands.
from burnish.cli import bench, device, explain, generate, graph, info, isolate, model, onnx, schedule  # noqa: F401
from burnish.cli.app import app, main

__all__ = ["app", "main"]
