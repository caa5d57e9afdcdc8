"""Parameters, FLOPs and cache size of a model.

Parameters are counted on a model built on the meta device, which allocates no memory: a trillion
takes a fraction of a second. FLOPs are two per multiply-add of a token's matmuls with weights and
of its attention; norms, activations, softmax, the diagonal decay and the embedding lookup (together
below 1 %) are not counted. Tests compare them with PyTorch's FLOP counter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from open_mythos.checks import check_count, checked
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError

if TYPE_CHECKING:
    from open_mythos.model.dense import DenseTransformer
    from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one token."""

    weights: int = 0
    """Of matmuls with weights."""
    position: int = 0
    """Of a block's attention, per attended position (itself included), in training and prefill."""
    decode_position: int = 0
    """Of a block's attention, per attended position, in single-token decoding."""
    windows: tuple[int, ...] = ()
    """Window of each block; 0 for none."""

    def flops(self, context: int) -> float:
        """Return the FLOPs of a token in prefill, mean over a causal sequence of ``context``."""
        seen = sum(_mean_seen(context, window) for window in self.windows)
        return 2 * (self.weights + seen * self.position)

    def decode_flops(self, context: int) -> float:
        """Return the FLOPs of a decoded token with ``context`` positions, itself included."""
        seen = sum(min(context, window or context) for window in self.windows)
        return 2 * (self.weights + seen * self.decode_position)


