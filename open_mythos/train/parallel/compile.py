"""Compile blocks with ``torch.compile``: one graph for all loops and for all identical blocks.

The unit of compilation is the block, because the whole model would need a graph per number of
loops. Whatever changes from loop to loop stays outside the graph: the loop index is a tensor, used
only by dropout; half-precision weights and deferred gradients belong to the call and are passed as
operands; diagnostics are recorded afterwards.

Loops with gradient and loops without (truncated back-propagation, evaluation) have a graph each.
Rows that exit the loop early change the batch size, which is symbolic; a single row has its own
graph. Calls with a cache are not compiled.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from open_mythos.model.context import Context
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.moe import MoEFFN, Routing
from open_mythos.ops.attention.visibility import Visibility

MOST_GRAPHS = 32
"""Maximum number of graphs of all blocks, beyond which they run eagerly. PyTorch's default of 8 is
too low for gradient or none, one row or more, training or evaluation, and changing batch sizes."""


def compile_block(block: TransformerBlock, *, rows_leave: bool, backend: str = "inductor") -> None:
    """Set ``block.compiled``, which compiles at its first call.

    With ``rows_leave``, the number of rows is symbolic from the first call on; a graph specialized
    to a constant number is slightly faster.
    """
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = MOST_GRAPHS
    graph = torch.compile(block.compute, backend=backend, **limit)

    def compiled(x_BTD: Tensor, ctx: Context, loop: int | Tensor) -> tuple[Tensor, Routing | None]:
        if ctx.cache is not None or not x_BTD.numel():
            return block.compute(x_BTD, ctx, loop)
        # an adapter around the mixture changes its weights during the call alone
        mixture = block.ffn if isinstance(block.ffn, MoEFFN) else None
        operands = None if mixture is None else mixture.operands(x_BTD, ctx)
        drops = block.cfg.dropout > 0 and block.training
        loop = torch.as_tensor(loop, device=x_BTD.device) if drops else 0
        if rows_leave and len(x_BTD) > 1:
            torch._dynamo.maybe_mark_dynamic(x_BTD, 0)
        return graph(x_BTD, _bare(ctx, rows_leave), loop, operands)

    block.compiled = compiled


def _bare(ctx: Context, rows_leave: bool) -> Context:
    """Return the part of ``ctx`` that attention and dropout read, which is constant over loops."""

    def of_rows(x: Any, axis: int = 0) -> Any:
        """Mark ``axis``, the batch, of an alias of ``x`` as dynamic; other code knows its size."""
        if x is None or not rows_leave or x.shape[axis] == 1:
            return x
        alias = x.view_as(x)  # with its gradient, if it has one
        torch._dynamo.maybe_mark_dynamic(alias, axis)
        return alias

    positions, ropes, mask = ctx.positions, ctx.ropes, ctx.mask
    if positions.dim() == 2:
        positions = of_rows(positions)
        ropes = {rotary: of_rows(rope, 1) for rotary, rope in ropes.items()}
    if isinstance(mask, Visibility):
        marks = (of_rows(x) for x in (mask.valid_BS, mask.run_BS, mask.columns_BT))
        mask = Visibility(mask.n_queries, mask.n_columns, mask.device, *marks)
    else:
        mask = of_rows(mask)
    values = {layer: of_rows(each) for layer, each in ctx.values.items()}
    return Context(positions, ropes, mask, ctx.columns, keys_B=of_rows(ctx.keys_B), values=values)
