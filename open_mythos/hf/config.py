"""The configuration: every field of :class:`MythosConfig`, flat, and those of ``transformers``."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any, ClassVar, get_type_hints

from transformers import PreTrainedConfig

from open_mythos.config import MythosConfig
from open_mythos.hub.transformers_format import AUTO_MAP, MODEL_TYPE, from_flat, to_flat

_TYPES = get_type_hints(MythosConfig)
# made from the dataclass, so that the two cannot drift apart
_Fields: Any = make_dataclass(
    "_Fields",
    [(each.name, _TYPES[each.name], field(default=each.default)) for each in fields(MythosConfig)],
)


class OpenMythosConfig(_Fields, PreTrainedConfig):
    """Configuration of :class:`OpenMythosModel` and :class:`OpenMythosForCausalLM`.

    It has every field of :class:`MythosConfig` under its own name, so ``from_pretrained(folder,
    n_loops=8)`` and similar calls can change any of them.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "cache", "loop_states", "exit_loops", "router_scores",
    ]  # fmt: skip
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
    }

    n_loops: int | None = None
    """Loops of a call that names none; ``max_loop_iters`` if None."""
    exit_rule: str | None = None
    """Early-exit rule of a call that names none, such as "gate:0.9"; None runs all loops."""
    use_cache: bool = True
    """Whether ``generate`` keeps a cache."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Set what follows from other fields."""
        if self.attn_type == "gqa":
            self.kv_lora_rank = None  # see `to_flat`
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, cfg: MythosConfig, **more: Any) -> OpenMythosConfig:
        """Return the configuration of ``cfg``, with ``more`` fields."""
        return cls(**to_flat(cfg), **more)

    def mythos(self) -> MythosConfig:
        """Return the configuration of the core.

        Raises:
            ConfigError: A field is invalid.
        """
        return from_flat({each.name: getattr(self, each.name) for each in fields(MythosConfig)})

    @property
    def head_dim(self) -> int:
        """Width of a head of grouped-query attention."""
        return self.mythos().head_dim

    @property
    def num_hidden_layers(self) -> int:
        """Number of cache slots at the default depth."""
        return self.mythos().cache_slots(self.n_loops or self.max_loop_iters)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        """Ignore what a file says: the number follows from other fields."""

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what a folder stores, with the place where ``trust_remote_code`` looks."""
        return {**super().to_diff_dict(), "auto_map": dict(AUTO_MAP)}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: folders refer to the installed package, not to copies of its files."""
