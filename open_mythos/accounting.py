"""Parameters, FLOPs and cache of a model.

Parameters are those of the model built on the meta device, which holds shapes only: a trillion
parameters are counted in a fraction of a second. Tests compare the FLOPs with PyTorch's counter.

What is counted as a FLOP: two for each multiplication of a token with a weight matrix, and of its
queries with keys and its attention weights with values. Norms, activations, softmax, the diagonal
decay and the embedding's lookup are left out; they are below a percent at every size here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from open_mythos.checks import check_count
from open_mythos.config import MythosConfig

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
        check_count(f"account({name})", value)
    return _counted(cfg, n_layers, loops, context)


def _counted(cfg: MythosConfig, n_layers: int | None, n_loops: int, context: int) -> Accounting:
    """Count the parameters of the model on the meta device, part by part."""
    import torch

    from open_mythos.model.dense import DenseTransformer
    from open_mythos.model.mythos import OpenMythos

    with torch.device("meta"):
        model = OpenMythos(cfg) if n_layers is None else DenseTransformer(cfg, n_layers)
    parts = _LOOPED_PARTS if n_layers is None else _DENSE_PARTS
    stored, active = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
    weights = {"once": cfg.dim * cfg.vocab_size, "loop": 0}  # the head, which may be tied
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
        # a vector is no matrix, an embedding is looked up, and the halting gate need not run
        if parameter.dim() > 1 and first not in ("embedding", "head") and ".halting." not in name:
            in_loop = first == "recurrent" and not name.endswith("injection.B")
            weights["loop" if in_loop else "once"] += read
    outer = cfg.prelude_layers + cfg.coda_layers if n_layers is None else n_layers
    looped = cfg.recurrent_layers if n_layers is None else 0
    attention = _attention_cost(cfg)
    return Accounting(
        architecture="looped" if n_layers is None else "dense",
        n_loops=n_loops,
        context=context,
        stored=stored,
        active=active,
        once=attention.times(outer) + Cost(weights["once"]),
        per_loop=attention.times(looped) + Cost(weights["loop"]),
        cache_width=cfg.cache_width,
        slots_once=outer,
        slots_per_loop=looped,
        share_loops=n_layers is None and cfg.kv_share == "last",
    )


_LOOPED_PARTS = ("embedding", "prelude", "recurrent", "coda", "head")
_DENSE_PARTS = ("embedding", "blocks", "head")
_PART = {"prelude_norm": "prelude", "readout": "coda", "final_norm": "head"}
"""First component of a parameter's name -> part of the model, where they differ."""


def _attention_cost(cfg: MythosConfig) -> Cost:
    """Cost of a token's queries, keys and values in one block, without the projections."""
    if cfg.attn_type == "gqa":
        position = 2 * cfg.n_heads * cfg.head_dim
        return Cost(0, position, position)
    key = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    # absorbing folds the up-projection into query and output, which costs one token's worth of it
    return Cost(0, cfg.n_heads * (key + cfg.v_head_dim), 2 * cfg.n_heads * cfg.cache_width)
