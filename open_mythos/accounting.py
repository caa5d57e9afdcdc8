"""Parameters, FLOPs and cache of a model, counted from its configuration alone.

This module loads no torch, so that counting a trillion parameters takes no time. Tests compare
every count with built models, and the FLOPs with those that PyTorch counts.

What is counted as a FLOP: two for each multiplication of a token with a weight matrix, and of its
queries with keys and its attention weights with values. Norms, activations, softmax, the diagonal
decay and the embedding's lookup are left out; they are below a percent at every size here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.variants import VARIANTS, variant

if TYPE_CHECKING:
    from open_mythos.model.dense import DenseTransformer
    from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one token.

    Attributes:
        weights: With weight matrices.
        position: With each position it sees, itself included, when keys and values of every head
            are at hand (training, prefill).
        decode_position: The same when one token decodes on a cache.
    """

    weights: int = 0
    position: int = 0
    decode_position: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weights + other.weights,
            self.position + other.position,
            self.decode_position + other.decode_position,
        )

    def times(self, n: int) -> Cost:
        """``n`` of these one after the other."""
        return Cost(n * self.weights, n * self.position, n * self.decode_position)

    def flops(self, seen: float) -> float:
        """FLOPs of a token that sees ``seen`` positions, keys and values at hand."""
        return 2 * (self.weights + seen * self.position)

    def decode_flops(self, seen: float) -> float:
        """FLOPs of a token that sees ``seen`` cached positions."""
        return 2 * (self.weights + seen * self.decode_position)


