"""A check of logits before a token is chosen."""

from __future__ import annotations

from torch import Tensor

from open_mythos.devices import is_readable
from open_mythos.errors import ConfigError


def check_logits(logits_BV: Tensor) -> None:
    """Check that all logits are finite; on a device, where reading them would wait, do nothing.

    Raises:
        ConfigError: A row holds NaN or infinity, of which no token could be chosen.
    """
    if is_readable(logits_BV):
        check_rows(logits_BV.isfinite().all(-1))


def check_rows(finite_B: Tensor) -> None:
    """Check that the logits of all rows were finite; waits for a device.

    Raises:
        ConfigError: Those of a row were not.
    """
    if not finite_B.all():
        raise ConfigError(
            "the model computed logits that are not finite", where="generate",
            value=f"rows {(~finite_B).nonzero().flatten().tolist()}", allowed="finite numbers",
            fix="load the model in float32, or take an earlier checkpoint",
        )  # fmt: skip
