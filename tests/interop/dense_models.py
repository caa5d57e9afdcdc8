"""Tiny dense models of transformers with random weights, one per family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# fmt: off
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "llama 3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }}),
    "llama, scaled": ("Llama", {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    }),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral, window": ("Mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4,
    }),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 0, 1, 1]}),
    "gemma3": ("Gemma3", {
        "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "final_logit_softcapping": 30.0,
    }),
}
"""Name -> class prefix and settings."""
# fmt: on


def dense_model(family: str, **changes: Any) -> Any:
    """A randomised model of ``family``: norms and biases too, so that a wrong place shows."""
    prefix, settings = FAMILIES[family]
    suffix = "TextConfig" if prefix == "Gemma3" else "Config"
    config = getattr(transformers, f"{prefix}{suffix}")(**SIZES | settings | changes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
    return model.eval()


def words() -> Any:
    """A tokenizer of transformers without a pad token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(90))]
    rust = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>",
    )  # fmt: skip
