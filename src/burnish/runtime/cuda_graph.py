"""CUDA graphs: one per input signature, all in one memory pool, replayed on copies of the inputs.

A graph replays the kernels of one call at fixed addresses. Inputs are copied to where the graph reads them; outputs are
cloned from where it writes them, unless the caller wants them where they are (`static_outputs`). Graphs of one pool
reuse each other's intermediate memory, so no two of them may run at once: whoever comes from another stream waits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_GRAPHS = 64
"""How many graphs one optimized model keeps; the least recently used one goes first."""

Run = Callable[[Sequence[Any]], Sequence[Any]]


class GraphPool:
    """The graphs of one optimized model: their shared memory, their order of use, and the lock that replays hold."""

    def __init__(self, limit: int = MAX_GRAPHS) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit}: at least one graph must be kept")
        self.limit = limit
        self.lock = threading.RLock()
        self._graphs: OrderedDict[int, CapturedCall] = OrderedDict()
        self._handle: Any = None
        self._done: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def handle(self) -> Any:
        """The memory pool, made when the first graph wants it."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def used(self, call: CapturedCall) -> None:
        """Notes a use; drops the graph that was not used for longest when there are too many."""
        self._graphs[id(call)] = call
        self._graphs.move_to_end(id(call))
        while len(self._graphs) > self.limit:
            _, oldest = self._graphs.popitem(last=False)
            oldest.drop()

    def clear(self) -> None:
        """Drops every graph."""
        with self.lock:
            for call in self._graphs.values():
                call.drop()
            self._graphs.clear()

    def enter(self) -> None:
        """Before a replay: the current stream waits for the last one where that ran on another stream."""
        stream = torch.cuda.current_stream()
        if self._done is not None and self._stream != stream:
            stream.wait_event(self._done)
        self._stream = stream

    def leave(self) -> None:
        """After a replay and the copies of its outputs."""
        if self._done is None:
            self._done = torch.cuda.Event()
        self._done.record()


class CapturedCall:
    """`run` on inputs like `leaves`, as a CUDA graph that is captured when it is first wanted.

    Args:
        run: takes the flat inputs and returns the flat outputs; it must have run on such inputs before, so that
            every kernel is compiled and every library set up.
        leaves: the flat inputs of one call. Tensors are copied in at each replay; the rest are constants.
        static_outputs: return the graph's own output tensors, which the next call overwrites.
    """

    def __init__(self, pool: GraphPool, run: Run, leaves: Sequence[Any], static_outputs: bool) -> None:
        self.pool, self.static_outputs = pool, static_outputs
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._device = _device_of(leaves)
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._inputs: list[Tensor] = []
        self._outputs: list[Any] = []
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def drop(self) -> None:
        """Frees the graph and its buffers. The next call captures anew."""
        self._graph, self._inputs, self._outputs = None, [], []

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The outputs for `leaves`. RuntimeError, from the capture, for what a graph cannot hold."""
        with self.pool.lock, torch.cuda.device(self._device):
            if self._graph is None:
                self._capture(leaves)
            self.pool.used(self)
            self.pool.enter()
            self._copy_in(leaves)
            assert self._graph is not None
            self._graph.replay()
            outputs = self._outputs
            if not self.static_outputs:
                outputs = [t.clone() if isinstance(t, Tensor) else t for t in outputs]
            self.pool.leave()
            return list(outputs)

    def _copy_in(self, leaves: Sequence[Any]) -> None:
        given = [leaves[i] for i in self._places]
        moved = [(mine, other) for mine, other in zip(self._inputs, given, strict=True) if mine is not other]
        if len(moved) == 1:
            moved[0][0].copy_(moved[0][1], non_blocking=True)
        elif moved:
            torch._foreach_copy_([mine for mine, _ in moved], [other for _, other in moved])

    def _capture(self, leaves: Sequence[Any]) -> None:
        # Inference tensors could not be written to from outside inference mode, nor the other way round.
        with torch.inference_mode(False), torch.no_grad():
            # As each input lies in memory, but for elements that overlap.
            inputs = [torch.empty_like(leaves[i]) for i in self._places]
            for mine, other in zip(inputs, (leaves[i] for i in self._places), strict=True):
                mine.copy_(other)
            whole = list(self._leaves)
            for place, mine in zip(self._places, inputs, strict=True):
                whole[place] = mine
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # thread_local: another thread may allocate or synchronize meanwhile; this capture is none of its business.
            with torch.cuda.graph(graph, pool=self.pool.handle, stream=stream, capture_error_mode="thread_local"):
                outputs = list(self._run(whole))
            torch.cuda.current_stream().wait_stream(stream)
        self._graph, self._inputs, self._outputs = graph, inputs, outputs


def why_not_captured(leaves: Sequence[Any]) -> str | None:
    """Why a call on these inputs cannot be a CUDA graph, or None."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return "no input is a tensor"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if any(not tensor.is_cuda for tensor in tensors) or len(devices) > 1:
        return f"the inputs are on {', '.join(devices)}; a graph needs all of them on one CUDA device"
    return None


def _device_of(leaves: Sequence[Any]) -> torch.device:
    return next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
