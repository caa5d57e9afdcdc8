"""Generation, one token at a time: the plain form is the oracle that faster ones must equal.

The plain form runs the model on a cache that grows by a column per token. The others make every
step the same work on the same memory (:mod:`open_mythos.inference.static_decoder`), so that it can
be captured or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.checks import whole
from open_mythos.errors import ConfigError
from open_mythos.inference.static_decoder import MODES, StaticDecoder, refuse
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import MASKS, CausalLM, check_tensor
from open_mythos.model.depth import Depth
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import Sampling
from open_mythos.seeding import derive_seed

DECODE = ("eager", *MODES)
"""Ways to decode by name; "eager" is the plain form."""


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
    depth: Depth | None = None,
    trace: LoopTrace | None = None,
    decode: str | StaticDecoder = "eager",
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
        on_token: Called as ``on_token(i, tokens_B)`` after each new token i; on CUDA possibly when
            the device already works on the next one.
        use_cache: False recomputes everything at every token: slow, and the oracle of the cache.
        depth: Loops of every token; ``max_loop_iters`` by default.
        trace: Receives diagnostics of every forward call, the last one's at any time.
        decode: How the steps after the prompt run; the tokens are the same but for rounding.

            - "eager": op by op on a history that grows, the plain form; serves every call.
            - "static", "graph", "compile": steps of constant shape, run op by op, as CUDA graphs,
              or through ``torch.compile``; not with an ``exit_rule``, without a cache or under
              autocast.
            - a :class:`StaticDecoder`, whose graphs and compiled code a later call uses again.

    Returns:
        (B, T + new), prompt included; new < max_new_tokens when every row ended early.

    Raises:
        ConfigError: An argument is out of range, the result would not fit the context, or the
            way to decode cannot serve the call.
        EnvironmentError_: Graphs were asked for by name without a CUDA device.
    """
    model.check_ids(input_ids)
    batch, n_prompt = input_ids.shape
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check_length(model, n_prompt, max_new_tokens)
    _check_prompt_mask(attention_mask, input_ids)
    _check_end(eos_token_id, model.cfg.vocab_size)
    stops = _stop_strings(stop, tokenizer)
    keys_B = _row_keys(seed, batch).to(input_ids.device)
    call = _Call(
        model, input_ids, attention_mask, max_new_tokens, sampling, keys_B, eos_token_id,
        use_cache, depth or Depth(), trace,
    )  # fmt: skip
    decoder = _decoder(decode, call)
    running_B = torch.ones_like(keys_B, dtype=torch.bool) if decoder is None else decoder.running_B
    tokens: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        steps = _growing(call, running_B) if decoder is None else _static(call, decoder)
        for i in range(max_new_tokens):
            ended = _Ended(running_B) if i and (stops or eos_token_id is not None) else None
            if ended is not None and not ended.is_late and ended.read():
                break
            token_B = next(steps).clone()
            if ended is not None and ended.is_late and ended.read():
                break  # this token was asked for before it was known that no row wants it
            tokens.append(token_B)
            if on_token is not None:
                on_token(i, token_B)
            if stops and tokenizer is not None:
                running_B.logical_and_(~_stopped(torch.stack(tokens, dim=1), stops, tokenizer))
    finally:
        model.train(was_training)
    return torch.cat((input_ids, *(token_B.unsqueeze(1) for token_B in tokens)), dim=1)


@dataclass(frozen=True)
class _Call:
    """What one call of :func:`generate` asks for, checked."""

    model: CausalLM
    input_ids: Tensor
    attention_mask: Tensor | None
    max_new_tokens: int
    sampling: Sampling
    keys_B: Tensor
    eos_token_id: int | None
    use_cache: bool
    depth: Depth
    trace: LoopTrace | None

    @property
    def length(self) -> int:
        """Positions of a row, prompt and new tokens together."""
        return self.input_ids.shape[1] + self.max_new_tokens


def _growing(call: _Call, running_B: Tensor) -> Iterator[Tensor]:
    """The plain form: the tokens (B,) one after the other; rows that end are marked."""
    model, ids_BT, mask_BT = call.model, call.input_ids, call.attention_mask
    cache = KVCache(call.length, model.cfg.kv_share == "last") if call.use_cache else None
    for i in range(call.max_new_tokens):
        held = 0 if cache is None else cache.length
        new_BT = ids_BT[:, held:]
        mask = None if mask_BT is None else mask_BT[:, held:]
        ctx = model.context(new_BT, cache, held, attention_mask=mask)
        logits_BV = model.head(model.hidden(new_BT, ctx, call.depth, call.trace)[:, -1])
        seen_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(~mask_BT.bool(), -1)
        token_B = call.sampling.choose(logits_BV, seen_BT, call.keys_B, i)
        token_B = token_B.masked_fill(~running_B, call.eos_token_id or 0)
        if call.eos_token_id is not None:
            running_B.logical_and_(token_B != call.eos_token_id)
        ids_BT = torch.cat((ids_BT, token_B.unsqueeze(1)), dim=1)
        if mask_BT is not None:
            mask_BT = torch.cat((mask_BT, torch.ones_like(mask_BT[:, :1])), dim=1)
        yield token_B


def _static(call: _Call, decoder: StaticDecoder) -> Iterator[Tensor]:
    """Steps of constant shape: the same tokens, in a buffer that each step overwrites."""
    yield decoder.start(
        call.input_ids, sampling=call.sampling, keys_B=call.keys_B,
        attention_mask=call.attention_mask, eos_token_id=call.eos_token_id,
        depth=call.depth,
    )  # fmt: skip
    for _ in range(1, call.max_new_tokens):
        yield decoder.step()


class _Ended:
    """Whether all rows have ended by now, to be read later.

    On CUDA the answer is copied while the device goes on, and reading it waits for the copy alone:
    the next step is launched before, in vain once per call at most.
    """

    def __init__(self, running_B: Tensor) -> None:
        self.is_late = running_B.is_cuda
        self._running = running_B.any()
        if self.is_late:
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._running = host.copy_(self._running, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        """The answer."""
        if self.is_late:
            self._copied.synchronize()
        return not self._running


def _decoder(decode: str | StaticDecoder, call: _Call) -> StaticDecoder | None:
    """What decodes in steps of constant shape; None for the plain form."""
    name = decode.mode if isinstance(decode, StaticDecoder) else decode
    if name not in DECODE:
        raise ConfigError(
            "unknown way to decode", where="decode", value=decode,
            allowed=f"{', '.join(DECODE)}, or a StaticDecoder", fix='leave it at "eager"',
        )  # fmt: skip
    if name == "eager":
        return None
    if (problem := _only_growing(call)) is not None:
        refuse(f"{name} decoding cannot serve this call", problem, "calls without it")
    batch = call.input_ids.shape[0]
    if not isinstance(decode, StaticDecoder):
        return StaticDecoder(call.model, batch, call.length, mode=name)
    if decode.model is not call.model or decode.batch != batch or decode.capacity < call.length:
        refuse(
            "the decoder was made for other calls",
            f"{type(call.model).__name__}, {batch} rows of {call.length} positions",
            f"its own {type(decode.model).__name__}, {decode.batch} rows of {decode.capacity} "
            "positions at most",
        )  # fmt: skip
    return decode


def _only_growing(call: _Call) -> str | None:
    """What of a call only the plain form can do, or None."""
    if torch.is_autocast_enabled(call.input_ids.device.type):
        return "autocast"
    if call.depth.exit_rule is not None:
        return "exit_rule"
    if call.trace is not None:
        return "trace"
    return None if call.use_cache else "use_cache=False"


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
