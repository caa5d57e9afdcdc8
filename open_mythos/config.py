"""The configuration of a Recurrent-Depth Transformer as plain data (this module loads no torch)."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from open_mythos.errors import ConfigError

ATTENTION_TYPES = ("mla", "gqa")
INJECTION_RULES = ("zoh", "euler")
INJECTION_MATRICES = ("full", "diagonal")
INITIAL_STATES = ("zero", "normal", "prelude")
KV_SHARING = ("none", "last")
ATTENTION_BACKENDS = ("auto", "sdpa", "flash", "flex", "reference")
MOE_BACKENDS = ("auto", "batched", "grouped", "sorted", "reference")


@dataclass
class MythosConfig:
    """Every choice that shapes a model.

    The fields may be changed after construction; :meth:`validate` runs when a model is built.
    The first block of fields and its defaults are the historical ones, the second block is ours.
    """

    vocab_size: int = 32000
    """Rows of the embedding and of the output head."""
    dim: int = 2048
    """Width D of the residual stream and of the recurrent state."""
    n_heads: int = 16
    """Query heads H."""
    n_kv_heads: int = 4
    """Key/value heads G of "gqa"; divides n_heads. "mla" has one latent for all heads."""
    max_seq_len: int = 4096
    """Longest context, in tokens; longer inputs are refused."""
    max_loop_iters: int = 16
    """Loops run when the caller names none, and the number of distinct LoRA and loop-index
    depths: beyond it both stay at their last index."""
    prelude_layers: int = 2
    """Blocks run once before the loop."""
    coda_layers: int = 2
    """Blocks run once after the loop."""
    attn_type: str = "mla"
    """"mla": multi-head latent attention (DeepSeek-V2); "gqa": grouped-query attention."""
    kv_lora_rank: int = 512
    """Width R of the cached latent of "mla"."""
    q_lora_rank: int = 1536
    """Width of the query's low-rank bottleneck of "mla"; 0 projects queries directly."""
    qk_rope_head_dim: int = 64
    """Rotary width of a key; "mla" shares this part between all heads."""
    qk_nope_head_dim: int = 128
    """Position-free width of a key head of "mla"."""
    v_head_dim: int = 128
    """Width of a value head of "mla"."""
    n_experts: int = 64
    """Routed experts E of the looped block; 0 gives it a dense feed-forward of width ffn_dim."""
    n_shared_experts: int = 2
    """Shared experts, always on, each of width expert_dim * n_experts_per_tok."""
    n_experts_per_tok: int = 4
    """Routed experts chosen for each token (top-k)."""
    expert_dim: int = 512
    """Hidden width F of one routed expert."""
    act_threshold: float = 0.99
    """Cumulative halting probability at which a position counts as finished, in (0, 1]."""
    rope_theta: float = 500000.0
    """Base of the rotary frequencies."""
    lora_rank: int = 16
    """Rank of the adapter that each loop depth owns; 0 leaves it out."""
    max_output_tokens: int = 4096
    """Most new tokens one call of generate may ask for."""
    dropout: float = 0.0
    """Dropout probability on every residual branch while training, in [0, 1)."""

    recurrent_layers: int = 1
    """Blocks inside one loop iteration."""
    ffn_dim: int = 0
    """Hidden width of the dense feed-forwards; 0 means 4/3 of dim."""
    injection_rule: str = "zoh"
    """Discretisation of the input: "zoh" (exact zero-order hold) or "euler" (Parcae)."""
    injection_matrix: str = "full"
    """B: "full" is a D x D matrix, "diagonal" one gain per channel; both start at identity."""
    initial_state: str = "zero"
    """h_0: "zero", "normal" (truncated normal, seeded per sequence), or "prelude" (h_0 = e)."""
    prelude_norm: bool = True
    """Normalise the prelude's output before it is injected; without it training can explode."""
    readout: bool = True
    """Multiply the final state by a learned matrix C, initialised to identity, before the coda."""
    loop_embedding: bool = False
    """Add a sinusoidal embedding of the loop index to the looped block's input."""
    tie_embeddings: bool = False
    """Let the output head share the embedding's weight."""
    norm_eps: float = 1e-6
    """Added to the mean square inside every RMSNorm."""
    kv_share: str = "none"
    """Cache over loops: "none" keeps a slot per loop, "last" only the last computed loop's."""
    attn_backend: str = "auto"
    """Attention kernel: "auto", "sdpa", "flash" (package flash-attn), "flex" or "reference"."""
    moe_backend: str = "auto"
    """Expert kernel: "auto", "batched", "grouped", "sorted" or "reference"."""

    @property
    def head_dim(self) -> int:
        """Width of a "gqa" head."""
        return self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """Rotary width of a key, whatever the attention type."""
        return self.qk_rope_head_dim if self.attn_type == "mla" else self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the dense feed-forwards."""
        return self.ffn_dim or 4 * self.dim // 3

    @property
    def shared_dim(self) -> int:
        """Total hidden width of the shared experts."""
        return self.n_shared_experts * self.expert_dim * self.n_experts_per_tok

    @property
    def cache_width(self) -> int:
        """Elements cached per token, layer and loop.

        "mla": kv_lora_rank + qk_rope_head_dim (DeepSeek-V2, section 2.1.2); "gqa": keys and values.
        """
        if self.attn_type == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.n_kv_heads * self.head_dim

    def cache_slots(self, n_loops: int) -> int:
        """Cache slots held for ``n_loops`` loops: one per (layer, loop), prelude and coda once."""
        loops = 1 if self.kv_share == "last" else n_loops
        return self.prelude_layers + self.recurrent_layers * loops + self.coda_layers

    def validate(self) -> None:
        """Check every field and every relation between fields.

        Raises:
            ConfigError: (a ValueError) naming the field, its value, what is allowed and the mend.
        """
        for name, least in _LEAST.items():
            _require_int(name, getattr(self, name), least)
        for name, allowed in _CHOICES.items():
            _require_choice(name, getattr(self, name), allowed)
        for name in ("prelude_norm", "readout", "loop_embedding", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        _require_number("act_threshold", self.act_threshold, lambda x: 0 < x <= 1, "0 < x <= 1")
        _require_number("rope_theta", self.rope_theta, lambda x: x > 1, "finite and > 1")
        _require_number("dropout", self.dropout, lambda x: 0 <= x < 1, "0 <= x < 1")
        _require_number("norm_eps", self.norm_eps, lambda x: x > 0, "finite and > 0")
        if self.attn_type == "gqa":
            if self.dim % self.n_heads:
                _refuse("dim", self.dim, f"a multiple of n_heads ({self.n_heads})")
            if self.n_heads % self.n_kv_heads:
                _refuse("n_kv_heads", self.n_kv_heads, f"a divisor of n_heads ({self.n_heads})")
        if self.rope_dim % 2:
            field = "qk_rope_head_dim" if self.attn_type == "mla" else "dim / n_heads"
            _refuse(field, self.rope_dim, "an even number: rotary embedding turns pairs")
        top_k = self.n_experts_per_tok
        if self.n_experts and top_k > self.n_experts:
            _refuse("n_experts_per_tok", top_k, f"1 .. n_experts ({self.n_experts})")
        if self.loop_embedding and self.dim < 16:
            _refuse("dim", self.dim, "at least 16 with loop_embedding, which uses dim / 8 channels")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MythosConfig:
        """The inverse of :meth:`to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: A key is unknown (the nearest field is named) or a value is invalid.
        """
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise unknown_key(key, known, "MythosConfig")
        config = cls(**values)
        config.validate()
        return config


_LEAST = {
    "vocab_size": 2,
    "dim": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "max_seq_len": 1,
    "max_loop_iters": 1,
    "prelude_layers": 0,
    "coda_layers": 0,
    "kv_lora_rank": 1,
    "q_lora_rank": 0,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 1,
    "v_head_dim": 1,
    "n_experts": 0,
    "n_shared_experts": 0,
    "n_experts_per_tok": 1,
    "expert_dim": 1,
    "lora_rank": 0,
    "max_output_tokens": 1,
    "recurrent_layers": 1,
    "ffn_dim": 0,
}
_CHOICES = {
    "attn_type": ATTENTION_TYPES,
    "injection_rule": INJECTION_RULES,
    "injection_matrix": INJECTION_MATRICES,
    "initial_state": INITIAL_STATES,
    "kv_share": KV_SHARING,
    "attn_backend": ATTENTION_BACKENDS,
    "moe_backend": MOE_BACKENDS,
}


def whole(value: Any) -> int | None:
    """``value`` as an integer, None when it is not one (neither is a bool)."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number (a bool is not)."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def check_count(where: str, value: Any, least: int = 1) -> int:
    """``value``, refused unless it is an integer of at least ``least``."""
    count = whole(value)
    if count is None or count < least:
        raise ConfigError(
            f"{where} is out of range", where=where, value=value,
            allowed=f"an integer >= {least}", fix=f"correct the argument {where}",
        )  # fmt: skip
    return count


def nearest(key: str, known: Any) -> str:
    """``"did you mean X?"`` for a misspelt key, or the list of what is known."""
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def unknown_key(key: str, known: Any, where: str) -> ConfigError:
    """The error for a key that no configuration has."""
    return ConfigError(
        "unknown key", where=where, value=key, allowed=f"the {len(known)} fields of {where}",
        fix=nearest(str(key), known),
    )  # fmt: skip


def _refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(
        f"{name} is out of range", where=f"MythosConfig.{name}", value=value, allowed=allowed,
        fix=f"correct {name} in the configuration",
    )  # fmt: skip


def _require_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        _refuse(name, value, f"an integer >= {least}")


def _require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        _refuse(name, value, " or ".join(repr(choice) for choice in allowed))


def _require_number(name: str, value: Any, holds: Any, allowed: str) -> None:
    if not is_number(value) or not holds(value):
        _refuse(name, value, allowed)
