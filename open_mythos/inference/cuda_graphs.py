"""CUDA graphs of work that is the same on the same memory every time."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Pieces of work on a CUDA device, each captured once and then replayed.

    A piece runs plainly the first time, on the stream of the captures: libraries allocate their
    workspaces and kernels are compiled then, neither of which a capture may do. The second time it
    is captured. It must read and write the same memory whenever it runs, and leave nothing behind
    but what it writes to memory that it did not allocate.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: Hashable, piece: Callable[[], None]) -> None:
        """Do the work of ``piece``; equal keys mean the same work on the same memory."""
        if key not in self._graphs:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                piece()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                piece()
            self._graphs[key] = graph
        graph.replay()