@dataclass(frozen=True)
class Accounting:
    """What a model holds and what a token costs; made by :func:`account`.

    Attributes:
        architecture: "looped" or "dense".
        n_loops: Loops assumed where a method is given none; 1 for a dense model.
        context: Positions assumed where a method is given none.
        stored: Part of the model -> parameters.
        active: Part of the model -> parameters that take part in one token: of the routed experts
            the chosen ones, of the adapters those of the loops run.
        once: Cost of everything outside the loop.
        per_loop: Cost of one loop.
        cache_width: Elements cached per token and slot.
        slots_once: Cache slots outside the loop.
        slots_per_loop: Cache slots of one loop.
        share_loops: Whether all loops keep one loop's slots (``kv_share="last"``).
    """

    architecture: str
    n_loops: int
    context: int
    stored: dict[str, int]
    active: dict[str, int]
    once: Cost
    per_loop: Cost
    cache_width: int
    slots_once: int
    slots_per_loop: int
    share_loops: bool

    @property
    def parameters(self) -> int:
        """All parameters, shared ones once."""
        return sum(self.stored.values())

    @property
    def parameters_without_embedding(self) -> int:
        """Parameters other than the embedding and the output head."""
        return self.parameters - self.stored["embedding"] - self.stored["head"]

    @property
    def active_parameters(self) -> int:
        """Parameters that take part in one token, embedding and head included."""
        return sum(self.active.values())

    def forward_flops(self, n_loops: float | None = None, context: int | None = None) -> float:
        """FLOPs per token of a whole causal sequence.

        Args:
            n_loops: Loops, a mean over sequences if need be.
            context: Length of the sequence; its tokens see (context + 1) / 2 positions on average.
        """
        seen = self._seen(context)
        return self.once.flops(seen) + self._loops(n_loops) * self.per_loop.flops(seen)

    def training_flops(
        self,
        n_loops: float | None = None,
        grad_loops: float | None = None,
        context: int | None = None,
    ) -> float:
        """FLOPs per token of a training step: 6 N with gradient, 2 N without.

        A backward pass costs twice its forward pass. What checkpointing computes again is not
        counted, so that dividing by the time gives the utilisation of useful work.

        Args:
            n_loops: Loops, a mean over sequences if need be.
            grad_loops: Of these, how many carry gradient; all by default.
            context: Length of the sequence.
        """
        seen, loops = self._seen(context), self._loops(n_loops)
        with_grad = loops if grad_loops is None else min(loops, grad_loops)
        per_loop = self.per_loop.flops(seen)
        return 3 * self.once.flops(seen) + (loops + 2 * with_grad) * per_loop

    def decode_flops(self, n_loops: float | None = None, context: int | None = None) -> float:
        """FLOPs of one new token on a cache of ``context`` positions, the new one included."""
        seen = self.context if context is None else context
        return self.once.decode_flops(seen) + self._loops(n_loops) * self.per_loop.decode_flops(
            seen
        )

    def cache_elements(self, n_loops: int | None = None) -> int:
        """Elements the cache holds per token."""
        loops = 1 if self.share_loops else int(self._loops(n_loops))
        return self.cache_width * (self.slots_once + self.slots_per_loop * loops)

    def cache_bytes(self, n_loops: int | None = None, element_size: int = 2) -> int:
        """Bytes the cache holds per token; ``element_size`` 2 is bfloat16."""
        return self.cache_elements(n_loops) * element_size

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values, the derived totals included."""
        return asdict(self) | {
            "parameters": self.parameters,
            "parameters_without_embedding": self.parameters_without_embedding,
            "active_parameters": self.active_parameters,
            "forward_flops_per_token": self.forward_flops(),
            "training_flops_per_token": self.training_flops(),
            "decode_flops_per_token": self.decode_flops(),
            "cache_elements_per_token": self.cache_elements(),
            "cache_bytes_per_token": self.cache_bytes(),
        }

    def _loops(self, n_loops: float | None) -> float:
        return self.n_loops if n_loops is None or self.architecture == "dense" else n_loops

    def _seen(self, context: int | None) -> float:
        return ((self.context if context is None else context) + 1) / 2


def account(
    model: MythosConfig | OpenMythos | DenseTransformer,
    n_loops: int | None = None,
    context: int | None = None,
    *,
    n_layers: int | None = None,
) -> Accounting:
    """Count what ``model`` holds and costs.

    Args:
        model: A configuration, or a model built from one.
        n_loops: Loops; ``max_loop_iters`` by default. A dense model has none.
        context: Positions; ``max_seq_len`` by default.
        n_layers: Count, instead of the looped model, the :class:`DenseTransformer` of so many
            layers that the configuration gives.

    Raises:
        ConfigError: The configuration is invalid, or a number is not a positive integer.
    """
    cfg = model if isinstance(model, MythosConfig) else model.cfg
    if not isinstance(model, MythosConfig):
        n_layers = getattr(model, "n_layers", None)
    cfg.validate()
    context = cfg.max_seq_len if context is None else context
    loops = 1 if n_layers is not None else cfg.max_loop_iters if n_loops is None else n_loops
    layers = 1 if n_layers is None else n_layers
    for name, value in (("n_loops", loops), ("context", context), ("n_layers", layers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                "not a positive number", where=f"account({name})", value=value,
                allowed="an integer >= 1", fix=f"correct the argument {name}",
            )  # fmt: skip
    if n_layers is not None:
        return _dense(cfg, n_layers, context)
    return _looped(cfg, loops, context)


def _looped(cfg: MythosConfig, n_loops: int, context: int) -> Accounting:
    outer, looped = _block(cfg), _block(cfg, experts=cfg.n_experts)
    looped_active = _block(cfg, experts=cfg.n_experts_per_tok) if cfg.n_experts else looped
    mixing = cfg.dim**2 if cfg.injection_matrix == "full" else 0
    readout = cfg.dim**2 if cfg.readout else 0
    adapter = 2 * cfg.dim * cfg.lora_rank
    loop = 2 * cfg.dim + (mixing or cfg.dim) + (cfg.dim + 1)  # injection, halting gate
    loop += cfg.dim if cfg.lora_rank else 0
    stored = {
        "embedding": cfg.vocab_size * cfg.dim,
        "prelude": cfg.prelude_layers * outer + (cfg.dim if cfg.prelude_norm else 0),
        "recurrent": loop + cfg.recurrent_layers * looped + cfg.max_loop_iters * adapter,
        "coda": readout + cfg.coda_layers * outer,
        "head": _head(cfg),
    }
    adapters_run = min(n_loops, cfg.max_loop_iters)
    active = stored | {
        "recurrent": loop + cfg.recurrent_layers * looped_active + adapters_run * adapter
    }
    outer_layers = cfg.prelude_layers + cfg.coda_layers
    products = Cost(mixing + readout + cfg.dim * cfg.vocab_size)
    return Accounting(
        architecture="looped",
        n_loops=n_loops,
        context=context,
        stored=stored,
        active=active,
        once=_block_cost(cfg, moe=False).times(outer_layers) + products,
        per_loop=_block_cost(cfg, moe=cfg.n_experts > 0).times(cfg.recurrent_layers)
        + Cost(adapter),
        cache_width=cfg.cache_width,
        slots_once=outer_layers,
        slots_per_loop=cfg.recurrent_layers,
        share_loops=cfg.kv_share == "last",
    )


def _dense(cfg: MythosConfig, n_layers: int, context: int) -> Accounting:
    stored = {
        "embedding": cfg.vocab_size * cfg.dim,
        "blocks": n_layers * _block(cfg),
        "head": _head(cfg),
    }
    return Accounting(
        architecture="dense",
        n_loops=1,
        context=context,
        stored=stored,
        active=stored,
        once=_block_cost(cfg, moe=False).times(n_layers) + Cost(cfg.dim * cfg.vocab_size),
        per_loop=Cost(),
        cache_width=cfg.cache_width,
        slots_once=n_layers,
        slots_per_loop=0,
        share_loops=False,
    )


def _head(cfg: MythosConfig) -> int:
    """Parameters of the final norm and of the head, which may be the embedding."""
    return cfg.dim + (0 if cfg.tie_embeddings else cfg.dim * cfg.vocab_size)


def _block(cfg: MythosConfig, experts: int = 0) -> int:
    """Parameters of one block, with ``experts`` routed experts or a dense feed-forward."""
    norms = 2 * cfg.dim
    if cfg.attn_type == "mla":
        norms += cfg.q_lora_rank + cfg.kv_lora_rank
    weights = _attention_weights(cfg) + norms
    if not experts:
        return weights + 3 * cfg.dim * cfg.hidden_dim
    # the router scores every expert, however few are counted
    return weights + cfg.dim * (cfg.n_experts + 3 * (experts * cfg.expert_dim + cfg.shared_dim))


def _attention_weights(cfg: MythosConfig) -> int:
    """Elements of the projections of one attention layer."""
    if cfg.attn_type == "gqa":
        return 2 * cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads) * cfg.dim
    queries = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    query = (cfg.dim + queries) * cfg.q_lora_rank if cfg.q_lora_rank else cfg.dim * queries
    down = cfg.dim * cfg.cache_width
    return query + down + _latent_up(cfg) + cfg.n_heads * cfg.v_head_dim * cfg.dim


def _latent_up(cfg: MythosConfig) -> int:
    """Elements of the projection from a latent to the keys and values of all heads."""
    return cfg.kv_lora_rank * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)


def _block_cost(cfg: MythosConfig, moe: bool) -> Cost:
    """Cost of a token in one block."""
    if moe:
        width = cfg.n_experts_per_tok * cfg.expert_dim + cfg.shared_dim
        feed_forward = cfg.dim * (cfg.n_experts + 3 * width)
    else:
        feed_forward = 3 * cfg.dim * cfg.hidden_dim
    if cfg.attn_type == "gqa":
        position = 2 * cfg.n_heads * cfg.head_dim
        return Cost(_attention_weights(cfg) + feed_forward, position, position)
    key = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    position = cfg.n_heads * (key + cfg.v_head_dim)
    # absorbing folds the up-projection into query and output, which costs one token's worth of it
    absorbed = 2 * cfg.n_heads * cfg.cache_width
    return Cost(_attention_weights(cfg) + feed_forward, position, absorbed)


@dataclass(frozen=True)
class CacheRow:
    """Cached elements of one variant, against attention that keeps keys and values.

    The rivals have heads as wide as an ordinary transformer of this width: dim / n_heads.

    Attributes:
        variant: Name of the variant.
        n_heads: Query heads H.
        head_dim: dim / n_heads.
        n_loops: Loops counted.
        mla: Elements per token and slot: latent and shared rotary key.
        mha: The same for H key/value heads.
        gqa8: The same for 8 key/value heads; None where 8 does not divide H.
        gqa4: The same for 4 key/value heads; None where 4 does not divide H.
        unshared: Keys and values of MLA's own heads, as a cache would hold them that expands the
            latent.
        slots: (layer, loop) slots of an exact cache.
        slots_shared: Slots with ``kv_share="last"``.
        bytes_per_token: bfloat16 bytes of an exact MLA cache over all slots.
        bytes_per_token_shared: The same with ``kv_share="last"``.
        bytes_per_token_mha: bfloat16 bytes of an exact multi-head cache over all slots.
    """

    variant: str
    n_heads: int
    head_dim: int
    n_loops: int
    mla: int
    mha: int
    gqa8: int | None
    gqa4: int | None
    unshared: int
    slots: int
    slots_shared: int
    bytes_per_token: int
    bytes_per_token_shared: int
    bytes_per_token_mha: int

    @property
    def over_mha(self) -> float:
        """How many times less than multi-head attention."""
        return self.mha / self.mla

    @property
    def over_gqa8(self) -> float | None:
        """How many times less than 8 key/value heads."""
        return None if self.gqa8 is None else self.gqa8 / self.mla

    @property
    def over_gqa4(self) -> float | None:
        """How many times less than 4 key/value heads."""
        return None if self.gqa4 is None else self.gqa4 / self.mla


def cache_rows(variants: Iterable[str] = VARIANTS) -> list[CacheRow]:
    """The cache of MLA against MHA, GQA-8 and GQA-4 at equal heads, for each variant."""
    return [_cache_row(name) for name in variants]


def _cache_row(name: str) -> CacheRow:
    cfg = variant(name)
    head_dim = cfg.dim // cfg.n_heads
    slots = cfg.cache_slots(cfg.max_loop_iters)
    slots_shared = cfg.prelude_layers + cfg.recurrent_layers + cfg.coda_layers
    mha = 2 * cfg.n_heads * head_dim
    return CacheRow(
        variant=name,
        n_heads=cfg.n_heads,
        head_dim=head_dim,
        n_loops=cfg.max_loop_iters,
        mla=cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        mha=mha,
        gqa8=None if cfg.n_heads % 8 else 2 * 8 * head_dim,
        gqa4=None if cfg.n_heads % 4 else 2 * 4 * head_dim,
        unshared=cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim),
        slots=slots,
        slots_shared=slots_shared,
        bytes_per_token=2 * cfg.cache_width * slots,
        bytes_per_token_shared=2 * cfg.cache_width * slots_shared,
        bytes_per_token_mha=2 * mha * slots,
    )
