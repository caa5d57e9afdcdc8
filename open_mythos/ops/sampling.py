"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.ops.random import counter_uniform


def penalise_repetition(logits_BV: Tensor, seen_BT: Tensor, penalty: float) -> Tensor:
    """Make tokens that have occurred less likely (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        logits_BV: Logits.
        seen_BT: Token ids that have occurred in each row; negative entries are ignored.
        penalty: Positive logits are divided by it, negative ones multiplied; 1 changes nothing.
    """
    if penalty == 1.0:
        return logits_BV
    seen_BV = torch.zeros_like(logits_BV).scatter_(1, seen_BT.clamp_min(0), (seen_BT >= 0).to(logits_BV), reduce="add") > 0
    scaled_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, scaled_BV, logits_BV)


def filter_logits(
    logits_BV: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Set the logits of tokens that may not be drawn to -inf.

    Args:
        logits_BV: Logits, temperature already applied.
        top_k: Keep the k most likely tokens (0: all).
        top_p: Keep the smallest set of tokens whose probability reaches ``top_p``
            (arXiv 1904.09751); at least one.
        min_p: Keep tokens at least ``min_p`` times as likely as the most likely one
            (arXiv 2407.01082).
    """
    if 0 < top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits_BV.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter_(1, index, ordered)
    if min_p > 0.0:
        probability = logits_BV.softmax(-1)
        floor = min_p * probability.max(-1, keepdim=True).values
        logits_BV = logits_BV.masked_fill(probability < floor, -torch.inf)
    return logits_BV


def sample_tokens(logits_BV: Tensor, keys_B: Tensor, position: int) -> Tensor:
    """Draw one token per row from softmax(logits), (B,).

    The draw is a function of the row's key and the position alone (the Gumbel-max method over
    counter-based noise), so a row's tokens do not depend on its batch or on the device.
    """
    position_1 = torch.tensor([position], device=logits_BV.device)
    uniform = counter_uniform(keys_B, position_1, logits_BV.shape[-1], salt=0).squeeze(1)
    return (logits_BV - torch.log(-torch.log(uniform))).argmax(-1)
