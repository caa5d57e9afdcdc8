"""The historical import path: re-exports public names."""

from open_mythos.config import MythosConfig
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.feed_forward import Expert
from open_mythos.model.layers.gqa import GQAttention
from open_mythos.model.layers.halting import ACTHalting
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.model.layers.loop_embedding import loop_index_embedding
from open_mythos.model.layers.lora import LoRAAdapter
from open_mythos.model.layers.mla import MLAttention
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.ops.rope import apply_rope, precompute_rope_freqs
from open_mythos.tokenizer import MythosTokenizer, get_vocab_size, load_tokenizer
from open_mythos.variants import (
    mythos_1b,
    mythos_1t,
    mythos_3b,
    mythos_7b,
    mythos_10b,
    mythos_50b,
    mythos_100b,
    mythos_500b,
)  # fmt: skip

__all__ = [
    "ACTHalting", "Expert", "GQAttention", "LTIInjection", "LoRAAdapter", "MLAttention",
    "MoEFFN", "MythosConfig", "MythosTokenizer", "OpenMythos", "RMSNorm", "RecurrentBlock",
    "TransformerBlock", "apply_rope", "get_vocab_size", "load_tokenizer",
    "loop_index_embedding", "mythos_1b", "mythos_1t", "mythos_3b", "mythos_7b", "mythos_10b",
    "mythos_50b", "mythos_100b", "mythos_500b", "precompute_rope_freqs",
]  # fmt: skip
