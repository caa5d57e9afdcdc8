"""The logit lens: what the model would say if it stopped after each loop.

The read-out is the model's own, through coda, norm and head (nostalgebraist, 2020, read out of the
middle of a network that was not made for it; a looped model is made for it).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from open_mythos.dynamics.trajectory import Trajectory
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos


def logit_lens(model: OpenMythos, path: Trajectory) -> Iterator[Tensor]:
    """The log-probabilities (B, T, V), float32, after each loop in turn.

    All positions are read out at the same loop. One loop at a time, so that (L, B, T, V) never has
    to exist.
    """
    with frozen(model, torch.float32) as device:
        for h_BTD in path.states_LBTD[1:]:
            yield model.logits(h_BTD.to(device)).float().log_softmax(-1)


def set_probability(model: OpenMythos, path: Trajectory, sets: Tensor) -> Tensor:
    """The probability of sets of tokens after each loop.

    Args:
        model: The model that ran ``path``.
        path: L loops of (B, T) tokens.
        sets: Boolean (..., V), broadcastable to (..., B, T, V): one set for every position, or a
            set for each, such as the open alternatives of a search.

    Returns:
        (L, ..., B, T).

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
