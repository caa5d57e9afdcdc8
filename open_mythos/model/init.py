"""Initialization of all parameters, in one table.

Output projections start at zero, so that each block starts as the identity, unless a norm of the
branch output follows: its gradient at zero would be 1 / sqrt(eps). All other matrices are normal
with standard deviation sqrt(2 / (5 D)) (Huginn, arXiv 2502.05171, section 4), biases are zero, and
the readout is the identity. Norms (ones) and the injection (decay sqrt(1/5)) keep their defaults.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

# first match wins; names are those of `named_parameters()`
TABLE = (
    (r"norm\.weight$|injection\.|gate\.bias$", "keep"),
    (r"readout\.weight$", "identity"),
    (r"_proj\.bias$|value_gate\.weight$", "zero"),
    # these open a bottleneck, they do not end a residual branch
    (r"(q_down|kv_down)\.weight$|lora\.down$", "normal"),
    (r"lora\.up$", "zero"),
    (r"out_proj\.weight$|down(\.weight)?$", "zero"),
    (r"", "normal"),
)
_BRANCH = re.compile(r"(.*\b(?:attn|ffn))\..*(?:out_proj|down)(?:\.weight)?$")
"""Output projections (and down-projections inside) of a branch of a block."""


@torch.no_grad()
def init_weights(module: nn.Module, dim: int) -> None:
    """Initialize all parameters of ``module`` in place from torch's global generator."""
    names = {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        rule = next(rule for pattern, rule in TABLE if re.search(pattern, name))
        branch = _BRANCH.match(name)
        if branch and f"{branch[1]}_out_norm.weight" in names:
            rule = "normal"
        if rule == "normal":
            nn.init.normal_(parameter, std=math.sqrt(2 / (5 * dim)))
        elif rule == "zero":
            nn.init.zeros_(parameter)
        elif rule == "identity":
            nn.init.eye_(parameter)
