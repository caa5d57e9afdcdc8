"""Blocks as compiled graphs: one for all loops, and for all blocks that are made alike.

A loop runs the same block again and again, so the block is what is compiled: the whole model would
be one graph for every number of loops. What changes from loop to loop stays outside of it. The
number of the loop enters as a tensor, and only where there is dropout; weights in half precision,
and gradients that wait for all loops, belong to the call and come in as operands; diagnostics are
recorded afterwards.

One graph is made for loops with gradient and another for loops without (truncated back-propagation,
evaluation). Rows that leave the loop early change the size of the batch, which is an unknown of the
graph; a single row is a case of its own. Calls with a cache run as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from open_mythos.model.context import Context
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.moe import Routing
from open_mythos.ops.attention.visibility import Visibility

MOST_GRAPHS = 32
"""Graphs of all blocks together, beyond which they run as they are: gradients or none, one row or
more, training or evaluation, a batch that changes. PyTorch's own 8 are soon used up."""


def compile_block(block: TransformerBlock, *, rows_leave: bool, backend: str = "inductor") -> None:
    """Set ``block.compiled``, which is compiled when it is first called.

    Args:
        block: Changed in place.
        rows_leave: Whether the number of rows is symbolic in the graph from the first call on.
            Where it never changes, a graph specialized to it is a little faster.
        backend: Of ``torch.compile``.
    """
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = MOST_GRAPHS
    graph = torch.compile(block.compute, backend=backend, **limit)

    def compiled(x_BTD: Tensor, ctx: Context, loop: int | Tensor) -> tuple[Tensor, Routing | None]:
        if ctx.cache is not None or not x_BTD.numel():
            return block.compute(x_BTD, ctx, loop)
        operands = block.ffn.operands(x_BTD, ctx) if block.use_moe else None
        drops = block.dropout > 0 and block.training
        loop = torch.as_tensor(loop, device=x_BTD.device) if drops else 0
        if rows_leave and len(x_BTD) > 1:
            torch._dynamo.maybe_mark_dynamic(x_BTD, 0)
        return graph(x_BTD, _bare(ctx, rows_leave), loop, operands)

    block.compiled = compiled


def _bare(ctx: Context, rows_leave: bool) -> Context:
    """What attention and dropout read of ``ctx``, and nothing that changes from loop to loop."""

    def of_rows(x: Any, axis: int = 0) -> Any:
        """``x``, whose ``axis`` is the batch; others than the loop know its size."""
        if x is None or not rows_leave or x.shape[axis] == 1:
            return x
        alias = x.detach()
        torch._dynamo.maybe_mark_dynamic(alias, axis)
        return alias

    positions, rope, mask = ctx.positions, ctx.rope, ctx.mask
    if positions.dim() == 2:
        positions, rope = of_rows(positions), of_rows(rope, 1)
    if isinstance(mask, Visibility):
        marks = (of_rows(x) for x in (mask.valid_BS, mask.run_BS, mask.columns_BT))
        mask = Visibility(mask.n_queries, mask.n_columns, mask.device, *marks)
    else:
        mask = of_rows(mask)
    return Context(positions, rope, mask, ctx.columns, keys_B=of_rows(ctx.keys_B))
