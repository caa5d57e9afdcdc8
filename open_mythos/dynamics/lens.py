"""Logit lens: next-token predictions after each loop, through the model's own coda and head.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.dynamics.trajectory import Trajectory
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos


@checked
def logit_lens(model: OpenMythos, path: Trajectory) -> Iterator[Tensor]:
    """Yield the log-probabilities (B, T, V), float32, after each loop.

    A generator, so that (L, B, T, V) never exists in memory.
    """
    with frozen(model, torch.float32) as device:
        for h_BTD in path.states_LBTD[1:]:
            yield model.logits(h_BTD.to(device), path.ctx).float().log_softmax(-1)


def set_probability(model: OpenMythos, path: Trajectory, sets: Tensor) -> Tensor:
    """Return the total probability of sets of tokens after each loop, (L, ..., B, T).

    Args:
        model: The model that computed ``path``.
        path: Trajectory of L loops over (B, T) tokens.
        sets: Boolean (..., V), broadcastable to (..., B, T, V): one set for all positions, or one
            per position, such as the open alternatives of a search.

    Raises:
        ConfigError: ``sets`` is not boolean over the vocabulary.
    """
    vocab = model.cfg.vocab_size
    if sets.dtype != torch.bool or sets.shape[-1] != vocab:
        raise ConfigError(
            "not sets of tokens", where="sets", value=f"{sets.dtype} {tuple(sets.shape)}",
            allowed=f"boolean, last axis {vocab}", fix="mark the tokens of each set with True",
        )  # fmt: skip
    sets = sets.to(path.states_LBTD.device)
    return torch.stack([(log_p.exp() * sets).sum(-1) for log_p in logit_lens(model, path)])
