"""The only place where graph and Ops meet: what is raised to Ops, and which Ops are fused to wider ones, in order."""

from burnish.graph.trace import clean
from burnish.rewrites.fuse import FUSE as _FUSE
from burnish.rewrites.fuse_all_reduce import fuse_all_reduce_add_norm
from burnish.rewrites.fuse_append import fuse_rope_append
from burnish.rewrites.fuse_cross_entropy import fuse_linear_cross_entropy
from burnish.rewrites.fuse_embedding import fuse_token_embedding
from burnish.rewrites.fuse_positions import read_position_from_length
from burnish.rewrites.fuse_product_append import fuse_linear_rope_append
from burnish.rewrites.fuse_prologue import fuse_norm_prologue
from burnish.rewrites.own import check_rewrites, own
from burnish.rewrites.raise_attention import ATTENTION
from burnish.rewrites.raise_cross_entropy import CROSS_ENTROPY
from burnish.rewrites.raise_linear import LINEAR
from burnish.rewrites.raise_norm import NORM
from burnish.rewrites.raise_rope import ROPE
from burnish.rewrites.raise_rope_tables import ROPE_TABLES
from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, apply, family
from burnish.rewrites.share_masks import read_boolean_masks, read_integer_masks, share_padding_masks

# Ops lay their results out so that copies made after them are none: a second cleaning finds those.
_CLEAN = GraphPass("no-ops removed", lambda graph_module: Outcome(clean(graph_module)))

RAISE: list[Rewrite | GraphPass] = [*LINEAR, *NORM, *ROPE, *ROPE_TABLES, *ATTENTION, *CROSS_ENTROPY, _CLEAN]
FUSE: list[Rewrite | GraphPass] = [
    GraphPass("linear_cross_entropy", fuse_linear_cross_entropy),  # before a norm takes the product
    *_FUSE,
    GraphPass("all_reduce_add_norm", fuse_all_reduce_add_norm),
    GraphPass("rope_append", fuse_rope_append),
    GraphPass("linear_rope_append", fuse_linear_rope_append),
    GraphPass("norm prologue", fuse_norm_prologue),  # products that rotate have gone before, and stay
    GraphPass("token embedding", fuse_token_embedding),
    GraphPass("position from length", read_position_from_length),
    GraphPass("boolean masks", read_boolean_masks),
    GraphPass("integer padding masks", read_integer_masks),
    GraphPass("padding masks shared", share_padding_masks),
]


__all__ = ["FUSE", "RAISE", "GraphPass", "Rewrite", "apply", "check_rewrites", "family", "own"]
