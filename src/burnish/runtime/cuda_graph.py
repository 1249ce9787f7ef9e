"""CUDA graphs: one per input signature, all in one memory pool.

A graph replays the kernels of one call at fixed addresses. It reads the inputs where the first call had them; once a
call has them elsewhere, it is captured again on buffers of its own, to which inputs are copied. Outputs are cloned from
where it writes them, unless the caller wants them where they are (`static_outputs`). Graphs of one pool reuse each
other's intermediate memory, so no two of them may run at once: whoever comes from another stream waits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.kernels.counters import new_counters, own_counters
from burnish.parallel.shutdown import drop_before_shutdown

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
        self._memory: GraphMemory | None = None
        self._stream: torch.cuda.Stream | None = None
        self._raw_stream = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def memory(self) -> GraphMemory:
        """What the graphs share, made when the first of them wants it."""
        if self._memory is None:
            self._memory = GraphMemory()
        return self._memory

    def used(self, call: CapturedCall) -> None:
        """Notes a use; drops the graph that was not used for longest when there are too many."""
        self._graphs[id(call)] = call
        self._graphs.move_to_end(id(call))
        while len(self._graphs) > self.limit:
            _, oldest = self._graphs.popitem(last=False)
            oldest.drop()

    def clear(self) -> None:
        """Drops every graph, and the memory that they shared: the next ones may be on another device."""
        with self.lock:
            for call in self._graphs.values():
                call.drop()
            self._graphs.clear()
            self._memory = None

    def enter(self, device: int) -> None:
        """Before a replay: the current stream waits for the last one where that ran on another stream."""
        raw = torch._C._cuda_getCurrentRawStream(device)  # 0.1 us, where the stream as an object costs 2
        if self._stream is None or raw != self._raw_stream:
            stream = torch.cuda.current_stream(device)
            if self._stream is not None:
                stream.wait_stream(self._stream)
            self._stream, self._raw_stream = stream, raw


class GraphMemory:
    """Memory on the current device that graphs share, whether they live one after another or at once.

    It is that of a small graph of its own: torch forgets a pool for good with the last graph that uses it (its
    allocator of pinned memory does, whatever else holds the pool), and later captures into it would fail.
    """

    def __init__(self) -> None:
        self._make()

    def _make(self) -> None:
        self._counters = new_counters("cuda")
        self._keeper, _ = _capture(self._counters[:1].zero_, None)
        self._id = self._keeper.pool()

    def capture(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """`run()` as a CUDA graph, and what it returned. RuntimeError where it does what no graph can hold.

        Unlike torch.cuda.graph it does not hand the allocator's free memory back to the driver first: to get it again
        would cost each capture some milliseconds.
        """
        try:
            with own_counters(self._counters):
                graph, result = _capture(run, self._id)
            graph.counters = self._counters  # type: ignore[attr-defined]  # which it needs as long as it lives
            return graph, result
        except BaseException:
            self._make()  # torch believes that a capture which broke still goes on in its pool
            raise


_broken: list[torch.cuda.CUDAGraph] = []  # torch's allocators keep asking the graph of a capture that broke


def _capture(run: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # thread_local: another thread may allocate or synchronize meanwhile; this capture is none of its business.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = run()
            graph.capture_end()
        except BaseException:
            try:
                graph.capture_end()
            except RuntimeError:  # the capture is broken, and says so once more
                _broken.append(graph)
            raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


class CapturedCall:
    """`run` on inputs like `leaves`, as a CUDA graph that is captured when it is first wanted.

    Args:
        run: takes the flat inputs and returns the flat outputs; it must have run on such inputs before, so that
            every kernel is compiled and every library set up.
        leaves: the flat inputs of one call; those that are no tensors are constants.
        static_outputs: return the graph's own output tensors, which the next call overwrites.
        donated: which of the leaves `run` writes to, or lie where they are in every call. They are never copied: a call
            that has them elsewhere is captured anew.
        borrowed: which of the outputs are leaves, and so are returned as they are.
        on_buffers: read inputs from buffers from the start. Where calls have them then decides nothing: ranks whose
            collectives are in the graph capture it together, or not.
    """

    def __init__(
        self,
        pool: GraphPool,
        run: Run,
        leaves: Sequence[Any],
        static_outputs: bool,
        *,
        donated: Collection[int] = (),
        borrowed: Collection[int] = (),
        on_buffers: bool = False,
    ) -> None:
        self.pool, self.static_outputs = pool, static_outputs
        self._borrowed, self._on_buffers = borrowed, on_buffers
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._device = next(leaf.device.index for leaf in leaves if isinstance(leaf, Tensor))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._donated = [place in donated for place in self._places]
        self._addresses: list[int] = []  # where the graph reads
        self._buffers: list[Tensor] = []  # the memory there, once it is its own
        self._outputs: list[Any] = []

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def drop(self) -> None:
        """Frees the graph and its buffers. The next call captures anew."""
        self._graph, self._buffers, self._outputs = None, [], []

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The outputs for `leaves`. RuntimeError, from the capture, for what a graph cannot hold."""
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(leaves)
        given = [leaves[i] for i in self._places]
        with self.pool.lock:
            self.pool.enter(self._device)
            if self._graph is None:
                self._capture(given, self._on_buffers)
            elif self._addresses != (addresses := [tensor.data_ptr() for tensor in given]):
                if not self._buffers or self._donated_moved(addresses):
                    self._capture(given, on_buffers=True)
                copied = [i for i, own in enumerate(self._donated) if not own]
                torch._foreach_copy_([self._buffers[i] for i in copied], [given[i] for i in copied])
            assert self._graph is not None
            self.pool.used(self)
            self._graph.replay()
            if self.static_outputs:
                return list(self._outputs)
            return [
                t.clone() if isinstance(t, Tensor) and i not in self._borrowed else t
                for i, t in enumerate(self._outputs)
            ]

    def _donated_moved(self, addresses: Sequence[int]) -> bool:
        return any(own and a != b for own, a, b in zip(self._donated, addresses, self._addresses, strict=True))

    def _capture(self, given: Sequence[Tensor], on_buffers: bool) -> None:
        self.drop()
        # Inference tensors could not be written to from outside inference mode, nor the other way round.
        with torch.inference_mode(False), torch.no_grad():
            # As each input lies in memory, but for elements that overlap.
            pairs = zip(given, self._donated, strict=True)
            buffers = [t if own else torch.empty_like(t).copy_(t) for t, own in pairs] if on_buffers else []
            leaves = list(self._constants)
            for place, tensor in zip(self._places, buffers or given, strict=True):
                leaves[place] = tensor
            graph, outputs = self.pool.memory.capture(lambda: list(self._run(leaves)))
        self._addresses = [tensor.data_ptr() for tensor in buffers or given]
        self._graph, self._buffers, self._outputs = graph, buffers, outputs
        drop_before_shutdown(self)


def why_not_captured(leaves: Sequence[Any]) -> str | None:
    """Why a call on these inputs cannot be a CUDA graph, or None."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return "no input is a tensor"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if any(not tensor.is_cuda for tensor in tensors) or len(devices) > 1:
        return f"the inputs are on {', '.join(devices)}; a graph needs all of them on one CUDA device"
    return None
