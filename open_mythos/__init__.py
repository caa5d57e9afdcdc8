"""OpenMythos: Recurrent-Depth Transformers in PyTorch.

Names are loaded when they are first used, so that ``import open_mythos`` and the configuration do
not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "open_mythos.accounting": ("Accounting", "account"),
    "open_mythos.cache": ("KVCache", "cache_bytes"),
    "open_mythos.config": ("MythosConfig",),
    "open_mythos.decoder": ("StaticDecoder",),
    "open_mythos.dense": ("DenseTransformer",),
    "open_mythos.errors": (
        "ConfigError", "DataError", "EnvironmentError_", "InternalError", "MythosError",
    ),
    "open_mythos.exits": (
        "Acceleration", "ArgmaxStable", "ExitRule", "FixedDepth", "GateExit", "KLExit", "Look",
        "StateChange", "exit_rule",
    ),
    "open_mythos.hub": ("from_pretrained", "save_pretrained"),
    "open_mythos.layers.block": ("TransformerBlock",),
    "open_mythos.layers.feed_forward": ("Expert",),
    "open_mythos.layers.gqa": ("GQAttention",),
    "open_mythos.layers.halting": ("ACTHalting", "exit_loops", "graves_weights", "halting_weights"),
    "open_mythos.layers.injection": ("LTIInjection",),
    "open_mythos.layers.loop_embedding": ("loop_index_embedding",),
    "open_mythos.layers.lora": ("LoRAAdapter",),
    "open_mythos.layers.mla": ("MLAttention",),
    "open_mythos.layers.moe": ("MoEFFN",),
    "open_mythos.layers.norm": ("RMSNorm",),
    "open_mythos.model": ("OpenMythos",),
    "open_mythos.ops.rope": ("apply_rope", "precompute_rope_freqs"),
    "open_mythos.quantization": ("WeightBytes", "is_quantized", "quantize", "weight_bytes"),
    "open_mythos.recurrent": ("RecurrentBlock",),
    "open_mythos.tokenizer": (
        "BPETokenizer", "ByteTokenizer", "MythosTokenizer", "get_vocab_size", "load_tokenizer",
    ),
    "open_mythos.trace": ("LoopTrace",),
    "open_mythos.variants": (
        "VARIANTS", "variant", "mythos_nano", "mythos_tiny", "mythos_small", "mythos_1b",
        "mythos_3b", "mythos_7b", "mythos_10b", "mythos_50b", "mythos_100b", "mythos_500b",
        "mythos_1t",
    ),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'open_mythos' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
