"""Runs every kernel, for compute-sanitizer (`make sanitize`): each Triton Impl on its Op's samples, bfloat16, with its
first config."""

from __future__ import annotations

import sys

import torch

import burnish.ops  # noqa: F401  (registers the Ops)
from burnish.op import OPS


def main() -> None:
    touched = 0
    for op in OPS.values():
        for impl in op.impls.values():
            if "triton" not in impl.name and not impl.name.startswith("gluon"):
                continue
            for sample in op.samples("cuda", torch.bfloat16):
                args = op.bind(*sample.args, **sample.kwargs)
                if not impl.why_not(*args):
                    impl.fn(*args)
                    touched += 1
    torch.cuda.synchronize()
    print(f"{touched} calls")


if __name__ == "__main__":
    sys.exit(main())
