"""Size thresholds and padding of routed experts; the memory planner reads them without torch."""

from __future__ import annotations

DEFERRED_TOKENS = 256
"""Most tokens per expert and use at which deferring gradients pays."""
DEFERRED_SIZE = 4
"""Most saved elements of deferred gradients, relative to the stack."""
BATCHED_TOKENS = 2
"""Fewest tokens per expert at which batched matmuls pay, on a CPU in bfloat16."""
ROWS = 2048
"""Most padded rows of a batch of several experts."""
PADDING = 1.5
"""Most rows of a batch, relative to the padded rows of its experts in separate batches."""
MOST = 64
"""Most experts of a batch; a power of two, so that batches have few sizes."""


def padded(count: int) -> int:
    """Round ``count`` up to one of few sizes, so that matmuls have few shapes.

    Multiples of 32; above 256, steps of at most an eighth.
    """
    step = max(32, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
