"""The configuration of a Recurrent-Depth Transformer as plain data (this module loads no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple, NoReturn

from open_mythos.checks import (
    MAX_LOOPS,
    check_fields,
    is_number,
    one_of,
    reject,
    unknown_key,
    within,
)
from open_mythos.errors import ConfigError

SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""``rope_type`` of ``rope_scaling`` -> its numbers."""
OVERRIDES = ("rope_theta", "rope_scaling", "window", "value_embedding")
"""Fields that a layer may have of its own."""
MAX_LAYERS = 1 << 12
VALUE_GATE_CHANNELS = 32
"""First channels of a layer's input, which the gate of its value embedding reads."""


class Rotary(NamedTuple):
    """A rotary embedding: width K of a head, base (0 rotates nothing), scaling as pairs."""

    dim: int
    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()


@dataclass
class MythosConfig:
    """Architecture of a model.

    Fields may be changed after construction; :meth:`validate` runs when a model is built.
    """

    vocab_size: int = within(32000, ge=2)
    """Rows of the embedding and of the output head."""
    dim: int = within(2048, ge=1)
    """Width D of the residual stream and of the recurrent state."""
    n_heads: int = within(16, ge=1)
    """Query heads H."""
    n_kv_heads: int = within(4, ge=1)
    """Key/value heads G of "gqa"; divides n_heads. "mla" has one latent for all heads."""
    max_seq_len: int = within(4096, ge=1)
    """Maximum context in tokens; longer inputs are rejected."""
    max_loop_iters: int = within(16, ge=1, le=MAX_LOOPS)
    """Default number of loops, and the number of distinct LoRA and loop-index depths: beyond it
    both stay at their last index."""
    prelude_layers: int = within(2, ge=0, le=MAX_LAYERS)
    """Blocks run once before the loop."""
    coda_layers: int = within(2, ge=0, le=MAX_LAYERS)
    """Blocks run once after the loop."""
    attn_type: str = one_of("mla", ("mla", "gqa"))
    """"mla": multi-head latent attention (DeepSeek-V2); "gqa": grouped-query attention."""
    kv_lora_rank: int = within(512, ge=1)
    """Width R of the cached latent of "mla"."""
    q_lora_rank: int = within(1536, ge=0)
    """Width of the query's low-rank bottleneck of "mla"; 0 projects queries directly."""
    qk_rope_head_dim: int = within(64, ge=2)
    """Rotary width of a key; "mla" shares this part between all heads."""
    qk_nope_head_dim: int = within(128, ge=1)
    """Position-free width of a key head of "mla"."""
    v_head_dim: int = within(128, ge=1)
    """Width of a value head of "mla"."""
    n_experts: int = within(64, ge=0)
    """Routed experts E of the looped block; 0 gives it a dense feed-forward of width ffn_dim."""
    n_shared_experts: int = within(2, ge=0)
    """Shared experts, always on, each of width expert_dim * n_experts_per_tok."""
    n_experts_per_tok: int = within(4, ge=1)
    """Routed experts chosen for each token (top-k)."""
    expert_dim: int = within(512, ge=1)
    """Hidden width F of one routed expert."""
    act_threshold: float = within(0.99, gt=0, le=1)
    """Cumulative halting probability at which a position counts as finished, in (0, 1]."""
    rope_theta: float = within(500000.0, ge=0)
    """Base of the rotary frequencies, above 1; 0 leaves queries and keys without position."""
    lora_rank: int = within(16, ge=0)
    """Rank of the per-loop LoRA adapter; 0 disables it."""
    max_output_tokens: int = within(4096, ge=1)
    """Maximum number of new tokens per call of generate."""
    dropout: float = within(0.0, ge=0, lt=1)
    """Dropout probability on every residual branch while training, in [0, 1)."""

    recurrent_layers: int = within(1, ge=1, le=MAX_LAYERS)
    """Blocks inside one loop iteration."""
    ffn_dim: int = within(0, ge=0)
    """Hidden width of the dense feed-forwards; 0 means 4/3 of dim."""
    injection_rule: str = one_of("zoh", ("zoh", "euler"))
    """Discretization of the input: "zoh" (exact zero-order hold) or "euler" (Parcae)."""
    injection_matrix: str = one_of("full", ("full", "diagonal"))
    """B: "full" is a D x D matrix, "diagonal" one gain per channel; both start at identity."""
    initial_state: str = one_of("zero", ("zero", "normal", "prelude"))
    """h_0: "zero", "normal" (truncated normal, seeded per sequence), or "prelude" (h_0 = e)."""
    prelude_norm: bool = True
    """Normalize the prelude's output before injection; without it training can diverge."""
    readout: bool = True
    """Multiply the final state by a learned matrix C, initialized to identity, before the coda."""
    loop_embedding: bool = False
    """Add a sinusoidal embedding of the loop index to the looped block's input."""
    tie_embeddings: bool = False
    """Share the embedding's weight with the output head."""
    norm_eps: float = within(1e-6, gt=0)
    """Added to the mean square inside every RMSNorm."""
    kv_share: str = one_of("none", ("none", "last"))
    """KV cache over loops: "none" keeps a slot per loop, "last" one slot, that of the last loop."""
    attn_backend: str = one_of("auto", ("auto", "sdpa", "flash", "flex", "reference"))
    """Attention kernel: "auto", "sdpa", "flash" (package flash-attn), "flex" or "reference"."""
    moe_backend: str = one_of("auto", ("auto", "batched", "grouped", "sorted", "reference"))
    """Expert kernel: "auto", "batched", "grouped", "sorted" or "reference"."""
    injection: str = one_of("lti", ("lti", "concat", "add", "none"))
    """How a loop combines its state h with the encoded input e: "lti" (A h + B e, rho(A) < 1),
    "concat" (A h + B e, unbounded; W [h; e] of Huginn), "add" (h + e) or "none" (h)."""
    identity_carry: bool = False
    """Fix A of "concat" at the identity: h + B e."""
    injection_bias: bool = False
    """Add a bias to the injection of "concat"."""
    block_norms: str = one_of("in", ("in", "out", "sum", "in+out", "in+sum"))
    """RMSNorms of a block: of a branch's input ("in": pre-norm), of its output before the residual
    ("out"), of the sum after it ("sum": post-norm), or two ("in+out", "in+sum": sandwich)."""
    gqa_head_dim: int = within(0, ge=0)
    """Width of a "gqa" head; 0 means dim / n_heads."""
    qk_norm: str = one_of("none", ("none", "head", "head_after_rope", "width"))
    """RMSNorm of "gqa" queries and keys: "none", "head" (of each head, before the rotation),
    "head_after_rope", or "width" (of all heads at once, before the rotation)."""
    qk_norm_eps: float = within(0.0, ge=0)
    """Added to the mean square inside the query and key norms; 0 means norm_eps."""
    qkv_bias: bool = False
    """Add a bias to the query, key and value projections of "gqa"."""
    ffn_kind: str = one_of("swiglu", ("swiglu", "geglu", "relu2"))
    """Dense feed-forward: "swiglu", "geglu" (tanh-approximated GELU) or "relu2" (squared ReLU, two
    matrices). Experts are SwiGLU."""
    embedding_scale: float = within(1.0, gt=0)
    """Factor on the token embeddings, such as sqrt(dim)."""
    logit_scale: float = within(1.0, gt=0)
    """Factor on the logits."""
    logit_softcap: float = within(0.0, ge=0)
    """Bound c of the logits, applied as c tanh(logits / c); 0 leaves them unbounded."""
    attn_scale: float = within(0.0, ge=0)
    """Factor on the attention scores of "gqa"; 0 means head_dim^-0.5."""
    rope_scaling: dict[str, Any] | None = None
    """Scaled rotary frequencies: {"rope_type": "linear", "factor": f}, or "llama3" with factor,
    low_freq_factor, high_freq_factor and original_max_position_embeddings."""
    window: int = within(0, ge=0)
    """Positions that a token attends to, itself included; 0 for all earlier ones."""
    layer_overrides: dict[str, dict[str, Any]] | None = None
    """Stored layer (prelude, loop, coda, from "0") -> its own rope_theta, rope_scaling, window and
    value_embedding."""
    state_norm: str = one_of("none", ("none", "loop", "exit"))
    """RMSNorm of the state: "loop" after every loop, "exit" once, before read-out and coda."""
    state_norm_weight: str = one_of("final", ("final", "plain"))
    """Weight of state_norm: "final" is that of the final norm, which is then not applied again to a
    state that neither read-out nor coda changes; "plain" is none."""
    value_embedding: bool = False
    """Add to the values of "gqa" an embedding of the token, times a gate per head."""
    initial_state_std: float = within(0.0, ge=0)
    """Standard deviation of initial_state="normal"; 0 means sqrt(2/5)."""
    relaxation: str = one_of("none", ("none", "mean"))
    """State after loop t: its output y_t ("none"), or the mean of y_0 .. y_t ("mean"), which damps
    a block that was not trained to repeat."""
    causal: bool = True
    """Whether a token attends to itself and earlier ones only. False lets all tokens attend to each
    other, for tasks other than next-token prediction: such a model has no cache and cannot
    generate."""

    def __post_init__(self) -> None:
        if isinstance(self.layer_overrides, dict):  # as JSON stores it
            self.layer_overrides = {str(layer): own for layer, own in self.layer_overrides.items()}

    @property
    def head_dim(self) -> int:
        """Width of a "gqa" head."""
        return self.gqa_head_dim or self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """Rotary width of a key, for either attention type."""
        return self.qk_rope_head_dim if self.attn_type == "mla" else self.head_dim

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding of layers without an override."""
        return Rotary(
            self.rope_dim, float(self.rope_theta), tuple(sorted((self.rope_scaling or {}).items()))
        )

    @property
    def ends_normed(self) -> bool:
        """Whether the last state is normalized by the final norm and goes to the head as it is."""
        normed = self.state_norm == "exit" or (
            self.state_norm == "loop" and self.relaxation == "none"  # a mean is not normalized
        )
        by_final = normed and self.state_norm_weight == "final"
        return by_final and not self.readout and not self.coda_layers

    @property
    def stored_layers(self) -> int:
        """Blocks of prelude, loop and coda, each counted once."""
        return self.prelude_layers + self.recurrent_layers + self.coda_layers

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Stored layers with a value embedding."""
        return tuple(i for i in range(self.stored_layers) if self.at(i).value_embedding)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Every rotary embedding of the model once, its default first."""
        layers = (self.at(int(layer)).rotary for layer in self.layer_overrides or ())
        return tuple(dict.fromkeys((self.rotary, *layers)))

    def at(self, layer: int) -> MythosConfig:
        """Return the configuration of one stored layer, its overrides applied."""
        if not self.layer_overrides:
            return self
        return replace(self, layer_overrides=None, **self.layer_overrides.get(str(layer), {}))

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
        """Return the cache slots of ``n_loops`` loops: one per (layer, loop) and outer layer."""
        loops = 1 if self.kv_share == "last" else n_loops
        return self.prelude_layers + self.recurrent_layers * loops + self.coda_layers

    def validate(self) -> None:
        """Check every field and every relation between fields.

        Raises:
            ConfigError: (a ValueError) naming the field, its value and the allowed values.
        """
        check_fields("MythosConfig", self)
        gqa = self.attn_type == "gqa"
        if gqa and not self.gqa_head_dim and self.dim % self.n_heads:
            self._reject("dim", f"a multiple of n_heads ({self.n_heads})")
        if gqa and self.n_heads % self.n_kv_heads:
            self._reject("n_kv_heads", f"a divisor of n_heads ({self.n_heads})")
        if self.rope_dim % 2:
            name = "head_dim" if gqa else "qk_rope_head_dim"
            self._reject(name, "an even number: the rotary embedding rotates pairs of channels")
        if 0 < self.n_experts < self.n_experts_per_tok:
            self._reject("n_experts_per_tok", f"1 .. n_experts ({self.n_experts})")
        if self.loop_embedding and self.dim < 16:
            self._reject("dim", "at least 16 with loop_embedding, which uses dim / 8 channels")
        concat, lti = self.injection == "concat", self.injection == "lti"
        self._only(gqa, 'attn_type="gqa"', "gqa_head_dim", "qk_norm", "qk_norm_eps", "qkv_bias")
        self._only(gqa, 'attn_type="gqa"', "attn_scale", "value_embedding")
        self._only(self.state_norm != "none", "a state_norm", "state_norm_weight")
        self._only(self.initial_state == "normal", 'initial_state="normal"', "initial_state_std")
        self._only(self.qk_norm != "none", "a qk_norm", "qk_norm_eps")
        self._only(not self.n_experts, "n_experts=0: experts are SwiGLU", "ffn_kind")
        self._only(concat, 'injection="concat"', "identity_carry", "injection_bias")
        self._only(lti, 'injection="lti"', "injection_rule")
        self._only(self.causal, "causal=True", "window")
        self._only(concat or lti, 'injection="lti" or "concat"', "injection_matrix")

        if 0 < self.rope_theta <= 1:
            self._reject("rope_theta", "0, or a finite number > 1")
        if self.rope_scaling is not None and not _is_scaling(self.rope_scaling):
            kinds = "; ".join(f"{name!r} with {', '.join(SCALINGS[name])}" for name in SCALINGS)
            self._reject("rope_scaling", f"None, or rope_type {kinds}, all > 0")
        if self.layer_overrides is not None:
            self._check_overrides(self.layer_overrides)
        if self.dim < VALUE_GATE_CHANNELS and self._has_value_embedding():
            self._reject("dim", f"at least {VALUE_GATE_CHANNELS} with value_embedding")

    def _check_overrides(self, overrides: Any) -> None:
        # no loop over all layers: their number may be anything until the weights are counted
        allowed = f'layer "0" .. "{self.stored_layers - 1}" -> some of {", ".join(OVERRIDES)}'
        if not isinstance(overrides, dict):
            self._reject("layer_overrides", allowed)
        for layer, own in overrides.items():
            known = isinstance(own, dict) and own.keys() <= set(OVERRIDES)
            number = int(layer) if layer.isdecimal() else -1
            if not known or str(number) != layer or number >= self.stored_layers:
                self._reject("layer_overrides", allowed)
            replace(self, layer_overrides=None, **own).validate()

    def _has_value_embedding(self) -> bool:
        own = [each.get("value_embedding") for each in (self.layer_overrides or {}).values()]
        return self.value_embedding or any(own)

    def require_causal(self, where: str) -> None:
        """Raise a ConfigError unless tokens attend to earlier ones only."""
        if not self.causal:
            raise ConfigError(
                "a bidirectional model predicts no next token", where=where, value="causal=False",
                allowed="a model with causal=True", fix="call the model on whole sequences",
            )  # fmt: skip

    def _only(self, used: bool, condition: str, *names: str) -> None:
        """Reject fields that are set although nothing reads them unless ``condition`` holds."""
        for name in names:
            default = type(self).__dataclass_fields__[name].default
            if not used and getattr(self, name) != default:
                self._reject(name, f"{default!r}, or {condition}")

    def _reject(self, name: str, allowed: str) -> NoReturn:
        reject("MythosConfig", self, name, allowed)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MythosConfig:
        """Build a configuration from :meth:`to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: A key is unknown (the nearest field is named) or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                "not a set of fields", where="MythosConfig", value=values, allowed="a mapping"
            )
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise unknown_key(key, known, "MythosConfig")
        config = cls(**values)
        config.validate()
        return config


def _is_scaling(value: Any) -> bool:
    """Return whether ``value`` is a ``rope_scaling``."""
    if not isinstance(value, dict) or value.get("rope_type") not in SCALINGS:
        return False
    numbers = SCALINGS[value["rope_type"]]
    return value.keys() == {"rope_type", *numbers} and all(
        is_number(value[name]) and value[name] > 0 for name in numbers
    )
