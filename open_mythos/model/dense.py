"""Dense baseline: the same blocks with separate weights, each run once."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from open_mythos.checks import check_count, check_number, checked, pick
from open_mythos.config import MAX_LAYERS, MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import CausalLM, forward_call
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.generation import generate
from open_mythos.model.init import init_weights
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer.interface import Detokenizer

if TYPE_CHECKING:
    from open_mythos.inference.static_decoder import StaticDecoder


class DenseTransformer(CausalLM):
    """A decoder-only transformer of ``n_layers`` blocks with dense feed-forward layers.

    Args:
        cfg: Configuration of the looped counterpart; loop fields are ignored.
        n_layers: Number of blocks; by default as many as the looped model stores.
        ffn_dim: Hidden width of the feed-forward layers; ``cfg.hidden_dim`` by default.
    """

    @checked
    def __init__(
        self, cfg: MythosConfig, n_layers: int | None = None, ffn_dim: int | None = None
    ) -> None:
        cfg.validate()
        width = cfg.hidden_dim if ffn_dim is None else ffn_dim
        super().__init__(replace(cfg, n_experts=0, ffn_dim=width))
        stored = cfg.prelude_layers + cfg.recurrent_layers + cfg.coda_layers
        self.n_layers = check_count("n_layers", stored if n_layers is None else n_layers)
        check_number("n_layers", self.n_layers, le=MAX_LAYERS)
        self.blocks = nn.ModuleList(
            TransformerBlock(self.cfg, layer=i) for i in range(self.n_layers)
        )
        init_weights(self, cfg.dim)

    @classmethod
    def like(
        cls, cfg: MythosConfig, match: str = "parameters", n_loops: int | None = None
    ) -> DenseTransformer:
        """Build the dense counterpart of a looped model.

        Args:
            cfg: The looped model's configuration.
            match: "parameters": as many layers as the looped model stores, feed-forward layers
                widened to match the parameter count (to within one hidden unit per layer).
                "depth": one layer per executed block, as wide as the active feed-forward width.
            n_loops: Loops to unroll for "depth"; ``max_loop_iters`` by default.
        """
        pick(("parameters", "depth"), match, "DenseTransformer.like", what="match")
        if match == "depth" and (cfg.layer_overrides or cfg.value_embedding):
            raise ConfigError(
                "layers of their own cannot be unrolled", where="DenseTransformer.like",
                value=cfg.layer_overrides, allowed='match="parameters", or no layer_overrides and '
                "no value_embedding", fix="number the layers of a DenseTransformer yourself",
            )  # fmt: skip
        if match == "depth":
            loops = check_count("n_loops", cfg.max_loop_iters if n_loops is None else n_loops)
            layers = cfg.prelude_layers + cfg.recurrent_layers * loops + cfg.coda_layers
            active = cfg.shared_dim + cfg.n_experts_per_tok * cfg.expert_dim
            return cls(cfg, layers, active if cfg.n_experts else cfg.hidden_dim)
        with torch.device("meta"):
            target = parameter_count(OpenMythos(cfg))
            one, two = (parameter_count(cls(cfg, ffn_dim=width)) for width in (1, 2))
        return cls(cfg, ffn_dim=max(1, 1 + round((target - one) / (two - one))))

    def forward(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | MutableMapping[str, object] | None = None,
        start_pos: int = 0,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample_seeds: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, vocab_size); see :meth:`OpenMythos.forward` for the arguments."""
        ctx = self.context(
            input_ids, kv_cache, start_pos,
            attention_mask=attention_mask, document_ids=document_ids, sample_seeds=sample_seeds,
        )  # fmt: skip
        with forward_call(input_ids, ctx, Depth()):
            return self.head(self.final_hidden(self.embed(input_ids, ctx), ctx))

    def hidden(
        self,
        input_ids: Tensor,
        ctx: Context,
        depth: Depth | None = None,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Return the final hidden state (B, T, D); ``depth`` and ``trace`` have no effect."""
        with forward_call(input_ids, ctx, depth or Depth()):
            return self.final_hidden(self.embed(input_ids, ctx), ctx)

    def embed(self, input_ids: Tensor, ctx: Context) -> Tensor:
        """Run embedding and blocks: (B, T) ids -> (B, T, D)."""
        x_BTD = self.embed_tokens(input_ids, ctx)
        for block in self.blocks:
            x_BTD = block(x_BTD, ctx)
        return x_BTD

    def final_hidden(self, h_BTD: Tensor, ctx: Context, loop: int = 0) -> Tensor:
        """Normalize the last block's output: (B, T, D) -> (B, T, D)."""
        return self.final_norm(h_BTD)

    def generate(
        self,
        input_ids: Tensor,
        params: SamplingParams | None = None,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Detokenizer | None = None,
        on_token: Callable[[int, Tensor], None] | None = None,
        use_cache: bool = True,
        mode: str | StaticDecoder = "eager",
    ) -> Tensor:
        """Continue every prompt; see :meth:`OpenMythos.generate`."""
        from open_mythos.inference.decoding import decoder_factory  # imports this module

        return generate(
            self, input_ids, params, attention_mask=attention_mask, tokenizer=tokenizer,
            on_token=on_token, decoder=decoder_factory(mode, use_cache=use_cache),
        )  # fmt: skip


def parameter_count(model: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
