"""Options of the engine (loads no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from open_mythos.checks import check_count, check_number
from open_mythos.inference.pages import PAGE
from open_mythos.inference.scheduler import CHUNK_LOOP_TOKENS


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs.

    Raises:
        ConfigError: A value is out of range.
    """

    slots: int = 16
    """Sequences that run at the same time."""
    context: int | None = None
    """Most positions of a request; by default and at most the model's max_seq_len."""
    max_loops: int | None = None
    """Deepest request; by default the model's max_loop_iters."""
    exact: bool | None = None
    """Make a request's bits independent of the others; by default on a CPU only."""
    kv_memory: float = 0.8
    """Bytes of the cache if above 1, else the part of the free memory that it may take. At most
    what all slots need at their full length is allocated."""
    overcommit: bool = False
    """Admit more than fits at full length; requests are swapped to host memory if the pages run
    out."""
    prefill_exits: bool = True
    """Apply a request's exit rule to its prompt too, as generate does."""
    chunk_loop_tokens: int = CHUNK_LOOP_TOKENS
    """Positions times loops of a prompt chunk; smaller chunks stall others less."""
    ticks_per_chunk: int = 4
    """Ticks between two chunks while rows loop."""
    edge_fraction: float = 0.625
    """Part of the rows that must wait before coda and head run."""
    page: int = PAGE
    """Positions of a page, a power of two."""
    constant_shapes: bool | None = None
    """Let the device decide which rows run, so that a tick needs no values on the host; by default
    on CUDA, where a tick is a CUDA graph, if the model's steps can be captured."""

    def __post_init__(self) -> None:
        for name in ("slots", "chunk_loop_tokens", "ticks_per_chunk", "page"):
            check_count(name, getattr(self, name))
        for name in ("context", "max_loops"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_number("kv_memory", self.kv_memory, gt=0)
        check_number("edge_fraction", self.edge_fraction, ge=0, le=1)
