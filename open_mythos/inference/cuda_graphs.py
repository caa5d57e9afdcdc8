"""Capture and replay of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.layers.moe import MoEFFN


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


def capture_problem(model: CausalLM) -> str | None:
    """Return why steps of ``model`` cannot be captured, or None: experts may not sync."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            backend = getattr(module.experts, "backend", "auto")
            if backend not in ("auto", "grouped"):
                return f'moe_backend="{backend}", whose load is read on the host'
            for name, stack in module.named_parameters(recurse=False):
                if not _grouped_without_sync(stack):
                    return f"experts whose grouped matmuls read the load on the host ({name})"
    return None


def _grouped_without_sync(stack: Tensor) -> bool:
    """Return whether PyTorch has a grouped matmul kernel: bfloat16, capability 9.0 and above."""
    aligned = all(width * stack.element_size() % 16 == 0 for width in stack.shape[1:])
    capable = not stack.is_cuda or torch.cuda.get_device_capability(stack.device) >= (9, 0)
    return aligned and capable and stack.dtype == torch.bfloat16
