"""Every parameter of a model with its name, shape and sharding unit, from a configuration alone.

Names and shapes are those of ``named_parameters()`` of the built model; tests compare them for
every variant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from open_mythos.config import MythosConfig

ROOT, LOOP = "model", "recurrent"
"""The outermost sharding unit (embedding, norms outside the blocks, read-out, head), and the module
that owns the loop."""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: As in the state dict.
        shape: Its axes; sharding divides the first.
        unit: The module that is gathered as a whole: "prelude.0", "recurrent", ..., or
            :data:`ROOT`.
    """

    name: str
    shape: tuple[int, ...]
    unit: str

    @property
    def n(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def trained(self) -> bool:
        """Whether it has gradient and moments; the halting gate is trained later, on its own."""
        return "halting." not in self.name

    @property
    def expert(self) -> bool:
        """Whether it is a stack of routed experts, which expert parallelism divides."""
        return len(self.shape) == 3 and ".ffn." in self.name

    def chunk(self, processes: int) -> int:
        """Elements of the largest part, and of every padded one, when sharded over ``processes``.

        FSDP2 cuts the first axis into equal chunks, the last ones smaller or empty, and every
        process stores and sends a whole chunk.
        """
        rows = self.shape[0]
        return -(-rows // processes) * (self.n // rows)

    def held(self, processes: int, rank: int) -> int:
        """Elements that are really there in process ``rank`` of a group that shards it."""
        rows = self.shape[0]
        chunk = -(-rows // processes)
        return max(0, min(chunk, rows - rank * chunk)) * (self.n // rows)


def parameters(cfg: MythosConfig, n_layers: int | None = None) -> list[Parameter]:
    """All parameters, shared ones once.

    Args:
        cfg: The model.
        n_layers: Of the dense transformer of so many layers, instead of the looped model.
    """
    return list(_dense(cfg, n_layers) if n_layers is not None else _looped(cfg))


def _looped(cfg: MythosConfig) -> Iterator[Parameter]:
    dim, loops = cfg.dim, cfg.max_loop_iters
    yield from _ends(cfg)
    for i in range(cfg.prelude_layers):
        yield from _block(cfg, f"prelude.{i}", f"prelude.{i}")
    if cfg.prelude_norm:
        yield Parameter("prelude_norm.weight", (dim,), ROOT)
    where = LOOP
    for name in ("log_A", "dt_bias"):
        yield Parameter(f"recurrent.injection.{name}", (dim,), where)
    mixing = (dim, dim) if cfg.injection_matrix == "full" else (dim,)
    yield Parameter("recurrent.injection.B", mixing, where)
    for i in range(cfg.recurrent_layers):
        yield from _block(cfg, f"recurrent.blocks.{i}", where, moe=cfg.n_experts > 0)
    if cfg.lora_rank:
        yield Parameter("recurrent.lora.down", (loops, dim, cfg.lora_rank), where)
        yield Parameter("recurrent.lora.up", (loops, cfg.lora_rank, dim), where)
        yield Parameter("recurrent.lora_norm.weight", (dim,), where)
    yield Parameter("recurrent.halting.gate.weight", (1, dim), where)
    yield Parameter("recurrent.halting.gate.bias", (1,), where)
    if cfg.readout:
        yield Parameter("readout.weight", (dim, dim), ROOT)
    for i in range(cfg.coda_layers):
        yield from _block(cfg, f"coda.{i}", f"coda.{i}")


def _dense(cfg: MythosConfig, n_layers: int) -> Iterator[Parameter]:
    yield from _ends(cfg)
    for i in range(n_layers):
        yield from _block(cfg, f"blocks.{i}", f"blocks.{i}")


def _ends(cfg: MythosConfig) -> Iterator[Parameter]:
    """Embedding, final norm and head."""
    yield Parameter("embedding.weight", (cfg.vocab_size, cfg.dim), ROOT)
    yield Parameter("final_norm.weight", (cfg.dim,), ROOT)
    if not cfg.tie_embeddings:
        yield Parameter("head.weight", (cfg.vocab_size, cfg.dim), ROOT)


def _block(cfg: MythosConfig, name: str, unit: str, moe: bool = False) -> Iterator[Parameter]:
    dim, width = cfg.dim, cfg.expert_dim
    shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (dim,)}
    shapes |= {f"attn.{key}.weight": shape for key, shape in _attention(cfg).items()}
    shapes["ffn_norm.weight"] = (dim,)
    if moe:
        shapes["ffn.gate_up"] = (cfg.n_experts, dim, 2 * width)
        shapes["ffn.down"] = (cfg.n_experts, width, dim)
        shapes["ffn.router.weight"] = (cfg.n_experts, dim)
        if cfg.n_shared_experts:
            shapes["ffn.shared.gate_up.weight"] = (2 * cfg.shared_dim, dim)
            shapes["ffn.shared.down.weight"] = (dim, cfg.shared_dim)
    else:
        shapes["ffn.gate_up.weight"] = (2 * cfg.hidden_dim, dim)
        shapes["ffn.down.weight"] = (dim, cfg.hidden_dim)
    for key, shape in shapes.items():
        yield Parameter(f"{name}.{key}", shape, unit)


def _attention(cfg: MythosConfig) -> dict[str, tuple[int, ...]]:
    dim, heads = cfg.dim, cfg.n_heads
    if cfg.attn_type == "gqa":
        return {
            "q_proj": (heads * cfg.head_dim, dim),
            "kv_proj": (2 * cfg.n_kv_heads * cfg.head_dim, dim),
            "out_proj": (dim, heads * cfg.head_dim),
        }
    shapes: dict[str, tuple[int, ...]] = {}
    if cfg.q_lora_rank:
        shapes |= {"q_down": (cfg.q_lora_rank, dim), "q_norm": (cfg.q_lora_rank,)}
    shapes["q_up"] = (
        heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim), cfg.q_lora_rank or dim,
    )  # fmt: skip
    shapes["kv_down"] = (cfg.cache_width, dim)
    shapes["kv_norm"] = (cfg.kv_lora_rank,)
    shapes["kv_up"] = (heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank)
    shapes["out_proj"] = (dim, heads * cfg.v_head_dim)
    return shapes
