"""OpenMythos: Recurrent-Depth Transformers in PyTorch.

Public names are imported on first use, so ``import open_mythos`` does not load torch.
"""

from __future__ import annotations

from open_mythos.lazy import lazy_names

_MODULES = {
    "open_mythos.accounting": ("Accounting", "account"),
    "open_mythos.model.cache": ("KVCache", "cache_bytes"),
    "open_mythos.config": ("MythosConfig",),
    "open_mythos.inference.engine": ("Engine",),
    "open_mythos.inference.offline": ("Completion",),
    "open_mythos.inference.static_decoder": ("StaticDecoder",),
    "open_mythos.model.dense": ("DenseTransformer",),
    "open_mythos.model.depth": ("Depth",),
    "open_mythos.errors": (
        "ConfigError", "DataError", "EnvironmentError_", "InternalError", "MythosError",
    ),
    "open_mythos.model.exit_rules": (
        "Acceleration", "ArgmaxStable", "AtLeast", "ExitRule", "FixedDepth", "GateExit", "KLExit",
        "Look", "StateChange", "exit_rule",
    ),
    "open_mythos.hub.pretrained": ("from_pretrained", "save_pretrained"),
    "open_mythos.model.layers.block": ("TransformerBlock",),
    "open_mythos.model.layers.feed_forward": ("Expert",),
    "open_mythos.model.layers.gqa": ("GQAttention",),
    "open_mythos.model.layers.halting": (
        "ACTHalting", "exit_loops", "graves_weights", "halting_weights",
    ),
    "open_mythos.model.layers.injection": ("LTIInjection",),
    "open_mythos.model.layers.loop_embedding": ("loop_index_embedding",),
    "open_mythos.model.layers.lora": ("LoRAAdapter",),
    "open_mythos.model.layers.mla": ("MLAttention",),
    "open_mythos.model.layers.moe": ("MoEFFN",),
    "open_mythos.model.layers.norm": ("RMSNorm",),
    "open_mythos.model.mythos": ("OpenMythos",),
    "open_mythos.ops.sampling": ("SamplingParams",),
    "open_mythos.ops.rope": ("apply_rope", "precompute_rope_freqs"),
    "open_mythos.inference.quantization": (
        "WeightBytes", "is_quantized", "quantize", "weight_bytes",
    ),
    "open_mythos.model.recurrent": ("RecurrentBlock",),
    "open_mythos.tokenizer": (
        "BPETokenizer", "ByteTokenizer", "MythosTokenizer", "get_vocab_size", "load_tokenizer",
    ),
    "open_mythos.model.trace": ("LoopTrace",),
    "open_mythos.variants": (
        "VARIANTS", "variant", "mythos_nano", "mythos_tiny", "mythos_small", "mythos_1b",
        "mythos_3b", "mythos_7b", "mythos_10b", "mythos_50b", "mythos_100b", "mythos_500b",
        "mythos_1t",
    ),
}  # fmt: skip

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
