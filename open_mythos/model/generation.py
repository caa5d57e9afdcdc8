"""Reference implementation of generation, which every faster decoder must match token for token.

A :class:`Decoder` produces the tokens. The one here runs the model on a growing KV cache;
:mod:`open_mythos.inference` has decoders with static shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.checks import is_int
from open_mythos.devices import HostCopy, is_readable
from open_mythos.errors import ConfigError
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import MASKS, CausalLM, check_tensor
from open_mythos.model.depth import Depth
from open_mythos.model.mode import evaluating
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.finite import check_rows
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer.interface import Detokenizer
from open_mythos.tokenizer.stream import StreamDecoder


class Decoder(Protocol):
    """Produces one token per row and step."""

    running_B: Tensor
    """(B,) boolean: unfinished rows. Setting an entry to false in place ends the row, which is then
    filled with ``params.filler``."""
    finite_B: Tensor
    """(B,) boolean: rows whose logits were all finite until they ended."""

    def start(
        self,
        input_ids: Tensor,
        params: SamplingParams,
        depth: Depth,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Prefill the (B, T) prompts and return the first token of every row, (B,)."""

    def step(self) -> Tensor:
        """Return the next token of every row, (B,); the next call may overwrite the result."""


class GrowingDecoder:
    """The reference decoder: eager execution on a growing history.

    Args:
        model: Any :class:`CausalLM`.
        batch: Number of rows.
        capacity: Maximum positions per row, prompt and new tokens together.
        use_cache: False recomputes everything at every token: slow, the reference for the cache.
        trace: Receives diagnostics of each forward call.
    """

    def __init__(
        self,
        model: CausalLM,
        batch: int,
        capacity: int,
        *,
        use_cache: bool = True,
        trace: LoopTrace | None = None,
    ) -> None:
        self.running_B = torch.ones(batch, dtype=torch.bool, device=model.final_norm.weight.device)
        self.finite_B = torch.ones_like(self.running_B)
        self._model, self._trace = model, trace
        self._cache = KVCache(capacity, model.cfg.kv_share == "last") if use_cache else None

    def start(
        self,
        input_ids: Tensor,
        params: SamplingParams,
        depth: Depth,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Prefill the prompts; see :class:`Decoder`."""
        self._ids_BT, self._mask_BT = input_ids, attention_mask
        self._params, self._depth, self._drawn = params, depth, 0
        self._keys_B = params.row_keys(len(input_ids)).to(input_ids.device)
        return self.step()

    def step(self) -> Tensor:
        """Sample the next tokens; see :class:`Decoder`."""
        params, ids_BT, mask_BT = self._params, self._ids_BT, self._mask_BT
        held = 0 if self._cache is None else self._cache.length
        mask = None if mask_BT is None else mask_BT[:, held:]
        ctx = self._model.context(ids_BT[:, held:], self._cache, held, attention_mask=mask)
        hidden_BTD = self._model.hidden(ids_BT[:, held:], ctx, self._depth, self._trace)
        seen_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(~mask_BT.bool(), -1)
        logits_BV = self._model.head(hidden_BTD[:, -1])
        n_prompt = seen_BT.shape[1] - self._drawn
        self.finite_B.logical_and_(logits_BV.isfinite().all(-1) | ~self.running_B)
        token_B = params.choose(logits_BV, seen_BT, self._keys_B, self._drawn, n_prompt)
        token_B = token_B.masked_fill(~self.running_B, params.filler)
        for end in params.ends:
            self.running_B.logical_and_(token_B != end)
        self._drawn += 1
        self._ids_BT = torch.cat((ids_BT, token_B.unsqueeze(1)), dim=1)
        if mask_BT is not None:
            self._mask_BT = torch.cat((mask_BT, torch.ones_like(mask_BT[:, :1])), dim=1)
        return token_B


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    params: SamplingParams | None = None,
    depth: Depth | None = None,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Detokenizer | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
    decoder: Callable[[CausalLM, int, int], Decoder] = GrowingDecoder,
) -> Tensor:
    """Continue every prompt in evaluation mode.

    Args:
        model: Any :class:`CausalLM`.
        input_ids: (B, T) prompts, ragged ones padded on the left.
        params: Sampling parameters and stop criteria.
        depth: Depth of every token; ``max_loop_iters`` by default.
        attention_mask: (B, T), false on padding.
        tokenizer: Any object with ``decode``; required for stop strings. Rows that have ended are
            filled with its ``pad_id``, if it has one and ``params`` name no token for that.
        on_token: Called as ``on_token(i, tokens_B)`` after each new token i; on CUDA the next step
            may already be in flight.
        decoder: Factory of the decoder, ``decoder(model, batch, capacity)``.

    Returns:
        (B, T + new), prompt included; new < max_new_tokens if every row ended early. A row that
        ended before the others is filled with ``params.filler``.

    Raises:
        ConfigError: An argument is out of range, the result exceeds the context, or the model
            computed logits that are not finite (on CUDA noticed when the host reads tokens).
    """
    params, depth = params or SamplingParams(), depth or Depth()
    model.cfg.require_causal("generate")
    model.check_ids(input_ids)
    batch, n_prompt = input_ids.shape
    depth.check_rows(batch)
    params.check_rows(batch)
    _check_length(model, n_prompt, params)
    check_tensor("attention_mask", attention_mask, input_ids.shape, MASKS)
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ConfigError(
            "prompts must be padded on the left", where="attention_mask",
            value=attention_mask[:, -1].tolist(), allowed="true in the last column of every row",
            fix="pad each prompt on the left",
        )  # fmt: skip
    if params.stop and tokenizer is None:
        raise ConfigError(
            "stop strings require a tokenizer", where="stop", value=params.stop,
            allowed="stop strings together with tokenizer=",
            fix="pass tokenizer=, or use eos_token_id",
        )  # fmt: skip
    params = _with_pad(params, tokenizer, model.cfg.vocab_size)
    source = decoder(model, batch, n_prompt + params.max_new_tokens)
    tokens: list[Tensor] = []
    watch = None
    if params.stop and tokenizer is not None:
        watch = StopStrings(tokenizer, params.stop, batch)
    with evaluating(model):
        for i, token_B in enumerate(_tokens(source, input_ids, params, depth, attention_mask)):
            tokens.append(token_B)
            if on_token is not None:
                on_token(i, token_B)
            if watch is not None:
                runs = watch.push(token_B.tolist())
                source.running_B.logical_and_(torch.tensor(runs, device=token_B.device))
        check_rows(source.finite_B)
    return torch.cat((input_ids, *(token_B.unsqueeze(1) for token_B in tokens)), dim=1)


def _with_pad(
    params: SamplingParams, tokenizer: Detokenizer | None, vocab_size: int
) -> SamplingParams:
    pad: Any = getattr(tokenizer, "pad_id", None)
    if params.ends or params.pad_token_id is not None or not is_int(pad) or pad >= vocab_size:
        return params
    return replace(params, pad_token_id=pad)


class StopStrings:
    """Watches the new text of every row; the time per token does not depend on its length.

    A character counts once its last token is there.

    Args:
        tokenizer: Decodes the tokens.
        stops: Strings that end a row.
        batch: Number of rows.
    """

    def __init__(self, tokenizer: Detokenizer, stops: Sequence[str], batch: int) -> None:
        self._stops, self._reach = tuple(stops), max(map(len, stops)) - 1
        self._decoders = [StreamDecoder(tokenizer) for _ in range(batch)]
        self._tails, self._runs = [""] * batch, [True] * batch

    def push(self, tokens: Sequence[int]) -> list[bool]:
        """Take the next token of every row; return which rows have no stop string yet."""
        for row, (token, decoder) in enumerate(zip(tokens, self._decoders, strict=True)):
            if self._runs[row]:
                text = self._tails[row] + decoder.push(token)
                self._runs[row] = not any(stop in text for stop in self._stops)
                self._tails[row] = text[max(0, len(text) - self._reach) :]
        return self._runs


def _tokens(
    source: Decoder, input_ids: Tensor, params: SamplingParams, depth: Depth, mask_BT: Tensor | None
) -> Iterator[Tensor]:
    """Yield up to ``max_new_tokens`` tokens (B,), until every row has ended."""
    may_end = bool(params.stop or params.ends)
    for i in range(params.max_new_tokens):
        going_B = source.running_B & source.finite_B.all()
        running = HostCopy(going_B.any()) if i and may_end else None
        # on CUDA, launch the next step before waiting for the copy; at most one is wasted
        if running is not None and not running.pending and not running.read():
            return
        token_B = source.step() if i else source.start(input_ids, params, depth, mask_BT)
        if running is not None and not running.read():
            return
        if is_readable(token_B):
            check_rows(source.finite_B)
        yield token_B.clone()


def _check_length(model: CausalLM, n_prompt: int, params: SamplingParams) -> None:
    cfg, n_new = model.cfg, params.max_new_tokens
    if n_new > cfg.max_output_tokens:
        raise ConfigError(
            "max_new_tokens is out of range", where="max_new_tokens", value=n_new,
            allowed=f"an integer in 0 .. max_output_tokens ({cfg.max_output_tokens})",
            fix="reduce it, or build the model with a larger max_output_tokens",
        )  # fmt: skip
    if n_prompt + n_new > cfg.max_seq_len:
        raise ConfigError(
            "prompt and new tokens exceed the context", where="max_new_tokens",
            value=f"{n_prompt} + {n_new}", allowed=f"at most max_seq_len ({cfg.max_seq_len})",
            fix="shorten the prompt or reduce max_new_tokens",
        )  # fmt: skip
    for where, ids in (("eos_token_id", params.ends), ("pad_token_id", (params.filler,))):
        for token in ids:
            if token >= cfg.vocab_size:
                raise ConfigError(
                    "not a token id", where=where, value=token,
                    allowed=f"None, or integers in 0 .. {cfg.vocab_size - 1}",
                    fix="pass ids of the tokenizer that the model was trained with",
                )  # fmt: skip
    unknown = [i for i, _ in params.biases if i >= cfg.vocab_size]
    if unknown:
        raise ConfigError(
            "not a token id", where="logit_bias", value=unknown[0],
            allowed=f"integers in 0 .. {cfg.vocab_size - 1}", fix="remove it from logit_bias",
        )  # fmt: skip
