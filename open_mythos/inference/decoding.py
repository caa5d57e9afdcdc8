"""Decoding modes by name: how the steps after the prompt run. All yield the same tokens.

- "eager": the reference, op by op on a growing history; supports every call.
- "static", "graph", "compile": static-shape steps, run eagerly, as CUDA graphs, or through
  ``torch.compile``; without autocast, with a cache, and with exit rules that look at the state.
- a :class:`StaticDecoder`, whose buffers, graphs and compiled code are reused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from open_mythos.checks import pick
from open_mythos.inference.static_decoder import MODES, StaticDecoder, check_no_autocast, reject
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.generation import Decoder, GrowingDecoder

DecoderFactory = Callable[[CausalLM, int, int], Decoder]
"""``factory(model, batch, capacity)``."""


def decoder_factory(mode: str | StaticDecoder, *, use_cache: bool = True) -> DecoderFactory:
    """Return the factory of the decoder for ``mode``.

    Raises:
        ConfigError: ``mode`` is unknown, or does not support ``use_cache=False``.
    """
    if not isinstance(mode, StaticDecoder):
        pick(("eager", *MODES), mode, "mode", what="decoding mode", fix='leave it at "eager"')
    if mode == "eager":
        return partial(GrowingDecoder, use_cache=use_cache)
    if not use_cache:
        reject("constant shapes need a cache", "use_cache=False", "calls with a cache")
    if isinstance(mode, StaticDecoder):
        return partial(_reused, mode)
    return partial(_new, mode)


def _new(mode: str, model: CausalLM, batch: int, capacity: int) -> StaticDecoder:
    check_no_autocast(model.final_norm.weight.device)  # before anything is compiled
    return StaticDecoder(model, batch, capacity, mode=mode)


def _reused(decoder: StaticDecoder, model: CausalLM, batch: int, capacity: int) -> StaticDecoder:
    """Return ``decoder`` if it fits the call."""
    if decoder.model is not model or decoder.batch != batch or decoder.capacity < capacity:
        reject(
            "the decoder does not fit the call",
            f"{type(model).__name__}, {batch} rows of {capacity} positions",
            f"its own {type(decoder.model).__name__}, {decoder.batch} rows of {decoder.capacity} "
            "positions at most",
        )  # fmt: skip
    return decoder
