"""Base class of the causal language models: embedding, head, argument checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.checks import check_count
from open_mythos.config import MythosConfig
from open_mythos.devices import is_readable, to_device
from open_mythos.errors import ConfigError
from open_mythos.model.cache import KVCache
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.layers.head import OutputHead
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.trace import LoopTrace

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MASKS = (torch.bool, *INTEGERS)


class CausalLM(nn.Module):
    """Token embedding, final norm and output head; subclasses add the layers.

    Args:
        cfg: The configuration; it is validated and copied.
        head: Whether there is an output head. Without one, ``hidden`` works and ``logits`` do not.

    Raises:
        ConfigError: The configuration is invalid.
    """

    embed: Callable[..., Tensor]
    """``embed(input_ids, ctx)``: (B, T) ids -> (B, T, D), everything before the loop."""
    head: OutputHead
    """Absent from a model that was built with ``head=False``."""
    final_hidden: Callable[..., Tensor]
    """``final_hidden(h, ctx)``: (B, T, D) -> (B, T, D), everything between loop and head."""
    hidden: Callable[..., Tensor]
    """``hidden(input_ids, ctx, depth, trace)``: the whole forward pass before the head."""

    def __init__(self, cfg: MythosConfig, head: bool = True) -> None:
        super().__init__()
        cfg.validate()
        self.cfg = replace(cfg)  # a copy, so that later changes of ``cfg`` do not affect the model
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.value_embeddings = nn.ModuleList(
            nn.Embedding(cfg.vocab_size, cfg.n_kv_heads * cfg.head_dim) for _ in cfg.value_layers
        )
        self.final_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        if head:
            self.head = OutputHead(cfg)
        self.register_load_state_dict_post_hook(_tie_after_loading)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the embedding the head's parameter again, with ``tie_embeddings``.

        Called after each ``load_state_dict`` and change of device or dtype, which may part them.
        """
        if self._is_parted():
            self.head.weight = self.embedding.weight

    def check_tied(self) -> None:
        """Check that head and embedding are equal.

        Raises:
            ConfigError: They are two different tensors.
        """
        if not self._is_parted():
            return
        head, embedding = self.head.weight, self.embedding.weight
        if head.shape != embedding.shape or not torch.equal(head, embedding.to(head)):
            raise ConfigError(
                "head and embedding are different tensors", where="tie_embeddings", value=True,
                allowed="one parameter for both",
                fix="call tie_weights() before training, or build the model with "
                "tie_embeddings=False",
            )  # fmt: skip

    def _is_parted(self) -> bool:
        if not (self.cfg.tie_embeddings and isinstance(getattr(self, "head", None), OutputHead)):
            return False
        head, embedding = self.head.weight, self.embedding.weight
        return head is not embedding

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int) -> None:
        """Change the number of ids, for new special tokens; build the optimizer afterwards.

        New rows of embeddings and head are the mean of the present ones, so that a new token is
        neither likely nor impossible before it is trained; with fewer ids the last rows are lost.

        Raises:
            ConfigError: ``vocab_size`` is out of range, or a table is wrapped, as by an adapter.
        """
        replace(self.cfg, vocab_size=vocab_size).validate()
        tables = [self.embedding, *self.value_embeddings]
        if not self.cfg.tie_embeddings and hasattr(self, "head"):
            tables.append(self.head)
        for table in tables:
            if not isinstance(table, nn.Embedding | nn.Linear):
                raise ConfigError(
                    "a table of the vocabulary is no plain layer", where="resize_vocabulary",
                    value=type(table).__name__, allowed="nn.Embedding, nn.Linear",
                    fix="merge adapters first",
                )  # fmt: skip
        for table in tables:
            _resize_rows(table, vocab_size)
        self.cfg.vocab_size = vocab_size
        self.tie_weights()
        if isinstance(getattr(self, "head", None), nn.Linear):
            self.head.out_features = vocab_size

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        for module in self.modules():
            if (check := getattr(module, "check_move", None)) is not None:
                check(*args)
        tied = self.cfg.tie_embeddings and not self._is_parted()
        result = super()._apply(*args, **kwargs)
        if tied:
            self.tie_weights()
        return result

    def context(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | MutableMapping[str, object] | None = None,
        start_pos: int = 0,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample_seeds: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Context:
        """Build the positions, masks and cache of a call.

        Checks the arguments, which are those of :meth:`OpenMythos.forward`. Embeddings (B, T, D)
        of tokens may take the place of their ids, here, in :meth:`embed` and in :meth:`hidden`.
        ``positions`` (T,) or (B, T) replace those that follow from padding and documents; a row of
        documents may then be longer than the context, which each must fit.

        Raises:
            ConfigError: A shape, type or value is wrong, or the context is too short.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ConfigError(
                "torch.jit.trace would record one shape and one depth", where="torch.jit.trace",
                value=type(self).__name__, allowed="torch.export.export, torch.compile",
                fix="use torch.export.export(model, (input_ids,))",
            )  # fmt: skip
        check = self._check_embeddings if _is_embedded(input_ids) else self.check_ids
        check(input_ids)
        batch, n_new = shape = input_ids.shape[:2]
        if kv_cache is not None:
            self.cfg.require_causal("kv_cache")
        cache = KVCache.of(kv_cache, self.cfg)
        if cache is not None:
            cache.belong(self._cache_owner())
            cache.admit(batch)
        if positions is not None:
            check_tensor("positions", positions, shape[2 - positions.dim() :], INTEGERS)
        packed = positions if document_ids is not None else None
        self._check_span(start_pos, n_new if packed is None else _longest(packed), cache)
        check_tensor("attention_mask", attention_mask, shape, MASKS)
        check_tensor("document_ids", document_ids, shape, INTEGERS)
        check_tensor("sample_seeds", sample_seeds, shape[:1], INTEGERS)
        if sample_seeds is None and self.training:
            sample_seeds = to_device(torch.randint(1 << 62, (batch,)), input_ids.device)
        return Context.build(
            n_new, self.cfg.rotaries, input_ids.device,
            start_pos=start_pos, cache=cache, document_BT=document_ids, positions=positions,
            keys_B=None if sample_seeds is None else sample_seeds.long(),
            valid_BT=None if attention_mask is None else attention_mask.bool(),
            causal=self.cfg.causal,
        )  # fmt: skip

    def _cache_owner(self) -> tuple[object, ...]:
        weight, cfg = self.final_norm.weight, self.cfg
        sizes = cfg.prelude_layers, cfg.recurrent_layers, cfg.coda_layers, cfg.cache_width
        return type(self).__name__, cfg.attn_type, *sizes, weight.dtype, weight.device.type

    def embed_tokens(self, input_ids: Tensor, ctx: Context) -> Tensor:
        """Embed tokens (B, T, D), or take their embeddings, and scale by ``embedding_scale``.

        What layers with ``value_embedding`` add to their values is kept in ``ctx``.
        """
        ctx.values.update(self.token_values(input_ids))
        x_BTD = input_ids if _is_embedded(input_ids) else self.embedding(input_ids)
        return x_BTD if self.cfg.embedding_scale == 1 else x_BTD * self.cfg.embedding_scale

    def token_values(self, input_ids: Tensor) -> dict[int, Tensor]:
        """Return the value embeddings (B, T, G K) of tokens, by layer.

        Raises:
            ConfigError: Embeddings stand for the tokens.
        """
        if len(self.value_embeddings) and _is_embedded(input_ids):
            raise ConfigError(
                "value embeddings need the ids of the tokens", where="input_ids",
                value=_shown(input_ids), allowed="token ids (B, T)",
                fix="embeddings in their place work for models without value_embedding",
            )  # fmt: skip
        if not len(self.value_embeddings):
            return {}
        tables = zip(self.cfg.value_layers, self.value_embeddings, strict=True)
        return {layer: table(input_ids) for layer, table in tables}

    @torch.no_grad()
    def update_router_bias(self, trace: LoopTrace, speed: float | Tensor) -> None:
        """Balance each mixture by its load in ``trace``, summed over loops."""
        load = trace.load_by_layer()
        for module in self.modules():
            if isinstance(module, MoEFFN) and module.layer in load:
                module.update_bias(load[module.layer], speed)

    def _check_span(self, start_pos: int, n_new: int, cache: KVCache | None) -> None:
        check_count("start_pos", start_pos, least=0)
        if cache is not None and start_pos != cache.length:
            raise ConfigError(
                "start_pos and the cache disagree", where="start_pos", value=start_pos,
                allowed=f"the positions the cache holds ({cache.length})",
                fix="pass start_pos=cache.length, or cache.truncate(start_pos) first",
            )  # fmt: skip
        if start_pos + n_new > self.cfg.max_seq_len:
            raise ConfigError(
                "the input does not fit the context", where="input_ids",
                value=f"{start_pos} + {n_new} tokens",
                allowed=f"max_seq_len ({self.cfg.max_seq_len})",
                fix="shorten the input or build the model with a larger max_seq_len",
            )  # fmt: skip

    def check_ids(self, input_ids: Tensor) -> None:
        """Check that ``input_ids`` is a (B, T) batch of valid token ids."""
        is_ids = isinstance(input_ids, Tensor) and input_ids.dtype in (torch.int64, torch.int32)
        if not is_ids or input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ConfigError(
                "not a batch of token ids", where="input_ids", value=_shown(input_ids),
                allowed="a non-empty int64 or int32 tensor (B, T)",
                fix="encode the text; add a batch axis to a single sequence: ids.unsqueeze(0)",
            )  # fmt: skip
        if not is_readable(input_ids):
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.cfg.vocab_size:
            raise ConfigError(
                "a token id is outside the vocabulary", where="input_ids",
                value=low if low < 0 else high, allowed=f"0 .. {self.cfg.vocab_size - 1}",
                fix="check that the tokenizer matches the model",
            )  # fmt: skip

    def _check_embeddings(self, x_BTD: Tensor) -> None:
        if x_BTD.dim() != 3 or 0 in x_BTD.shape or x_BTD.shape[-1] != self.cfg.dim:
            raise ConfigError(
                "not a batch of embeddings", where="input_ids", value=_shown(x_BTD),
                allowed=f"a non-empty tensor (B, T, {self.cfg.dim}) of floats, or ids (B, T)",
                fix="pass rows of the embedding, before embedding_scale",
            )  # fmt: skip


def _resize_rows(table: nn.Embedding | nn.Linear, rows: int) -> None:
    old = table.weight
    new = old.mean(0, keepdim=True).expand(max(0, rows - len(old)), -1)
    table.weight = nn.Parameter(torch.cat((old[:rows], new)), old.requires_grad)
    if isinstance(table, nn.Embedding):
        table.num_embeddings = rows


def _tie_after_loading(model: CausalLM, keys: object) -> None:
    model.check_tied()
    model.tie_weights()


def check_tensor(name: str, given: Any, shape: torch.Size, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check that an optional argument is a tensor of this shape and one of these dtypes."""
    fits = isinstance(given, Tensor) and given.shape == shape and given.dtype in dtypes
    if given is not None and not fits:
        kinds = "integers" if torch.bool not in dtypes else "booleans (or 0 and 1)"
        raise ConfigError(
            f"{name} does not match the tokens", where=name, value=_shown(given),
            allowed=f"None, or a tensor {tuple(shape)} of {kinds}",
            fix="pass values for the tokens of this call only; the cache holds the earlier ones",
        )  # fmt: skip


def _longest(positions: Tensor) -> int:
    """Return the length of the longest packed document, or 1 where reading it would wait."""
    return int(positions.max()) + 1 if is_readable(positions) else 1


def _is_embedded(given: Any) -> bool:
    """Return whether an input is embeddings of tokens, not their ids."""
    return isinstance(given, Tensor) and given.dim() == 3 and given.is_floating_point()


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}"


@contextmanager
def forward_call(input_ids: Tensor, ctx: Context, depth: Depth) -> Iterator[None]:
    """Run a forward call without autograd if it has a cache or an exit rule; commit the cache.

    A call that fails leaves the cache unchanged.
    """
    depth.check_rows(len(input_ids))
    inference = ctx.cache is not None or depth.exit_rule is not None
    with torch.no_grad() if inference else nullcontext():
        yield
    if isinstance(ctx.cache, KVCache):
        ctx.cache.commit(ctx.columns)
