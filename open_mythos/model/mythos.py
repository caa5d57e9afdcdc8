"""The Recurrent-Depth Transformer.

- Prelude and coda blocks run once; the recurrent block runs many times with shared weights.
- The encoded input e is injected at every loop through a linear system with rho(A) < 1.
- The recurrent block has fine-grained mixture-of-experts layers, multi-head latent or grouped-query
  attention, and a LoRA adapter per loop.
- Depth is an argument of the call, per batch or per sequence.

    e       = norm(prelude(embedding(ids)))
    h_t+1   = A h_t + B e + Transformer(h_t, e)           n_loops times, from h_0
    logits  = head(norm(coda(C h_n)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from open_mythos.checks import checked
from open_mythos.config import MythosConfig
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import CausalLM, forward_call
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ExitRule
from open_mythos.model.generation import generate
from open_mythos.model.init import init_weights
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.recurrent import ReadOut, RecurrentBlock
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer.interface import Detokenizer

if TYPE_CHECKING:
    from open_mythos.inference.static_decoder import StaticDecoder


class OpenMythos(CausalLM):
    """A causal language model with the depth as an argument of each call.

    :meth:`forward` is composed of the public :meth:`embed`, :meth:`step` and :meth:`logits`.

    Args:
        cfg: The configuration; it is validated and copied.
        head: Whether there is an output head; without one, the final states are the output of
            :meth:`hidden`.

    Raises:
        ConfigError: The configuration is invalid.
    """

    @checked
    def __init__(self, cfg: MythosConfig, head: bool = True) -> None:
        super().__init__(cfg, head)
        loop, coda = cfg.prelude_layers, cfg.prelude_layers + cfg.recurrent_layers
        self.prelude = nn.ModuleList(TransformerBlock(cfg, layer=i) for i in range(loop))
        self.prelude_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.prelude_norm else nn.Identity()
        self.recurrent = RecurrentBlock(cfg, loop, self.final_norm)
        self.readout = nn.Linear(cfg.dim, cfg.dim, bias=False) if cfg.readout else nn.Identity()
        self.coda = nn.ModuleList(
            TransformerBlock(cfg, layer=coda + i) for i in range(cfg.coda_layers)
        )
        init_weights(self, cfg.dim)

    def forward(
        self,
        input_ids: Tensor,
        n_loops: int | Sequence[int] | Tensor | None = None,
        kv_cache: KVCache | MutableMapping[str, object] | None = None,
        start_pos: int = 0,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample_seeds: Tensor | None = None,
        grad_loops: int | None = None,
        exit_rule: ExitRule | None = None,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Return logits (B, T, vocab_size).

        Args:
            input_ids: (B, T) token ids.
            n_loops: Loops for all rows, or per row; ``max_loop_iters`` by default. May exceed the
                trained depth.
            kv_cache: A :class:`KVCache`, or an initially empty dict, passed to every call. Cached
                calls run without autograd.
            start_pos: Position of the first token; ``cache.length`` with a cache.
            attention_mask: (B, T), false (0) on padding, on either side.
            document_ids: (B, T) integers; each run of equal ids is a document. Tokens attend within
                their document, and positions restart with it.
            sample_seeds: (B,) int64 keys of dropout and random initial states; by default drawn
                from torch's global generator in training, 0 in evaluation.
            grad_loops: Truncated backpropagation: number of final loops that carry gradient.
            exit_rule: Early-exit rule (:mod:`open_mythos.model.exit_rules`); the call then runs
                without autograd.
            trace: Receives diagnostics of every loop.

        Raises:
            ConfigError: An argument is out of range.
        """
        ctx = self.context(
            input_ids, kv_cache, start_pos,
            attention_mask=attention_mask, document_ids=document_ids, sample_seeds=sample_seeds,
        )  # fmt: skip
        depth = Depth(n_loops, exit_rule, grad_loops)
        with forward_call(input_ids, ctx, depth):
            e_BTD = self.embed(input_ids, ctx)
            h_BTD = self.recurrent(e_BTD, ctx, depth, read_out=self.logits, trace=trace)
            return self.logits(h_BTD, ctx)

    def hidden(
        self,
        input_ids: Tensor,
        ctx: Context,
        depth: Depth | None = None,
        trace: LoopTrace | None = None,
        read_out: ReadOut | None = None,
    ) -> Tensor:
        """Return the final hidden state (B, T, D) of :meth:`forward`, before the head.

        Losses use it with the head, without materializing the logits of a whole batch.

        ``ctx`` is the result of :meth:`context`; the depth is ``max_loop_iters`` by default.
        ``input_ids`` may also be embeddings of tokens (B, T, D), before ``embedding_scale``.
        ``read_out`` maps states to logits, for exit rules that use predictions; by default
        :meth:`logits`.
        """
        depth = depth or Depth()
        with forward_call(input_ids, ctx, depth):
            e_BTD = self.embed(input_ids, ctx)
            h_BTD = self.recurrent(e_BTD, ctx, depth, read_out=read_out or self.logits, trace=trace)
            return self.final_hidden(h_BTD, ctx)

    def unroll(
        self,
        input_ids: Tensor,
        n_loops: int,
        ctx: Context | None = None,
        *,
        h_BTD: Tensor | None = None,
        trace: LoopTrace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (t, h_{t+1}) after each loop; see :meth:`RecurrentBlock.unroll`."""
        ctx = ctx or self.context(input_ids)
        e_BTD = self.embed(input_ids, ctx)
        return self.recurrent.unroll(e_BTD, ctx, n_loops, h_BTD=h_BTD, trace=trace)

    def embed(self, input_ids: Tensor, ctx: Context | None = None) -> Tensor:
        """Compute the encoded input e (B, T, D): embedding, prelude, norm."""
        ctx = ctx or self.context(input_ids)
        x_BTD = self.embed_tokens(input_ids, ctx)
        for block in self.prelude:
            x_BTD = block(x_BTD, ctx)
        return self.prelude_norm(x_BTD)

    def step(
        self,
        h_BTD: Tensor,
        e_BTD: Tensor,
        t: int,
        ctx: Context | None = None,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Run one loop, h_t -> h_{t+1} (B, T, D); see :meth:`RecurrentBlock.step`."""
        ctx = ctx or Context.of(e_BTD, self.cfg)
        return self.recurrent.step(h_BTD, self.recurrent.injection(None, e_BTD), t, ctx, trace)

    def logits(self, h_BTD: Tensor, ctx: Context | None = None, loop: int = 0) -> Tensor:
        """Decode a state through coda and head, (B, T, D) -> logits (B, T, vocab_size)."""
        return self.head(self.final_hidden(h_BTD, ctx, loop))

    def final_hidden(self, h_BTD: Tensor, ctx: Context | None = None, loop: int = 0) -> Tensor:
        """Apply readout C, coda and norm, (B, T, D) -> (B, T, D).

        ``loop`` selects the cache slots of the coda for predictions inside the loop.
        """
        ctx = ctx or Context.of(h_BTD, self.cfg)
        if self.cfg.state_norm == "exit":
            h_BTD = self.recurrent.normed(h_BTD)
        x_BTD = self.readout(h_BTD.to(self.final_norm.weight.dtype))
        for block in self.coda:
            x_BTD = block(x_BTD, ctx, loop)
        return x_BTD if self.cfg.ends_normed else self.final_norm(x_BTD)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        n_loops: int | Sequence[int] | Tensor = 8,
        temperature: float = 1.0,
        top_k: int | None = 50,
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        tokenizer: Detokenizer | None = None,
        on_token: Callable[[int, Tensor], None] | None = None,
        exit_rule: ExitRule | None = None,
        use_cache: bool = True,
        mode: str | StaticDecoder = "eager",
    ) -> Tensor:
        """Continue every prompt with ``n_loops`` loops per token: (B, T + new), prompt included.

        A wrapper of :func:`open_mythos.model.generation.generate` with the fields of
        :class:`SamplingParams` and :class:`Depth` as arguments. ``use_cache=False`` recomputes
        everything at every token; see :mod:`open_mythos.inference.decoding` for ``mode``.
        """
        from open_mythos.inference.decoding import decoder_factory  # imports this module

        params = SamplingParams(
            max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed,
            eos_token_id, stop,
        )  # fmt: skip
        depth = Depth(n_loops, exit_rule)
        return generate(
            self, input_ids, params, depth, attention_mask=attention_mask,
            tokenizer=tokenizer, on_token=on_token,
            decoder=decoder_factory(mode, use_cache=use_cache),
        )  # fmt: skip
