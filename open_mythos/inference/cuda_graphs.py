"""Capture and replay of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """CUDA graphs by key: the first run is eager, the second is captured, later ones replay.

    The eager run lets libraries allocate workspaces and kernels compile, which a capture may not.
    A piece must read and write the same memory in every run.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def clear(self) -> None:
        """Forget all graphs: their memory is gone."""
        self._graphs.clear()

    def run(self, key: Hashable, piece: Callable[[], None]) -> None:
        """Run ``piece``; equal keys must mean the same work on the same memory."""
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
