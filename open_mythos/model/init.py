"""Every initialiser, in one table.

Output projections start at zero, so that each block begins as the identity, unless a norm of the
branch's output follows them: its gradient at zero would be 1 / sqrt(eps). All other matrices are
normal with standard deviation sqrt(2 / (5 D)) (Huginn, arXiv 2502.05171, section 4), biases zero.
The read-out starts at identity; norms and the injection where their modules put them (ones, decay
sqrt(1/5)).
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn


def _zero(weight: Tensor, dim: int) -> None:
    nn.init.zeros_(weight)


def _normal(weight: Tensor, dim: int) -> None:
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * dim)))


def _identity(weight: Tensor, dim: int) -> None:
    nn.init.eye_(weight)


def _keep(weight: Tensor, dim: int) -> None:
    """The module's own start."""


# first match wins; names are those of `named_parameters()`
TABLE = (
    (r"norm\.weight$|injection\.|gate\.bias$", _keep),
    (r"readout\.weight$", _identity),
    (r"_proj\.bias$", _zero),
    # these open a bottleneck, they do not end a residual branch
    (r"(q_down|kv_down)\.weight$|lora\.down$", _normal),
    (r"lora\.up$", _zero),
    (r"out_proj\.weight$|down(\.weight)?$", _zero),
    (r"", _normal),
)


_BRANCH = re.compile(r"(.*\b(?:attn|ffn))\..*(?:out_proj|down)(?:\.weight)?$")
"""Output projections (and down-projections inside) of a branch of a block."""


@torch.no_grad()
def init_weights(module: nn.Module, dim: int) -> None:
    """Initialise all parameters of ``module`` in place from torch's global generator."""
    names = {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        branch = _BRANCH.match(name)
        if branch and f"{branch[1]}_out_norm.weight" in names:
            _normal(parameter, dim)
            continue
        initialise = next(rule for pattern, rule in TABLE if re.search(pattern, name))
        initialise(parameter, dim)
