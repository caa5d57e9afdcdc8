"""The Recurrent-Depth Transformer.

- Prelude, loop, coda: blocks run once, one block run many times with the same weights, blocks run
  once. More loops deepen the computation, not the model.
- The encoded input e is injected at every loop through a linear system with rho(A) < 1.
- The looped block has a mixture of fine-grained experts, latent or grouped-query attention, and a
  small adapter per loop depth.
- Depth is an argument of the call, for the whole batch or for each sequence.

    e       = norm(prelude(embedding(ids)))
    h_t+1   = A h_t + B e + Transformer(h_t, e)           n_loops times, from h_0
    logits  = head(norm(coda(C h_n)))
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from open_mythos.checks import check_count, whole
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.inference.static_decoder import StaticDecoder
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.context import Context
from open_mythos.model.exit_rules import ExitRule
from open_mythos.model.generation import Decoder, generate
from open_mythos.model.init import init_weights
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.trace import LoopTrace


class OpenMythos(CausalLM):
    """A causal language model whose depth is chosen at every call.

    The seam ``embed -> step -> decode`` is public: ``forward`` is nothing but these three.

    Args:
        cfg: The configuration; it is validated and copied.

    Raises:
        ConfigError: (a ValueError) the configuration is invalid.
    """

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(cfg)
        loop, coda = cfg.prelude_layers, cfg.prelude_layers + cfg.recurrent_layers
        self.prelude = nn.ModuleList(TransformerBlock(cfg, layer=i) for i in range(loop))
        self.prelude_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.prelude_norm else nn.Identity()
        self.recurrent = RecurrentBlock(cfg, first_layer=loop)
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
        """Logits (B, T, vocab_size).

        Args:
            input_ids: (B, T) token ids.
            n_loops: Loops for all rows, or one number per row; ``max_loop_iters`` by default. May
                exceed the trained depth.
            kv_cache: A :class:`KVCache`, or an empty dict handed back at every call. A cached call
                runs without autograd.
            start_pos: Position of the first token; ``cache.length`` when there is a cache.
            attention_mask: (B, T), false on padding.
            document_ids: (B, T) integers; tokens see only their own document, a run of equal ids.
            sample_seeds: (B,) keys of each sequence's randomness (dropout, random h_0).
            grad_loops: Truncated back-propagation: gradient through the last loops of a row only.
            exit_rule: Lets positions stop before their depth
                (:mod:`open_mythos.model.exit_rules`); such a call runs without autograd.
            trace: Receives diagnostics of every loop.

        Raises:
            ConfigError: An argument is out of range (no loops, an unknown token, too long, ...).
        """
        return self.logits(
            input_ids, kv_cache, start_pos,
            attention_mask=attention_mask, document_ids=document_ids, sample_seeds=sample_seeds,
            n_loops=n_loops, grad_loops=grad_loops, exit_rule=exit_rule, trace=trace,
        )  # fmt: skip

    def body(
        self,
        input_ids: Tensor,
        ctx: Context,
        *,
        n_loops: int | Sequence[int] | Tensor | None = None,
        grad_loops: int | None = None,
        exit_rule: ExitRule | None = None,
        least_loops: int = 0,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Prelude, loop, coda: (B, T) ids -> (B, T, D).

        The arguments are those of :meth:`forward` and of :meth:`RecurrentBlock.forward`.
        """
        depth = self.resolve_depth(n_loops, input_ids.shape[0])
        if grad_loops is not None:
            check_count("grad_loops", grad_loops)
        e_BTD = self.embed(input_ids, ctx)
        h_BTD = self.recurrent(
            e_BTD, ctx, depth,
            grad_loops=grad_loops, exit_rule=exit_rule, predict=self._predict,
            least_loops=least_loops, trace=trace,
        )  # fmt: skip
        return self.final_hidden(h_BTD, ctx)

    def embed(self, input_ids: Tensor, ctx: Context | None = None) -> Tensor:
        """The encoded input e (B, T, D): embedding, prelude, norm."""
        ctx = ctx or self.context(input_ids)
        x_BTD = self.embed_tokens(input_ids)
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
        """One loop, h_t -> h_{t+1} (B, T, D); see :meth:`RecurrentBlock.step`."""
        ctx = ctx or self._plain_context(e_BTD)
        return self.recurrent.step(h_BTD, self.recurrent.injection.drive(e_BTD), t, ctx, trace)

    def decode(self, h_BTD: Tensor, ctx: Context | None = None) -> Tensor:
        """Logits (B, T, vocab_size) that the state h stands for: read-out, coda, norm, head."""
        return self.head(self.final_hidden(h_BTD, ctx))

    def _predict(self, h_BTD: Tensor, ctx: Context, t: int) -> Tensor:
        """Logits after loop t, of positions still running; their context holds a lens cache."""
        return self.head(self.final_hidden(h_BTD, ctx, t))

    def final_hidden(self, h_BTD: Tensor, ctx: Context | None = None, loop: int = 0) -> Tensor:
        """The final hidden state (B, T, D) that h stands for: C h, coda, norm.

        ``loop`` names the cache slots of the coda when a state is read out inside the loop.
        """
        ctx = ctx or self._plain_context(h_BTD)
        x_BTD = self.readout(h_BTD.to(self.head.weight.dtype))
        for block in self.coda:
            x_BTD = block(x_BTD, ctx, loop)
        return self.final_norm(x_BTD)

    def _plain_context(self, x_BTD: Tensor) -> Context:
        return Context.build(x_BTD.shape[1], self.cfg.rope_dim, self.cfg.rope_theta, x_BTD.device)

    def resolve_depth(
        self, n_loops: int | Sequence[int] | Tensor | None, batch: int
    ) -> int | list[int]:
        """``n_loops`` as an integer >= 1, or as a list of ``batch`` of them.

        Raises:
            ConfigError: Zero, negative, not an integer, or not one per row.
        """
        if n_loops is None:
            return self.cfg.max_loop_iters
        given: Any = n_loops.tolist() if isinstance(n_loops, Tensor) else n_loops
        if isinstance(given, Sequence) and not isinstance(given, str):
            depths = [whole(depth) or 0 for depth in given]
            if len(depths) == batch and min(depths) >= 1:
                return depths
        elif (depth := whole(given) or 0) >= 1:
            return depth
        raise ConfigError(
            "not a number of loops", where="n_loops", value=n_loops,
            allowed=f"an integer >= 1, {batch} of them (one per row), or None for max_loop_iters",
            fix="pass n_loops=1 for the shallowest model",
        )  # fmt: skip

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
        eos_token_id: int | None = None,
        stop: str | Sequence[str] = (),
        tokenizer: Decoder | None = None,
        on_token: Callable[[int, Tensor], None] | None = None,
        exit_rule: ExitRule | None = None,
        use_cache: bool = True,
        decode: str | StaticDecoder = "eager",
    ) -> Tensor:
        """Continue every row with ``n_loops`` loops per token: (B, T + new), prompt included.

        The arguments are those of :func:`open_mythos.model.generation.generate`; ``n_loops``
        may be one number per row.
        """
        sampling: dict[str, Any] = {
            "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
            "attention_mask": attention_mask, "eos_token_id": eos_token_id, "stop": stop,
            "tokenizer": tokenizer, "on_token": on_token, "use_cache": use_cache,
            "decode": decode,
        }  # fmt: skip
        depth = {"n_loops": n_loops, "exit_rule": exit_rule}
        return generate(
            self, input_ids, max_new_tokens, temperature, top_k, depth=depth, **sampling
        )
