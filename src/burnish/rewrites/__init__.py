"""The only place where graph and Ops meet: what is raised to Ops, and which Ops are fused to wider ones, in order."""

from burnish.rewrites.fuse import FUSE
from burnish.rewrites.raise_attention import ATTENTION
from burnish.rewrites.raise_linear import LINEAR
from burnish.rewrites.raise_norm import NORM
from burnish.rewrites.raise_rope import ROPE
from burnish.graph.trace import clean
from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, apply

# Ops lay their results out so that copies made after them are none: a second cleaning finds those.
_CLEAN = GraphPass("no-ops removed", lambda graph_module: Outcome(clean(graph_module)))

RAISE = [*LINEAR, *NORM, *ROPE, *ATTENTION, _CLEAN]

__all__ = ["FUSE", "RAISE", "GraphPass", "Rewrite", "apply"]
