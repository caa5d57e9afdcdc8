"""Naive generation, one token at a time: the oracle that faster engines must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from open_mythos.cache import KVCache
from open_mythos.errors import ConfigError
from open_mythos.ops.sampling import filter_logits, penalise_repetition, sample_tokens
from open_mythos.runtime import derive_seed

if TYPE_CHECKING:
    from open_mythos.base import CausalLM


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
    stops = _check(locals())
    batch, n_prompt = input_ids.shape
    keys_B = _row_keys(seed, batch, input_ids.device)
    fill = 0 if eos_token_id is None else eos_token_id
    running_B = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    cache = KVCache(n_prompt + max_new_tokens, model.cfg.kv_share == "last") if use_cache else None
    ids_BT, mask_BT = input_ids, attention_mask
    was_training = model.training
    model.eval()
    try:
        for i in range(max_new_tokens):
            held = 0 if cache is None else cache.length
            new_mask_BT = None if mask_BT is None else mask_BT[:, held:]
            logits_BV = model.next_token_logits(
                ids_BT[:, held:], kv_cache=cache, start_pos=held, attention_mask=new_mask_BT,
                **(depth or {}),
            ).float()  # fmt: skip
            seen_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(~mask_BT.bool(), -1)
            logits_BV = penalise_repetition(logits_BV, seen_BT, repetition_penalty)
            if temperature == 0:
                token_B = logits_BV.argmax(-1)
            else:
                logits_BV = filter_logits(
                    logits_BV / temperature, top_k=top_k or 0, top_p=top_p, min_p=min_p
                )
                token_B = sample_tokens(logits_BV, keys_B, i)
            token_B = torch.where(running_B, token_B, fill)
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


def _row_keys(seed: int | Sequence[int] | None, batch: int, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(1 << 62, (batch,)).to(device)
    if isinstance(seed, int):
        keys = [derive_seed(seed, "sample", row) for row in range(batch)]
    elif len(seed) == batch:
        keys = [derive_seed(s, "sample", 0) for s in seed]
    else:
        raise ConfigError(
            "one seed per row is needed", where="generate(seed)", value=list(seed),
            allowed=f"an integer, or {batch} integers",
        )  # fmt: skip
    return torch.tensor(keys, dtype=torch.long, device=device)


def _check(args: dict[str, Any]) -> list[str]:
    """Refuse bad arguments before anything is computed; the stop strings as a list."""
    cfg = args["model"].cfg
    n_prompt, n_new = args["input_ids"].shape[-1], args["max_new_tokens"]
    rules = (
        ("max_new_tokens", _is_int(n_new) and 0 <= n_new <= cfg.max_output_tokens,
         f"an integer in 0 .. max_output_tokens ({cfg.max_output_tokens})"),
        ("temperature", _is_number(args["temperature"]) and args["temperature"] >= 0, ">= 0"),
        ("top_k", args["top_k"] is None or (_is_int(args["top_k"]) and args["top_k"] >= 0),
         "an integer >= 0, or None"),
        ("top_p", _is_number(args["top_p"]) and 0 < args["top_p"] <= 1, "0 < top_p <= 1"),
        ("min_p", _is_number(args["min_p"]) and 0 <= args["min_p"] <= 1, "0 <= min_p <= 1"),
        ("repetition_penalty",
         _is_number(args["repetition_penalty"]) and args["repetition_penalty"] > 0, "> 0"),
    )  # fmt: skip
    for name, holds, allowed in rules:
        if not holds:
            raise ConfigError(
                f"{name} is out of range", where=f"generate({name})", value=args[name],
                allowed=allowed,
            )  # fmt: skip
    if n_prompt + n_new > cfg.max_seq_len:
        raise ConfigError(
            "prompt and new tokens do not fit the context", where="generate(max_new_tokens)",
            value=f"{n_prompt} + {n_new}", allowed=f"max_seq_len ({cfg.max_seq_len}) together",
            fix="shorten the prompt or ask for fewer tokens",
        )  # fmt: skip
    mask = args["attention_mask"]
    if mask is not None and mask.shape == args["input_ids"].shape and not mask[:, -1].all():
        raise ConfigError(
            "prompts must be padded on the left", where="generate(attention_mask)",
            value=mask[:, -1].tolist(), allowed="true in the last column of every row",
        )  # fmt: skip
    stops = [args["stop"]] if isinstance(args["stop"], str) else list(args["stop"])
    if "" in stops:
        raise ConfigError("an empty stop string would end every row", where="generate(stop)", value=stops)
    if stops and args["tokenizer"] is None:
        raise ConfigError(
            "stop strings need a tokenizer", where="generate(stop)", value=stops,
            fix="pass tokenizer=, or use eos_token_id",
        )  # fmt: skip
    return stops


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
