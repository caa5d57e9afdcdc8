"""Training: forward and backward of one step. Excludes the optimizer, which both share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import (
    Finding,
    Measured,
    Row,
    alternate,
    attempt,
    compare,
    distances,
    dtype_name,
    gate,
)  # fmt: skip
from benchmarks.models import FULL, Scale, build, dense_like, new_each_time, random_ids
from benchmarks.plain import common_parts, plain_twin
from benchmarks.roofline import training_work
from open_mythos.accounting import account
from open_mythos.devices import autocast
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.cross_entropy import linear_cross_entropy

GOALS = {
    (torch.float32, (16, 2)): 1.15, (torch.float32, (64, 4)): 1.5, (torch.float32, (256, 8)): 2.5,
    (torch.bfloat16, (16, 2)): 1.3, (torch.bfloat16, (64, 4)): 2.0, (torch.bfloat16, (256, 8)): 3.0,
}  # fmt: skip
EQUAL = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Target for the relative distance between the gradients of fast and plain."""
GATE_SHAPE = (2, 67)
"""Rows and tokens of the gate: small, and odd on purpose."""
UNTIMED = {torch.float32: 0, torch.bfloat16: 2}
"""Steps before the timed one of a turn: half precision compiles, and keeps a limited number of
kernels, which the forms between have displaced."""
REST = "all parts but the routed experts"


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return (
        f"training step (forward, backward), dim {scale.dim}, {scale.n_loops} loops, "
        f"{scale.batch} x {scale.tokens} tokens"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """One row for every number of experts and dtype with MLA, one dtype with GQA; then gradients,
    and what new tokens cost."""
    equal: dict[torch.dtype, list[tuple[float, float]]] = {}
    for attn_type, dtypes in (("mla", tuple(EQUAL)), ("gqa", (torch.bfloat16,))):
        for experts in scale.experts if attn_type == "mla" else scale.experts[:1]:
            fast = build(scale, attn_type, experts)
            plain = plain_twin(fast)
            for dtype in dtypes:
                name = f"{attn_type}, {experts[0]} experts top-{experts[1]}"
                near = equal.setdefault(dtype, [])
                take = partial(_row, scale, fast, plain, name, experts, dtype, near)
                yield attempt(name, dtype, take)
            del fast, plain, take  # before the next, which may be as large
    for dtype, found in equal.items():
        yield _equality(scale, dtype, found)
    yield from _new_tokens(scale, scale.experts[0])


def _row(
    scale: Scale,
    fast: OpenMythos,
    plain: OpenMythos,
    name: str,
    experts: tuple[int, int],
    dtype: torch.dtype,
    near: list[tuple[float, float]],
) -> Row:
    small = random_ids(*GATE_SHAPE)
    results = [gradients(model, small, scale.n_loops, dtype) for model in (fast, plain)]
    reference = gradients(plain, small, scale.n_loops, torch.float32)
    errors = gate(name, *results, reference=reference, dtype=dtype)
    away = sorted(distances(*results))
    near.append((away[-1] if dtype == torch.float32 else away[len(away) // 2], errors[1]))
    del results, reference
    dense, rest = dense_like(fast.cfg, scale.n_loops), common_parts(fast, attention=False)
    goals = GOALS if scale is FULL else {}
    row = compare(
        name,
        dtype,
        _step(scale, fast, dtype),
        _step(scale, plain, dtype),
        dense=_step(scale, dense, dtype),
        rest=(REST, _step(scale, rest, dtype)),
        # the largest takes a minute in two turns, and long calls vary less
        alternations=scale.alternations if experts[0] <= 64 else min(2, scale.alternations),
        untimed=UNTIMED[dtype],
        goal=goals.get((dtype, experts)) if fast.cfg.attn_type == "mla" else None,
        errors=errors,
        work=training_work(fast.cfg, scale.n_loops, scale.batch, scale.tokens),
        numbers={
            "tokens": scale.batch * scale.tokens,
            "experts": experts[0],
            "dense_flops": account(dense).training_flops(context=scale.tokens)
            / account(fast, scale.n_loops).training_flops(context=scale.tokens),
        },
    )
    for model in (fast, plain):
        model.zero_grad(set_to_none=True)
    return row


def _step(
    scale: Scale, model: OpenMythos | DenseTransformer, dtype: torch.dtype
) -> Callable[[], object]:
    """Return a training step that takes new tokens at every call."""
    ids = new_each_time(lambda seed: random_ids(scale.batch, scale.tokens, seed=seed))
    n_loops = scale.n_loops if isinstance(model, OpenMythos) else None
    return lambda: gradients(model, ids(), n_loops, dtype)


def _new_tokens(scale: Scale, experts: tuple[int, int]) -> Iterator[Finding]:
    """Measure the cost of new routing at every step."""
    dtype, fast = torch.bfloat16, build(scale, "mla", experts)
    ids = random_ids(scale.batch, scale.tokens)
    calls: dict[str, Callable[[], object]] = {}
    for form, model in (("fast", fast), ("plain", plain_twin(fast))):
        calls[f"{form}, new"] = _step(scale, model, dtype)
        calls[f"{form}, same"] = partial(gradients, model, ids, scale.n_loops, dtype)
    times = alternate(calls, turns=scale.alternations, untimed=UNTIMED[dtype])
    for form in ("fast", "plain"):
        new, same = (times[f"{form}, {tokens}"].wall for tokens in ("new", "same"))
        yield Finding(
            f"mla, {experts[0]} experts top-{experts[1]}, {form} form: "
            "new tokens every time over the same ones",
            dtype_name(dtype), new / same, "x", seconds=new, threads=torch.get_num_threads(),
        )  # fmt: skip


def _equality(scale: Scale, dtype: torch.dtype, found: list[tuple[float, float]]) -> Finding:
    """Report the largest distance between fast and plain gradients over all models."""
    worst, plain_error = max(found)
    return Finding(
        "gradients of the fast path against those of the reference, relative distance",
        dtype_name(dtype), worst, "", goal=EQUAL[dtype] if scale is FULL else None, at_most=True,
        why="the worst tensor of all models" if dtype == torch.float32 else
        "the median tensor of the worst model; the reference itself is "
        f"{plain_error:.1e} from its own float32 gradients, and a rounded router score "
        "sends a token to another expert in either form",
        error=worst, threads=torch.get_num_threads(),
    )  # fmt: skip


def gradients(
    model: OpenMythos | DenseTransformer, ids_BT: Tensor, n_loops: int | None, dtype: torch.dtype
) -> list[Tensor]:
    """Return the loss, the final hidden state and the weight gradients."""
    model.zero_grad(set_to_none=True)
    with autocast(ids_BT.device, dtype):
        hidden_BTD = model.hidden(ids_BT, model.context(ids_BT), Depth(n_loops))
        loss = linear_cross_entropy(hidden_BTD, model.head.weight, ids_BT)
    loss.backward()
    weights = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), hidden_BTD.detach(), *weights]
