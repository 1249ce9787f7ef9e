"""The only place where graph and Ops meet: what is raised to Ops, and which Ops are fused to wider ones, in order."""

from burnish.rewrites.fuse import FUSE
from burnish.rewrites.raise_attention import ATTENTION
from burnish.rewrites.raise_linear import LINEAR
from burnish.rewrites.raise_norm import NORM
from burnish.rewrites.raise_rope import ROPE
from burnish.rewrites.rewrite import GraphPass, Rewrite, apply

RAISE = [*LINEAR, *NORM, *ROPE, *ATTENTION]

__all__ = ["FUSE", "RAISE", "GraphPass", "Rewrite", "apply"]
