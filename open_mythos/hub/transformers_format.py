"""Folders that both this library and ``transformers`` read (this module does not load it).

``config.json`` holds the fields of :class:`MythosConfig` beside those of ``transformers``, and the
weights have the names of :class:`open_mythos.hf.OpenMythosForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from open_mythos.config import MythosConfig
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer import ByteTokenizer, Tokenizer

MODEL_TYPE = "open_mythos"
ARCHITECTURE = "OpenMythosForCausalLM"
CORE = "model.core."
"""Prefix of all weights but the head's."""
HEAD = "lm_head."
GENERATION_FILE = "generation_config.json"
AUTO_FILE = "modeling_open_mythos.py"
AUTO_TEXT = '''"""The classes of the installed package open-mythos, for trust_remote_code=True."""

from open_mythos.hf import OpenMythosConfig, OpenMythosForCausalLM, OpenMythosModel

__all__ = ["OpenMythosConfig", "OpenMythosForCausalLM", "OpenMythosModel"]
'''
AUTO_MAP = {
    "AutoConfig": "modeling_open_mythos.OpenMythosConfig",
    "AutoModel": "modeling_open_mythos.OpenMythosModel",
    "AutoModelForCausalLM": "modeling_open_mythos.OpenMythosForCausalLM",
}


def to_flat(cfg: MythosConfig) -> dict[str, Any]:
    """Return the fields of a configuration as ``transformers`` stores them.

    Grouped-query attention has no ``kv_lora_rank``: other tools recognize latent attention by it.
    """
    values = cfg.to_dict()
    if cfg.attn_type == "gqa":
        values["kv_lora_rank"] = None
    return values


def from_flat(values: Mapping[str, Any]) -> MythosConfig:
    """Return the configuration in the fields of a ``transformers`` one; others are its own.

    Raises:
        ConfigError: A value is invalid.
    """
    names = [each.name for each in fields(MythosConfig) if each.name in values]
    known = {name: values[name] for name in names}
    if known.get("kv_lora_rank", 0) is None:
        del known["kv_lora_rank"]
    return MythosConfig.from_dict(known)


def describe_flat(cfg: MythosConfig, dtype: str, **more: Any) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Args:
        cfg: The configuration.
        dtype: Of the weights, such as "float32".
        more: Further fields, such as ``n_loops`` and ``eos_token_id``.
    """
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "model_type": MODEL_TYPE,
        **to_flat(cfg),
        **more,
    }


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """Return the fields of special tokens; none without a tokenizer."""
    if tokenizer is None:
        return {}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return {f"{role}_token_id": token for role, token in ids.items()}


def describe_generation(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the content of ``generation_config.json``."""
    return {"_from_model_config": True, **special_ids(tokenizer)}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Store a tokenizer where ``transformers`` looks for it."""
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer.save(folder / TOKENIZER_FOLDER)  # our own, beside the one for others
        tokenizer = tokenizer.to_rust()
    tokenizer.save(folder)


def to_outer(name: str) -> str:
    """Return the name that a weight has in ``transformers``: ``head.weight`` is the LM head's."""
    return HEAD + name.removeprefix("head.") if name.startswith("head.") else CORE + name


def to_inner(name: str) -> str:
    """Return the name that a weight has here; the inverse of :func:`to_outer`.

    A name without a known prefix becomes one that no model has.
    """
    if name.startswith(HEAD):
        return "head." + name.removeprefix(HEAD)
    return name.removeprefix(CORE) if name.startswith(CORE) else f"/{name}"
