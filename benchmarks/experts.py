"""The expert layer alone, forward and backward, as every loop runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import device
from benchmarks.measure import Measured, Row, attempt, compare, gate
from benchmarks.models import FULL, Scale, config, new_each_time, noisy, sharing
from benchmarks.plain import ChoiceByChoice
from benchmarks.roofline import Work
from open_mythos.model.layers.experts import Experts, RoutedExperts
from open_mythos.model.layers.feed_forward import Expert
from open_mythos.model.layers.moe import MoEFFN

GOALS = {(torch.bfloat16, (16, 2)): 2.5, (torch.bfloat16, (64, 4)): 5.0}
GATE_TOKENS = 67
LOOPED_CHOICES = ((16, 2), (64, 4))
"""Experts that are also compared with a loop over choices and experts, which is slow for more."""
SHARED = 2
"""Of a pass: its result and its input's gradient, which do not depend on how weights are kept."""
FIRST, BATCHES = 3, 11
"""Passes before those that are timed, and batches of tokens, each with choices of its own."""
REST = "routing, without any expert"


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return (
        f"layer of experts, forward and backward, dim {scale.dim}, expert dim {scale.dim // 2}, "
        f"{scale.layer_tokens} tokens"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """One row for every number of experts and dtype; a few more against another reference."""
    for experts in scale.layers:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{experts[0]} experts top-{experts[1]}"
            yield attempt(name, dtype, partial(_row, scale, experts, dtype, name))
    for experts in LOOPED_CHOICES if scale is FULL else scale.layers:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{experts[0]} experts top-{experts[1]}, against a loop over choices and experts"
            yield attempt(name, dtype, partial(_choices, scale, experts, dtype, name))


def _row(scale: Scale, experts: tuple[int, int], dtype: torch.dtype, name: str) -> Row:
    cfg = replace(config(scale, "mla", experts), n_shared_experts=0)
    chosen = min(experts[1], experts[0])
    fast = noisy(lambda: MoEFFN(cfg)).to(dtype)
    # the weights are the same tensors: a second copy of 512 experts would be 800 MB
    plain = _variant(fast, "reference")
    exact = noisy(lambda: MoEFFN(cfg)).to(dtype).float() if dtype != torch.float32 else fast
    small = _tokens(scale.dim, GATE_TOKENS)
    errors = gate(
        name,
        _gradients(fast, small.to(dtype)),
        _gradients(plain, small.to(dtype)),
        reference=_gradients(_variant(exact, "reference"), small.to(dtype).float()),
        dtype=dtype,
    )
    del exact
    dense = noisy(lambda: Expert(scale.dim, chosen * cfg.expert_dim)).to(dtype)
    weights = fast.gate_up.numel() + fast.down.numel() + fast.router.weight.numel()
    matmuls = scale.dim * (3 * chosen * cfg.expert_dim + experts[0])
    return compare(
        name,
        dtype,
        _step(scale, fast, dtype),
        _step(scale, plain, dtype),
        dense=_step(scale, dense, dtype),
        rest=(REST, _step(scale, fast, dtype, _routing)),
        # many experts take long, and long calls vary less
        alternations=scale.turns if experts[0] <= 64 else scale.alternations,
        untimed=int(dtype == torch.bfloat16),
        goal=GOALS.get((dtype, experts)) if scale is FULL else None,
        errors=errors,
        work=Work(
            6 * matmuls * scale.layer_tokens,
            3 * weights * dtype.itemsize,
            weights * dtype.itemsize,
        ),
        numbers={"tokens": scale.layer_tokens, "experts": experts[0], "chosen": chosen},
    )


def _choices(scale: Scale, experts: tuple[int, int], dtype: torch.dtype, name: str) -> Row:
    """Compare the layer with a naive loop over choices and experts."""
    layer = noisy(lambda: MoEFFN(replace(config(scale, "mla", experts), n_shared_experts=0)))
    small = _tokens(scale.dim, GATE_TOKENS)
    reference = _gradients(_variant(layer, "reference"), small)[:SHARED]
    fast = layer.to(dtype)
    plain = _with(fast, ChoiceByChoice(fast))
    plain.gate_up = plain.down = None
    results = [_gradients(each, small.to(dtype))[:SHARED] for each in (fast, plain)]
    return compare(
        name,
        dtype,
        _step(scale, fast, dtype),
        _step(scale, plain, dtype),
        alternations=scale.turns,
        untimed=int(dtype == torch.bfloat16),
        goal=GOALS.get((dtype, experts)) if scale is FULL else None,
        errors=gate(name, *results, reference=reference, dtype=dtype),
        numbers={"tokens": scale.layer_tokens, "chosen": experts[1]},
    )


def _step(
    scale: Scale,
    layer: nn.Module,
    dtype: torch.dtype,
    call: Callable[[Any, Tensor], object] | None = None,
) -> Callable[[], object]:
    """A pass of ``layer`` over other tokens at every call; some of them first, untimed."""
    tokens = [_tokens(scale.dim, scale.layer_tokens, seed).to(dtype) for seed in range(BATCHES)]
    x_ND = new_each_time(lambda seed: tokens[seed % len(tokens)])
    call = call or _gradients
    for _ in range(FIRST):
        call(layer, x_ND())
    return lambda: call(layer, x_ND())


def _variant(layer: MoEFFN, backend: str) -> MoEFFN:
    """Return the layer with shared weights and another backend."""
    return _with(layer, RoutedExperts(backend))


def _with(layer: MoEFFN, experts: Experts) -> MoEFFN:
    """Return the layer with shared weights and other experts."""
    twin = sharing(layer)
    twin.experts = experts
    return twin


def _tokens(dim: int, n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator).to(device())


def _gradients(layer: nn.Module, x_ND: Tensor) -> list[Tensor]:
    """Return the result and the gradients of the input and of every weight."""
    layer.zero_grad(set_to_none=True)
    x_ND = x_ND.detach().requires_grad_()
    y_ND = layer(x_ND)
    # not the gradient of a sum, which is one expanded number
    y_ND.backward(x_ND.detach().to(y_ND.dtype))
    assert x_ND.grad is not None
    weights = [p.grad for p in layer.parameters() if p.grad is not None]
    return [y_ND.detach(), x_ND.grad, *weights]


def _routing(layer: MoEFFN, x_ND: Tensor) -> None:
    """Run the router alone, forward and backward."""
    _, _, weights_NC = layer.route(x_ND.detach().requires_grad_())
    weights_NC.backward(torch.ones_like(weights_NC))
