"""The primitives of a Schedule, one file each. `PRIMITIVES` lists them by name."""

from burnish.scheduling.primitives.annotate import Annotate
from burnish.scheduling.primitives.checkpoint import Checkpoint
from burnish.scheduling.primitives.decompose import Decompose
from burnish.scheduling.primitives.fuse import Fuse
from burnish.scheduling.primitives.primitive import PRIMITIVES, Primitive, register
from burnish.scheduling.primitives.replace import Replace
from burnish.scheduling.primitives.replace_all import ReplaceAll
from burnish.scheduling.primitives.trace import Trace

__all__ = [
    "PRIMITIVES",
    "Annotate",
    "Checkpoint",
    "Decompose",
    "Fuse",
    "Primitive",
    "Replace",
    "ReplaceAll",
    "Trace",
    "register",
]