@dataclass(frozen=True)
class Accounting:
    """Parameters of a model and cost of a token; computed by :func:`account`."""

    architecture: str
    """"looped" or "dense"."""
    n_loops: int
    """Default loops of the methods; 1 for a dense model."""
    context: int
    """Default positions of the methods."""
    stored: dict[str, int]
    """Part of the model -> parameters."""
    active: dict[str, int]
    """Part of the model -> parameters used by one token: top-k experts, adapters of loops run."""
    once: Cost
    """Outside the loop."""
    per_loop: Cost
    """Of one loop."""
    cache_width: int
    """Elements per token and slot."""
    slots_once: int
    """Cache slots outside the loop."""
    slots_per_loop: int
    """Cache slots of one loop."""
    share_loops: bool
    """Whether all loops share one loop's slots (``kv_share="last"``)."""

    @property
    def parameters(self) -> int:
        """Total number of parameters; tied ones count once."""
        return sum(self.stored.values())

    @property
    def parameters_without_embedding(self) -> int:
        """Parameters other than the embedding and the output head."""
        return self.parameters - self.stored["embedding"] - self.stored["head"]

    @property
    def active_parameters(self) -> int:
        """Parameters used by one token, embedding and head included."""
        return sum(self.active.values())

    def forward_flops(self, n_loops: float | None = None, context: int | None = None) -> float:
        """Return the FLOPs per token of a forward pass over a causal sequence.

        Args:
            n_loops: Loops, possibly a mean over sequences.
            context: Sequence length; tokens attend to (context + 1) / 2 positions on average.
        """
        context = self.context if context is None else context
        return self.once.flops(context) + self._loops(n_loops) * self.per_loop.flops(context)

    def training_flops(
        self, n_loops: float | None = None, grad_loops: float | None = None,
        context: int | None = None,
    ) -> float:  # fmt: skip
        """Return the FLOPs per token of a training step: 6 N with gradient, 2 N without.

        Recomputation by activation checkpointing is not counted, as in model FLOPs utilization.

        Args:
            n_loops: Loops, possibly a mean over sequences.
            grad_loops: How many of these carry gradient; all by default.
            context: Sequence length.
        """
        context, loops = self.context if context is None else context, self._loops(n_loops)
        with_grad = loops if grad_loops is None else min(loops, grad_loops)
        per_loop = self.per_loop.flops(context)
        return 3 * self.once.flops(context) + (loops + 2 * with_grad) * per_loop

    def decode_flops(self, n_loops: float | None = None, context: int | None = None) -> float:
        """Return the FLOPs of decoding one token with ``context`` positions, itself included."""
        context = self.context if context is None else context
        per_loop = self.per_loop.decode_flops(context)
        return self.once.decode_flops(context) + self._loops(n_loops) * per_loop

    def cache_elements(self, n_loops: int | None = None) -> int:
        """Return the cached elements per token."""
        loops = 1 if self.share_loops else int(self._loops(n_loops))
        return self.cache_width * (self.slots_once + self.slots_per_loop * loops)

    def cache_bytes(self, n_loops: int | None = None, element_size: int = 2) -> int:
        """Return the cached bytes per token; ``element_size`` 2 is bfloat16."""
        return self.cache_elements(n_loops) * element_size

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and derived totals as JSON-ready values."""
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


@checked
def account(
    model: MythosConfig | OpenMythos | DenseTransformer,
    n_loops: int | None = None,
    context: int | None = None,
    *,
    n_layers: int | None = None,
) -> Accounting:
    """Count the parameters, FLOPs and cache size of ``model``.

    Args:
        model: A configuration, or a model built from one.
        n_loops: Loops; ``max_loop_iters`` by default, ignored for a dense model.
        context: Positions; ``max_seq_len`` by default.
        n_layers: Count the :class:`DenseTransformer` with this many layers instead.

    Raises:
        ConfigError: The configuration is invalid, or a number is not a positive integer.
    """
    import torch

    from open_mythos.model.dense import DenseTransformer
    from open_mythos.model.mythos import OpenMythos

    cfg = model if isinstance(model, MythosConfig) else getattr(model, "cfg", None)
    if not isinstance(cfg, MythosConfig):
        raise ConfigError(
            "not a model", where="model", value=model, allowed="a MythosConfig, or a model of one",
            fix="pass model.cfg",
        )  # fmt: skip
    if not isinstance(model, MythosConfig):
        n_layers = getattr(model, "n_layers", None)
    cfg.validate()
    context = cfg.max_seq_len if context is None else context
    n_loops = 1 if n_layers is not None else cfg.max_loop_iters if n_loops is None else n_loops
    layers = 1 if n_layers is None else n_layers
    for name, value in (("n_loops", n_loops), ("context", context), ("n_layers", layers)):
        check_count(f"account({name})", value)
    with torch.device("meta"):
        model = OpenMythos(cfg) if n_layers is None else DenseTransformer(cfg, n_layers)
    parts = _LOOPED_PARTS if n_layers is None else _DENSE_PARTS
    stored, active = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
    weights = {"once": cfg.dim * cfg.vocab_size, "loop": 0}  # head, tied or not
    for name, parameter in model.named_parameters():
        first, part = name.split(".")[0], _PART.get(name.split(".")[0], name.split(".")[0])
        used = read = parameter.numel()
        if parameter.dim() == 3 and ".ffn." in name:  # routed experts
            used = read = read // cfg.n_experts * cfg.n_experts_per_tok
        elif ".lora." in name:
            read //= cfg.max_loop_iters
            used = read * min(n_loops, cfg.max_loop_iters)
        stored[part] += parameter.numel()
        active[part] += used
        # only matmuls count, and the halting gate is optional
        if parameter.dim() > 1 and first not in _READ_BY_ROW and ".halting." not in name:
            in_loop = first == "recurrent" and not name.endswith("injection.B")
            weights["loop" if in_loop else "once"] += read
    outer = cfg.prelude_layers + cfg.coda_layers if n_layers is None else n_layers
    looped = cfg.recurrent_layers if n_layers is None else 0
    windows = [cfg.at(layer).window for layer in range(outer + looped)]
    begin, end = (cfg.prelude_layers, cfg.prelude_layers + looped) if looped else (0, 0)
    inside, around = windows[begin:end], windows[:begin] + windows[end:]
    once, per_loop = (
        Cost(weights[part], *_attention_cost(cfg), tuple(blocks))
        for part, blocks in (("once", around), ("loop", inside))
    )
    return Accounting(
        "looped" if n_layers is None else "dense", n_loops, context, stored, active, once, per_loop,
        cache_width=cfg.cache_width, slots_once=outer, slots_per_loop=looped,
        share_loops=n_layers is None and cfg.kv_share == "last",
    )  # fmt: skip


_READ_BY_ROW = ("embedding", "value_embeddings", "head")
"""Modules whose matmuls are none, or counted apart."""
_LOOPED_PARTS = ("embedding", "prelude", "recurrent", "coda", "head")
_DENSE_PARTS = ("embedding", "blocks", "head")
_PART = {
    "value_embeddings": "embedding",
    "prelude_norm": "prelude",
    "readout": "coda",
    "final_norm": "head",
}
"""First component of a parameter's name -> part of the model, where different."""


def _mean_seen(context: int, window: int) -> float:
    """Return the positions that a token attends to, mean over a causal sequence."""
    if not window or window >= context:
        return (context + 1) / 2
    return window - window * (window - 1) / (2 * context)


def _attention_cost(cfg: MythosConfig) -> tuple[int, int]:
    """Return ``position`` and ``decode_position`` of :class:`Cost` of one block."""
    if cfg.attn_type == "gqa":
        position = 2 * cfg.n_heads * cfg.head_dim
        return position, position
    key = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    # absorbed decoding folds the up-projection into query and output: one token's worth of it
    return cfg.n_heads * (key + cfg.v_head_dim), 2 * cfg.n_heads * cfg.cache_width
