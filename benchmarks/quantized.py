"""Decoding with rounded weights, against the same model in bfloat16.

Weights in 8 or 4 bits are fewer bytes to read, and more work for every row that is multiplied with
them: they win for few rows. The gate holds a quantized model to its reference, the same model with
every block's matrices replaced by what rounding left of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.clock import threads
from benchmarks.decoding import decoder
from benchmarks.measure import Measured, Row, attempt, compare, gate
from benchmarks.models import FULL, Scale, build, random_ids
from open_mythos.inference.quantization import DEFAULT_GROUP, quantize, weight_bytes
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.quantized import pack

KINDS = {"int8": 0, "int4": DEFAULT_GROUP}
"""Kind -> inputs of a group."""
EXPERTS = (8, 2)
BATCHES = (1, 2, 4, 8)
GOALS = {("int8", batch): 1.0 for batch in (1, 2, 4)}
"""Rows from which bfloat16 is faster."""
CONTEXT = 128
REPEATS = 2
"""Tokens of a turn."""


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return (
        f"rounded weights against bfloat16, dim {_wide(scale).dim}, {scale.n_loops} loops, MLA, "
        f"{EXPERTS[0]} experts top-{EXPERTS[1]}, one thread"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """For both kinds: a token for each of 1, 2, 4 and 8 rows, and a prompt."""
    model = build(_wide(scale), "mla", EXPERTS).eval()
    low = copy.deepcopy(model).bfloat16()
    for kind, group in KINDS.items():
        twin = rounded_twin(model, group)
        ways = quantize(copy.deepcopy(model), kind), low, copy.deepcopy(twin).bfloat16(), twin
        for batch in BATCHES:
            name = f"{kind}, decoding, batch {batch}"
            goal = GOALS.get((kind, batch)) if scale is FULL else None
            with threads(1):
                yield attempt(
                    name, torch.bfloat16, partial(_decoding, scale, ways, batch, name, goal)
                )
        name = f"{kind}, prompt of {scale.tokens} tokens"
        with threads(1):
            yield attempt(name, torch.bfloat16, partial(_prompt, scale, ways, name))


Model = TypeVar("Model", bound=CausalLM)
Ways = tuple[OpenMythos, OpenMythos, OpenMythos, OpenMythos]
"""Quantized; in bfloat16; the reference in bfloat16; the reference in float32."""


@torch.no_grad()
def rounded_twin(model: Model, group: int) -> Model:
    """Copy ``model`` with dequantized weights as ordinary tensors."""
    twin = copy.deepcopy(model)
    for block in twin.modules():
        if not isinstance(block, TransformerBlock):
            continue
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(("kv_up", "router")):
                module.weight.copy_(pack(module.weight, group).unpacked(torch.float32).mT)
            if isinstance(module, MoEFFN):
                for stack in (module.gate_up, module.down):
                    stack.copy_(pack(stack.mT, group).unpacked(torch.float32))
    return twin


def _wide(scale: Scale) -> Scale:
    """Wide enough that weights are most of what a step reads."""
    return replace(scale, dim=max(256, 2 * scale.dim))


def _decoding(scale: Scale, ways: Ways, batch: int, name: str, goal: float | None) -> Row:
    steps = [decoder(model, KVCache(CONTEXT), batch, CONTEXT // 2, scale.n_loops) for model in ways]
    logits = [list(step()) for step in steps]
    return _row(scale, ways, name, goal, steps, logits, REPEATS)


def _prompt(scale: Scale, ways: Ways, name: str) -> Row:
    ids = random_ids(1, scale.tokens)

    @torch.no_grad()
    def read(model: OpenMythos) -> Tensor:
        ctx = model.context(ids, KVCache(scale.tokens))
        with torch.no_grad():
            return model.head(model.hidden(ids, ctx, Depth(scale.n_loops))[:, -1])

    calls = [partial(read, model) for model in ways]
    return _row(scale, ways, name, None, calls, [[call()] for call in calls], 1)


def _row(
    scale: Scale,
    ways: Ways,
    name: str,
    goal: float | None,
    calls: list[Callable[[], Tensor]],
    logits: list[list[Tensor]],
    repeats: int,
) -> Row:
    quantized, _, twin, reference = logits
    sizes = [weight_bytes(model) for model in ways[:2]]
    return compare(
        name,
        torch.bfloat16,
        *calls[:2],
        alternations=scale.turns,
        repeats=repeats,
        goal=goal,
        errors=gate(name, quantized, twin, reference=reference, dtype=torch.bfloat16),
        numbers={
            "bytes_per_token": sizes[0].per_token(scale.n_loops),
            "bytes_per_token_bfloat16": sizes[1].per_token(scale.n_loops),
        },
    )
