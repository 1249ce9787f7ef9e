"""Attention of which each rank computes some heads: what its forward knows about their number."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from burnish.parallel.layers import features_of

_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
_WIDTHS = ("split_size", "all_head_size", "inner_dim", "embed_dim")  # where they are that of all heads together
_QUERIES = ("q_proj", "q_lin", "wq", "query", "q", "c_attn", "qkv", "qkv_proj", "Wqkv", "query_key_value")


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        path: of the module.
        queries, keys: how many there are.
        width: of all query heads together.
        keys_width: of all key heads, where they are known to be in one layer with the queries.
    """

    path: str
    module: nn.Module
    queries: int
    keys: int
    width: int
    keys_width: int | None = None

    def check(self, ranks: int) -> None:
        """ValueError where they do not divide: each rank has whole heads, and the key heads that they look at."""
        for what, count in (("heads", self.queries), ("key heads", self.keys)):
            if count % ranks:
                raise ValueError(f"{self.path}: {count} {what} do not divide among {ranks} ranks")
        if self.keys_width is not None and self.keys_width * self.queries != self.width * self.keys:
            heads = f"{self.queries} heads of queries and {self.keys} of keys and values"
            raise ValueError(f"{self.path}: what is merged there is not {heads}")
        if getattr(self.module, "relative_attention_bias", None) is not None:
            raise ValueError(f"{self.path}: its relative_attention_bias, a number for each head, is not divided")

    def divide(self, ranks: int) -> None:
        """Tells the module how many heads it has left, where it keeps that."""
        for name in (*_QUERY_HEADS, *_KEY_HEADS):
            if type(count := getattr(self.module, name, None)) is int:
                setattr(self.module, name, count // ranks)
        for name in _WIDTHS:
            if getattr(self.module, name, None) == self.width:
                setattr(self.module, name, self.width // ranks)


def heads_of(model: nn.Module, column_paths: dict[str, tuple[int, ...]]) -> list[Heads]:
    """The attention modules whose queries are among the divided layers (by path, with the parts that each is merged
    of). ValueError where it cannot be told how many heads there are."""
    found = []
    for path, parts in column_paths.items():
        owner_path, _, name = path.rpartition(".")
        if name not in _QUERIES:
            continue
        owner = model.get_submodule(owner_path)
        outputs, _ = features_of(model.get_submodule(path))
        queries = _count(owner, model, _QUERY_HEADS)
        if queries is None:
            raise ValueError(f"{owner_path}: how many heads it has is not said by {', '.join(_QUERY_HEADS)}")
        keys = _count(owner, model, _KEY_HEADS) or queries
        width, keys_width = parts[:2] if parts else (outputs, None)
        found.append(Heads(owner_path, owner, queries, keys, width, keys_width))
    return found


def _count(owner: nn.Module, model: nn.Module, names: tuple[str, ...]) -> int | None:
    """From the module itself, its config, or the model's."""
    for holder in (owner, getattr(owner, "config", None), getattr(model, "config", None)):
        for name in names:
            if type(count := getattr(holder, name, None)) is int:
                return count
    return None
