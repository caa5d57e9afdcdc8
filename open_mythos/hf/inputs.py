"""Arguments of a call, as ``transformers`` names them, to a context of the core."""

from __future__ import annotations

import difflib
from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from open_mythos.errors import ConfigError
from open_mythos.hf.cache import SlotCache
from open_mythos.model.context import Context
from open_mythos.model.mythos import OpenMythos

OWN_ARGUMENTS = (
    "n_loops", "grad_loops", "exit_rule", "output_loop_states", "output_router_scores",
)  # fmt: skip
"""Arguments of ``forward`` that other models do not have."""


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache under either of its names.

    Raises:
        ConfigError: There are two, or it is none of ``transformers``.
    """
    given = past_key_values if cache is None else cache
    two = None not in (past_key_values, cache) and past_key_values is not cache
    if two or not (given is None or isinstance(given, Cache)):
        raise ConfigError(
            "not one cache", where="past_key_values",
            value="two caches" if two else type(given).__name__,
            allowed="None, a DynamicCache or a StaticCache",
            fix="pass past_key_values=DynamicCache(), or use_cache=True",
        )  # fmt: skip
    return given


def check_spelling(others: Collection[str]) -> None:
    """Check that no argument meant for ``transformers`` is a misspelt one of the model's own.

    Raises:
        ConfigError: One is.
    """
    for name in others:
        meant = difflib.get_close_matches(name, OWN_ARGUMENTS, n=1, cutoff=0.8)
        if meant:
            raise ConfigError(
                "unknown argument", where="forward", value=name, allowed=", ".join(OWN_ARGUMENTS),
                fix=f"did you mean {meant[0]!r}?",
            )  # fmt: skip


class Inputs:
    """Tokens, padding, packed documents and cache of a call.

    Args:
        core: The model.
        input_ids: (B, T) token ids.
        inputs_embeds: (B, T, D) rows of the embedding, instead of them.
        attention_mask: (B, S) 0 on padding, cached positions included.
        position_ids: (B, T) or (1, T).
        cache: Of earlier calls.

    Raises:
        ConfigError: They do not fit each other.
    """

    def __init__(
        self,
        core: OpenMythos,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> None:
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or None not in (input_ids, inputs_embeds):
            raise ConfigError(
                "not one input", where="input_ids, inputs_embeds",
                value="none" if tokens is None else "both", allowed="exactly one of the two",
            )  # fmt: skip
        self.core, self.tokens, self.position_ids = core, tokens, position_ids
        self.length = 0 if cache is None else int(cache.get_seq_length())
        self.valid_BS = self._valid(attention_mask)
        self.slots = None if cache is None else SlotCache(cache, core.cfg, self.valid_BS)

    def context(self) -> Context:
        """Build the context of the call."""
        given = self.position_ids
        if given is not None and given.dim() == 2 and len(given) == 1:
            given = given[0]  # the same for all rows
        return self.core.context(
            self.tokens, self.slots, self.length,
            attention_mask=None if self.valid_BS is None else self.valid_BS[:, self.length :],
            document_ids=self._documents(), positions=given,
        )  # fmt: skip

    def _valid(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask (B, S), or None without padding."""
        if mask is None:
            return None
        batch, n_new = self.tokens.shape[:2]
        if tuple(mask.shape) != (batch, self.length + n_new):
            raise ConfigError(
                "the mask does not match the tokens", where="attention_mask",
                value=tuple(mask.shape), allowed=f"{(batch, self.length + n_new)}, 0 on padding",
                fix="pass a mask of all cached and new positions; causality needs none",
            )  # fmt: skip
        valid_BS = mask.bool()
        return None if bool(valid_BS.all()) else valid_BS

    def _documents(self) -> Tensor | None:
        """Number the packed documents, (B, T): where positions do not go on, one begins."""
        given = self.position_ids
        if given is None or self.length or self.valid_BS is not None or given.dim() != 2:
            return None
        begins = given[:, 1:] != given[:, :-1] + 1
        if not bool(begins.any()):
            return None
        if self.slots is not None:
            raise ConfigError(
                "packed documents cannot be continued", where="past_key_values",
                value="packed positions and a cache", allowed="one of them",
                fix="pass use_cache=False, or a row per document",
            )  # fmt: skip
        numbers = F.pad(begins.long().cumsum(1), (1, 0))
        return numbers.expand(len(self.tokens), -1)
