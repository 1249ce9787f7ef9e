"""Other ways to run the same: eager, torch.compile, PyTorch's attention backends, Liger and ONNX Runtime, as far as
they are on this machine. `op_peers` has them for an Op, `model_peers` for a model.
"""

from burnish.peers.model import model_peers
from burnish.peers.op import op_peers
from burnish.peers.op_sizes import SIZED, default_sizes, sized_arguments

__all__ = ["SIZED", "default_sizes", "model_peers", "op_peers", "sized_arguments"]
