"""Weights from safetensors, of which each rank reads its part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from burnish.parallel import load_sharded
from tests.parallel.models import MODELS, Whole


@contextmanager
def read_bytes(read: list[int]) -> Iterator[None]:
    """Notes the size of everything that is read from safetensors within the `with`."""
    import safetensors

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.get_shape, self._inner = inner.get_shape, inner

        def __getitem__(self, where: Any) -> Tensor:
            tensor: Tensor = self._inner[where]
            read.append(tensor.nbytes)
            return tensor

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._inner = original(*args, **kwargs)

        def __enter__(self) -> Any:
            self._inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._inner.__exit__(*error)

        def keys(self) -> Any:
            return self._inner.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self._inner.get_slice(name))

    original = safetensors.safe_open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "safe_open", File)
        yield


def loaded_slice_by_slice(rank: int, folder: Path) -> None:
    for name in ("llama_tied", "qwen3", "gpt2"):
        whole = Whole(MODELS[name])
        place = folder / name
        if rank == 0:
            whole.model.save_pretrained(place, max_shard_size="60KB")
        dist.barrier()
        assert len(list(place.glob("*.safetensors"))) > 1
        with torch.device("meta"):
            model = type(whole.model)(whole.model.config).eval()
        read: list[int] = []
        with read_bytes(read):
            load_sharded(model, place)
        assert sum(read) == sum(p.nbytes for p in model.parameters())
        assert sum(read) < 0.75 * sum(p.nbytes for p in whole.model.parameters())
        whole.check_logits(model)
        whole.check_gradients(model)
    with torch.device("meta"):
        model = type(whole.model)(whole.model.config)
    with pytest.raises(ValueError, match=r"files: transformer\.h\.0\.attn\.c_attn\.weight is in none of them"):
        load_sharded(model, [path for path in place.glob("*.safetensors") if _lacks(path, "h.0.attn.c_attn.weight")])
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_sharded(model, folder / "nowhere")


def _lacks(path: Path, ending: str) -> bool:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return not any(name.endswith(ending) for name in file.keys())  # noqa: SIM118
