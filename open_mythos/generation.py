"""Naive generation, one token at a time: the oracle that faster engines must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.base import MASKS, CausalLM, check_tensor
from open_mythos.cache import KVCache
from open_mythos.config import whole
from open_mythos.errors import ConfigError
from open_mythos.ops.sampling import Sampling
from open_mythos.runtime import derive_seed


class Decoder(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = 50,
    *,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    stop: str | Sequence[str] = (),
    tokenizer: Decoder | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
    use_cache: bool = True,
    depth: dict[str, Any] | None = None,
) -> Tensor:
    """Continue every row of ``input_ids``.

    Args:
        model: Any :class:`CausalLM`.
        input_ids: (B, T) prompts, ragged ones padded on the left.
        max_new_tokens: Tokens to add at most.
        temperature: Divides the logits; 0 is greedy.
        top_k: Draw from the k most likely tokens; 0 or None: from all.
        top_p: Draw from the smallest set with this much probability.
        min_p: Drop tokens less likely than this share of the most likely one.
        repetition_penalty: Above 1 makes tokens that have occurred less likely.
        seed: One integer (rows draw independent streams of it) or one per row; by default taken
            from torch's global generator.
        attention_mask: (B, T), false on padding.
        eos_token_id: Ends a row; the rest of the row is filled with it.
        stop: Strings that end a row as soon as its new text contains one; needs ``tokenizer``.
        tokenizer: Anything with ``decode``.
        on_token: Called as ``on_token(i, tokens_B)`` after each new token i.
        use_cache: False recomputes everything at every token: slow, and the oracle of the cache.
        depth: Keyword arguments of the forward call, such as ``n_loops``.

    Returns:
        (B, T + new), prompt included; new < max_new_tokens when every row ended early.

    Raises:
        ConfigError: An argument is out of range, or the result would not fit the context.
    """
    model.check_ids(input_ids)
    batch, n_prompt = input_ids.shape
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_length(model, n_prompt, max_new_tokens)
    _check_prompt_mask(attention_mask, input_ids)
    _check_end(eos_token_id, model.cfg.vocab_size)
    stops = _stop_strings(stop, tokenizer)
    keys_B = _row_keys(seed, batch).to(input_ids.device)
    running_B = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    cache = KVCache(n_prompt + max_new_tokens, model.cfg.kv_share == "last") if use_cache else None
    ids_BT, mask_BT = input_ids, attention_mask
    was_training = model.training
    model.eval()
    try:
        for i in range(max_new_tokens):
            held = 0 if cache is None else cache.length
            logits_BV = model.next_token_logits(
                ids_BT[:, held:], cache, held,
                attention_mask=None if mask_BT is None else mask_BT[:, held:], **(depth or {}),
            )  # fmt: skip
            seen_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(~mask_BT.bool(), -1)
            token_B = sampling.choose(logits_BV, seen_BT, keys_B, i)
            token_B = torch.where(running_B, token_B, eos_token_id or 0)
            ids_BT = torch.cat((ids_BT, token_B.unsqueeze(1)), dim=1)
            if mask_BT is not None:
                mask_BT = torch.cat((mask_BT, torch.ones_like(mask_BT[:, :1])), dim=1)
            if on_token is not None:
                on_token(i, token_B)
            if eos_token_id is not None:
                running_B = running_B & (token_B != eos_token_id)
            if stops and tokenizer is not None:
                running_B = running_B & ~_stopped(ids_BT[:, n_prompt:], stops, tokenizer)
            if not running_B.any():
                break
    finally:
        model.train(was_training)
    return ids_BT


def _stopped(new_BT: Tensor, stops: Sequence[str], tokenizer: Decoder) -> Tensor:
    texts = [tokenizer.decode(row) for row in new_BT.tolist()]
    found = [any(stop in text for stop in stops) for text in texts]
    return torch.tensor(found, device=new_BT.device)


def _row_keys(seed: int | Sequence[int] | None, batch: int) -> Tensor:
    """(B,) one key per row: streams of one seed, or each row's own seed."""
    if seed is None:
        return torch.randint(1 << 62, (batch,))
    if isinstance(seed, Sequence):
        given, rows = [whole(s) for s in seed], [0] * batch
    else:
        given, rows = [whole(seed)] * batch, list(range(batch))
    seeds = [s for s in given if s is not None]
    if not len(given) == len(seeds) == batch:
        raise ConfigError(
            "seeds must be integers", where="seed", value=seed,
            allowed=f"None, an integer, or {batch} integers (one per row)",
            fix="leave seed out to draw one from torch's global generator",
        )  # fmt: skip
    return torch.tensor([derive_seed(s, "sample", row) for s, row in zip(seeds, rows, strict=True)])


def _check_length(model: CausalLM, n_prompt: int, max_new_tokens: int) -> None:
    cfg, n_new = model.cfg, whole(max_new_tokens)
    if n_new is None or not 0 <= n_new <= cfg.max_output_tokens:
        raise ConfigError(
            "max_new_tokens is out of range", where="max_new_tokens", value=max_new_tokens,
            allowed=f"an integer in 0 .. max_output_tokens ({cfg.max_output_tokens})",
            fix="ask for fewer tokens, or build the model with a larger max_output_tokens",
        )  # fmt: skip
    if n_prompt + n_new > cfg.max_seq_len:
        raise ConfigError(
            "prompt and new tokens do not fit the context", where="max_new_tokens",
            value=f"{n_prompt} + {n_new}", allowed=f"max_seq_len ({cfg.max_seq_len}) together",
            fix="shorten the prompt or ask for fewer tokens",
        )  # fmt: skip


def _check_prompt_mask(attention_mask: Tensor | None, input_ids: Tensor) -> None:
    check_tensor("attention_mask", attention_mask, input_ids.shape, MASKS)
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ConfigError(
            "prompts must be padded on the left", where="attention_mask",
            value=attention_mask[:, -1].tolist(), allowed="true in the last column of every row",
            fix="move the padding in front of each prompt",
        )  # fmt: skip


def _check_end(eos_token_id: int | None, vocab_size: int) -> None:
    if eos_token_id is None:
        return
    end = whole(eos_token_id)
    if end is None or not 0 <= end < vocab_size:
        raise ConfigError(
            "not a token id", where="eos_token_id", value=eos_token_id,
            allowed=f"None, or an integer in 0 .. {vocab_size - 1}",
            fix="pass the tokenizer's eos id; several ends can be given as stop strings",
        )  # fmt: skip


def _stop_strings(stop: str | Sequence[str], tokenizer: Decoder | None) -> list[str]:
    """The stop strings as a list, checked."""
    stops = [stop] if isinstance(stop, str) or not isinstance(stop, Sequence) else list(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise ConfigError(
            "not stop strings", where="stop", value=stop, allowed="strings of at least a character",
            fix="leave stop out to generate max_new_tokens",
        )  # fmt: skip
    if stops and tokenizer is None:
        raise ConfigError(
            "stop strings need a tokenizer", where="stop", value=stops,
            allowed="stop strings together with tokenizer=",
            fix="pass tokenizer=, or use eos_token_id",
        )  # fmt: skip
    return stops
