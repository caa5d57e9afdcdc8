"""Outputs: those of the installed ``transformers``, and what loops add."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

_FIELDS = {each.name for each in fields(CausalLMOutputWithPast)}
CACHE_FIELD = "cache" if "cache" in _FIELDS else "past_key_values"
"""Name of the cache in outputs: "cache" from transformers 5.24 on, before it "past_key_values"."""
Output = TypeVar("Output")


@dataclass
class ModelOutput(BaseModelOutputWithPast):
    """Final hidden states.

    Attributes:
        loop_states: State after every loop, (rows, T, D) of the rows that ran it, if asked for.
        exit_loops: (B, T) loops of each position, under an exit rule.
        router_scores: (layer, loop) -> (rows, T, E) scores of the experts, if asked for.
    """

    loop_states: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None
    router_scores: dict[tuple[int, int], Tensor] | None = None


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """Logits and loss; the other attributes are those of :class:`ModelOutput`."""

    loop_states: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None
    router_scores: dict[tuple[int, int], Tensor] | None = None


def with_cache(kind: type[Output], cache: Cache | None, **values: Any) -> Output:
    """Return an output with its cache under the name that the installed version uses."""
    return kind(**{CACHE_FIELD: cache}, **values)
