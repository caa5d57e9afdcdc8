"""The training loss: next-token loss at the last loop, expert balance, and distillation.

Every term is divided by a count over the whole optimizer step, so that the sum over micro-batches
and ranks is the loss of the global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.checks import check_number, checked
from open_mythos.data.batch import IGNORE_INDEX
from open_mythos.errors import ConfigError
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.layers.head import head_loss
from open_mythos.model.trace import LoopTrace
from open_mythos.train.distillation import Teacher


class LossOutput(NamedTuple):
    """Contribution of one micro-batch to the loss of its step; float32 scalars."""

    total: Tensor
    """``nll`` plus the weighted ``balance`` and divergence from a teacher, with gradient."""
    nll: Tensor
    """Negative log-likelihood of the next tokens in nats, divided by the tokens of the step."""
    balance: Tensor
    """Sequence-wise balance loss, divided by the sequences of the step; 0 without experts."""


def count_targets(targets_BT: Tensor) -> int:
    """Return the number of positions with a target."""
    return int((targets_BT != IGNORE_INDEX).sum())


@checked
def next_token_loss(
    model: CausalLM,
    input_ids: Tensor,
    targets: Tensor,
    *,
    step_tokens: int,
    step_sequences: int,
    document_ids: Tensor | None = None,
    sample_seeds: Tensor | None = None,
    balance_coefficient: float = 0.0,
    teacher: Teacher | None = None,
    depth: Depth | None = None,
    trace: LoopTrace | None = None,
) -> LossOutput:
    """Return the loss of one micro-batch, of every sequence at its own last loop.

    Args:
        model: A looped or a dense model.
        input_ids: (B, T) token ids.
        targets: (B, T) next tokens; -100 for none.
        step_tokens: Targets of the whole optimizer step.
        step_sequences: Sequences of the whole optimizer step.
        document_ids: (B, T); attention is restricted to the own document.
        sample_seeds: (B,) keys of dropout and of random initial states.
        balance_coefficient: Weight of :func:`sequence_balance_loss`; above 0 it needs a ``trace``
            with ``keep_routing``.
        teacher: Adds the divergence from this model.
        depth: Loops of a looped model, and how many of them carry gradient.
        trace: Receives diagnostics of the loops.
    """
    check_number("balance_coefficient", balance_coefficient, ge=0)
    if balance_coefficient and trace is None:
        raise ConfigError(
            "the balance loss needs router scores", where="trace", value=None,
            allowed="LoopTrace(keep_routing=True)", fix="pass one, or balance_coefficient=0",
        )  # fmt: skip
    ctx = model.context(input_ids, document_ids=document_ids, sample_seeds=sample_seeds)
    hidden_BTD = model.hidden(input_ids, ctx, depth, trace)
    nll = head_loss(model.head, hidden_BTD, targets, IGNORE_INDEX) / max(1, step_tokens)
    total, balance = nll, torch.zeros_like(nll, requires_grad=False)
    if teacher is not None:
        apart = teacher.loss(hidden_BTD, model.head, input_ids, targets, document_ids)
        total = total + apart / max(1, step_tokens)
    if balance_coefficient:
        assert trace is not None
        balance = sequence_balance_loss(trace, len(input_ids)).sum() / step_sequences
        total = total + balance_coefficient * balance
    return LossOutput(total, nll.detach(), balance.detach())


def sequence_balance_loss(trace: LoopTrace, batch: int, valid_BT: Tensor | None = None) -> Tensor:
    """Return the sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17-20).

    For one sequence of T tokens, E experts and top-C routing, in one MoE layer and loop,

        f_i = E / (C T) * tokens that chose expert i
        P_i = mean over tokens of score_i / sum of the token's scores
        loss = sum over i of f_i P_i

    which is 1 for even routing and at most E / C. A sequence's loss is the mean over the layers
    and loops that it ran, so that deep sequences weigh no more. The gradient flows through P.

    Args:
        trace: Trace of a forward pass with ``keep_routing``.
        batch: Rows B of that pass.
        valid_BT: False on padding, which is excluded; None without padding.

    Returns:
        (B,) float32.

    Raises:
        ConfigError: The trace holds no routing.
    """
    if not trace.scores:
        raise ConfigError(
            "no routing to balance", where="trace",
            value=f"keep_routing={trace.keep_routing}, {len(trace.load)} mixture records",
            allowed="a trace with keep_routing=True, of a model with experts",
            fix="set train.balance_coefficient to 0 for a model without experts",
        )  # fmt: skip
    device = next(iter(trace.scores.values())).device
    total_B, records_B = torch.zeros(batch, device=device), torch.zeros(batch, device=device)
    for (layer, loop), scores_RTE in trace.scores.items():
        rows_R = trace.rows(loop)
        if rows_R is None:
            rows_R = torch.arange(batch, device=device)
        valid_RT = None if valid_BT is None else valid_BT[rows_R]
        loss_R = _balance(scores_RTE, trace.experts[layer, loop], valid_RT)
        total_B = total_B.index_add(0, rows_R, loss_R)
        records_B = records_B.index_add(0, rows_R, torch.ones_like(loss_R))
    return total_B / records_B


def _balance(scores_RTE: Tensor, experts_RTC: Tensor, valid_RT: Tensor | None) -> Tensor:
    """Return (R,), the sum over experts of f_i P_i."""
    weight_RT = torch.ones_like(scores_RTE[..., 0]) if valid_RT is None else valid_RT.float()
    tokens_R1 = weight_RT.sum(1, keepdim=True).clamp_min(1)
    n_experts, n_chosen = scores_RTE.shape[-1], experts_RTC.shape[-1]
    chosen_RE = torch.zeros_like(scores_RTE[:, 0]).scatter_add_(
        1, experts_RTC.flatten(1), weight_RT.repeat_interleave(n_chosen, dim=1)
    )
    f_RE = n_experts / (n_chosen * tokens_R1) * chosen_RE
    share_RTE = scores_RTE / scores_RTE.sum(-1, keepdim=True)
    p_RE = (share_RTE * weight_RT.unsqueeze(-1)).sum(1) / tokens_R1
    return (f_RE * p_RE).sum(-1)
