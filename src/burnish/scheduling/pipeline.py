"""A scheduled model as the stages of a pipeline, each on a rank of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from burnish.scheduling.calls import ExampleInputs
from burnish.scheduling.clone import structural_clone
from burnish.scheduling.primitives.cut_pipeline_stage import ends_stage

if TYPE_CHECKING:
    from torch.distributed.pipelining import Pipe


def build_pipeline(model: nn.Module, inputs: ExampleInputs | None) -> Pipe:
    """See `Schedule.build_pipeline`."""
    if inputs is None:
        raise ValueError("build_pipeline: give inputs of one microbatch, or give create_schedule example inputs")
    from torch.distributed.pipelining import SplitPoint, pipeline

    cuts = [path for path, module in model.named_modules() if ends_stage(module)]
    if not cuts:
        raise ValueError("build_pipeline: no stage ends anywhere: call cut_pipeline_stage() on a submodule first")
    for path in cuts:
        if inside := next((other for other in cuts if other.startswith(f"{path}.")), None):
            raise ValueError(f"build_pipeline: a stage cannot end behind {path} and behind {inside}, which is in it")
    split = dict.fromkeys(cuts, SplitPoint.END)
    return pipeline(structural_clone(model), tuple(inputs.args), dict(inputs.kwargs), split_spec=split)
