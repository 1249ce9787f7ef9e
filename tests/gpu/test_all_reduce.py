"""Rows summed over two GPUs by the memory that they share over NVLink."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models that are divided are Hugging Face's")

from tests.parallel import ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < ranks.RANKS,
        reason=f"{ranks.RANKS} GPUs exchange what they have; here are {torch.cuda.device_count()}",
    ),
]


def test_two_gpus_find_nothing_wrong(tmp_path: Path) -> None:
    wrong = ranks.run("tests.gpu.all_reduce_checks", "CHECKS", tmp_path, "nccl", seconds=60)
    if wrong:
        pytest.fail("\n\n".join(f"{name}: {error}" for name, error in wrong), pytrace=False)
