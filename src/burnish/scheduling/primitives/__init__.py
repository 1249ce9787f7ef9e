"""The primitives of a Schedule, one file each. `PRIMITIVES` lists them by name."""

from burnish.scheduling.primitives.annotate import Annotate
from burnish.scheduling.primitives.checkpoint import Checkpoint
from burnish.scheduling.primitives.cut_pipeline_stage import CutPipelineStage
from burnish.scheduling.primitives.decompose import Decompose
from burnish.scheduling.primitives.fuse import Fuse
from burnish.scheduling.primitives.optimize import Optimize
from burnish.scheduling.primitives.primitive import PRIMITIVES, Primitive, register
from burnish.scheduling.primitives.quantize import Quantize
from burnish.scheduling.primitives.replace import Replace
from burnish.scheduling.primitives.replace_all import ReplaceAll
from burnish.scheduling.primitives.shard import Shard
from burnish.scheduling.primitives.sync import Sync
from burnish.scheduling.primitives.tensor_parallel import TensorParallel
from burnish.scheduling.primitives.trace import Trace

__all__ = [
    "PRIMITIVES",
    "Annotate",
    "Checkpoint",
    "CutPipelineStage",
    "Decompose",
    "Fuse",
    "Optimize",
    "Primitive",
    "Quantize",
    "Replace",
    "ReplaceAll",
    "Shard",
    "Sync",
    "TensorParallel",
    "Trace",
    "register",
]
