"""The recurrent block. ``step`` is the only loop body; ``forward`` and ``unroll`` iterate it.

    x       = A h + B e                       linear, rho(A) < 1 by construction
    h_next  = x + R_t(x)                      residual branches: attention, experts, LoRA of loop t

so h_next = A h + B e + Transformer(h, e) with the linear part A h + B e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_mythos.checks import MAX_LOOPS, check_number, checked
from open_mythos.config import MythosConfig
from open_mythos.devices import at_least_float32
from open_mythos.errors import ConfigError
from open_mythos.model.active import Active, RowSchedule, integers
from open_mythos.model.cache import KVCache
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ExitRule, Look
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.float32 import in_float32
from open_mythos.model.layers.halting import ACTHalting
from open_mythos.model.layers.injection import Injection, injection_of
from open_mythos.model.layers.loop_embedding import loop_index_embedding
from open_mythos.model.layers.lora import LoRAAdapter, capped
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.norm import rms_norm
from open_mythos.ops.random import counter_normal

ReadOut = Callable[[Tensor, Context, int], Tensor]
"""``read_out(h, ctx, t)`` returns the logits (R, T, V) of the states after loop t."""
_INITIAL_STATE_SALT = (1 << 32) - 1  # dropout counts up from 0


class RecurrentBlock(nn.Module):
    """``recurrent_layers`` blocks with shared weights, applied once per loop.

    Attributes:
        checkpoint: Activation checkpointing: store only the states between loops and recompute each
            loop in the backward pass.

    Args:
        first_layer: Index of the first block in the model.
        final_norm: Final norm of the model, whose weight ``state_norm`` may share.
    """

    @checked
    def __init__(
        self, cfg: MythosConfig, first_layer: int = 0, final_norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.cfg, self.checkpoint = cfg, False
        # in a tuple it is no submodule: the model stores and shards its weight, once
        self._final_norm = (final_norm or RMSNorm(cfg.dim, cfg.norm_eps),)
        self.injection = injection_of(cfg)
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg, use_moe=cfg.n_experts > 0, layer=first_layer + i)
            for i in range(cfg.recurrent_layers)
        )
        self.lora = (
            LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters) if cfg.lora_rank else None
        )
        self.lora_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.lora_rank else None
        # no call gives it a gradient, which PyTorch's DDP takes for an error: it is trained apart
        self.halting = ACTHalting(cfg.dim, cfg.act_threshold).requires_grad_(False)

    def step(
        self,
        h_BTD: Tensor,
        drive_BTD: Tensor,
        t: int | Tensor,
        ctx: Context,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Run one iteration, h_t -> h_{t+1}.

        Args:
            h_BTD: State h_t, float32 for any model dtype.
            drive_BTD: B e from ``injection(None, e)``, constant over loops.
            t: 0-based loop index; or an int64 tensor, (B,) per row or (1,) for all, so that one
                captured graph serves any loop. Beyond the trained depth, LoRA and loop embedding
                keep their last index.
            ctx: Positions, masks and cache of the call.
            trace: Receives state norms and routing; requires an integer t.
        """
        decay = None if torch.is_grad_enabled() else ctx.memo.get(self.injection)
        x_BTD = self.injection(h_BTD, decay=decay) + drive_BTD
        if self.cfg.loop_embedding:
            x_BTD = loop_index_embedding(
                x_BTD, capped(t, self.cfg.max_loop_iters), self.cfg.dim // 8
            )
        for block in self.blocks:
            x_BTD = block(x_BTD, ctx, t, trace)
        if self.lora is not None and self.lora_norm is not None:
            x_BTD = x_BTD + self.lora(self.lora_norm(x_BTD), t)
        if self.cfg.state_norm == "loop":
            x_BTD = self.normed(x_BTD)
        if self.cfg.relaxation == "mean":
            x_BTD = mean_so_far(h_BTD, x_BTD, t)
        if trace is not None:
            loop = trace.record_state(t, h_BTD, x_BTD, ctx.active)
            if trace.keep_states:
                trace.halting[loop] = self.halting(x_BTD.detach())
        return x_BTD

    def normed(self, h_BTD: Tensor) -> Tensor:
        """Normalize a state as ``state_norm_weight`` says; float32 for any model dtype."""
        if self.cfg.state_norm_weight == "plain":
            h_BTD = at_least_float32(h_BTD)
            return rms_norm(h_BTD, h_BTD.new_ones(self.cfg.dim), self.cfg.norm_eps)
        return in_float32(self._final_norm[0], h_BTD)

    def sharing(self, ctx: Context) -> Context:
        """Return a context for several calls of :meth:`step` with the same weights.

        It holds what they share; with gradient, every loop computes it again.
        """
        if torch.is_grad_enabled() or not isinstance(self.injection, Injection):
            return ctx
        return replace(ctx, memo={**ctx.memo, self.injection: self.injection.decay()})

    def initial_state(self, e_BTD: Tensor, ctx: Context) -> Tensor:
        """Return h_0 in float32: zero, the encoded input, or normal.

        The normal one is a function of sequence key and position, so it does not depend on batch,
        rank or chunking.
        """
        if self.cfg.initial_state == "zero":
            return torch.zeros_like(at_least_float32(e_BTD))
        if self.cfg.initial_state == "prelude":
            return at_least_float32(e_BTD)
        keys_B = ctx.keys_B
        if keys_B is None:
            keys_B = torch.zeros(e_BTD.shape[0], dtype=torch.long, device=e_BTD.device)
        normal = counter_normal(keys_B, ctx.positions, e_BTD.shape[-1], _INITIAL_STATE_SALT)
        normal = normal.to(at_least_float32(e_BTD).dtype)
        return (self.cfg.initial_state_std or (2 / 5) ** 0.5) * normal

    def unroll(
        self,
        e_BTD: Tensor,
        ctx: Context,
        n_loops: int,
        *,
        h_BTD: Tensor | None = None,
        first_loop: int = 0,
        grad_loops: int | None = None,
        trace: LoopTrace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (t, h_{t+1}) after each of ``n_loops`` loops.

        The reference implementation of :meth:`forward` at uniform depth, in the caller's grad mode.

        Args:
            e_BTD: Encoded input, injected at every loop.
            ctx: Positions, masks and cache of the call.
            n_loops: Number of loops.
            h_BTD: Initial state; :meth:`initial_state` by default.
            first_loop: Index t of the first loop.
            grad_loops: Truncated backpropagation: number of final loops that carry gradient; all by
                default.
            trace: Receives diagnostics.
        """
        check_number("n_loops", n_loops, ge=0, le=MAX_LOOPS)
        h_BTD = self.initial_state(e_BTD, ctx) if h_BTD is None else h_BTD
        drive_BTD, ctx = self.injection(None, e_BTD), self.sharing(ctx)
        for t in range(first_loop, first_loop + n_loops):
            if grad_loops is not None and 0 < t - first_loop == n_loops - grad_loops:
                h_BTD = h_BTD.detach()
            h_BTD = self.step(h_BTD, drive_BTD, t, ctx, trace)
            yield t, h_BTD

    def forward(
        self,
        e_BTD: Tensor,
        ctx: Context,
        depth: Depth,
        *,
        h_BTD: Tensor | None = None,
        read_out: ReadOut | None = None,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Run the loop and return the final state (B, T, D), float32.

        Rows that have reached their depth, and positions stopped by the exit rule, are removed from
        the computation. :meth:`unroll` is the reference implementation, with the other arguments.

        Args:
            depth: Loops of each row, exit rule, gradient window.
            read_out: Maps states to logits, for exit rules that use predictions.
        """
        h_BTD = self.initial_state(e_BTD, ctx) if h_BTD is None else h_BTD
        drive_BTD, ctx = self.injection(None, e_BTD), self.sharing(ctx)
        depths = depth.of_rows(len(h_BTD), self.cfg.max_loop_iters)
        if depth.exit_rule is not None:
            return self._until_all_stop(
                h_BTD, drive_BTD, ctx, depths, depth.exit_rule, read_out, trace
            )
        step: Callable[..., Tensor] = self.step
        if self.checkpoint:
            # randomness is a function of sequence keys: there is no RNG state to restore
            step = partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
        rows = RowSchedule(depths, depth.grad_loops, h_BTD.device)
        now, finals, n_loops = ctx, [], max(rows.n_loops, depth.min_loops)
        for t in range(n_loops):
            h_BTD, any_grad = rows.truncate(h_BTD, t, now.active)
            with torch.set_grad_enabled(any_grad):
                h_BTD = step(h_BTD, drive_BTD, t, now, trace)
                if t + 1 in rows.departures:
                    leave, stay, active = rows.departures[t + 1]
                    finals.append(h_BTD if leave is None else h_BTD[leave])
                    if t + 1 < n_loops:
                        h_BTD, drive_BTD, now = h_BTD[stay], drive_BTD[stay], ctx.at(active)
        if n_loops > rows.n_loops:
            finals.append(h_BTD)  # no rows, but their collectives need the backward pass
        return rows.in_order(finals)

    def _until_all_stop(
        self,
        h_BTD: Tensor,
        drive_BTD: Tensor,
        ctx: Context,
        depths: list[int],
        rule: ExitRule,
        read_out: ReadOut | None,
        trace: LoopTrace | None,
    ) -> Tensor:
        """Run the loop with per-position early exit, without gradient.

        The rule sees active positions only, so its decisions do not depend on the batch.
        """
        batch, n_new, _ = h_BTD.shape
        # active positions attend to exited ones, so an uncached call needs a temporary cache
        ctx = now = replace(ctx, cache=ctx.cache or KVCache(n_new, share_loops=True))
        active = Active.everything(batch, n_new, h_BTD.device)
        (limit_B,) = integers([depths], h_BTD.device)
        limit_RW, memory = limit_B.unsqueeze(1).expand(batch, n_new), None
        final_BTD = torch.empty_like(h_BTD)
        exits_BT = torch.zeros(batch, n_new, dtype=torch.long, device=h_BTD.device)
        if trace is not None:
            trace.record_exits(exits_BT)
        for t in range(max(depths)):
            before, h_BTD = h_BTD, self.step(h_BTD, drive_BTD, t, now, trace)
            look = Look(t, before, h_BTD, partial(_predict, read_out, h_BTD, now, t))
            stop_RW, memory = rule(look, memory)
            stop_RW = stop_RW | (limit_RW <= t + 1)
            if (kept := active.narrow(~stop_RW)) is None:
                continue
            exiting = active.where(stop_RW)
            exiting.put(final_BTD, h_BTD)
            exiting.put(exits_BT, t + 1)
            if kept.rows is None or not len(kept.rows):
                break
            h_BTD, drive_BTD, limit_RW = (kept.take(x) for x in (h_BTD, drive_BTD, limit_RW))
            memory = tuple(kept.take(x) for x in memory)
            active = kept.within(active)
            now = ctx.at(active)
        return final_BTD


def mean_so_far(h_BTD: Tensor, y_BTD: Tensor, t: int | Tensor) -> Tensor:
    """Return the mean of the outputs y_0 .. y_t of the loops, of which ``h`` is that of t - 1.

    It is exactly ``y`` in the first loop. Source: W. R. Mann, "Mean value methods in iteration",
    1953.
    """
    h_BTD, y_BTD = at_least_float32(h_BTD), at_least_float32(y_BTD)
    weight = 1 / (t + 1) if isinstance(t, int) else (1 / (t + 1.0)).view(-1, 1, 1).to(h_BTD.dtype)
    return torch.lerp(h_BTD, y_BTD, weight)


def _predict(read_out: ReadOut | None, h_RWD: Tensor, ctx: Context, t: int) -> Tensor:
    if read_out is None or not isinstance(ctx.cache, KVCache):
        raise ConfigError(
            "predictions are not available here", where="exit_rule", value=f"loop {t}",
            allowed="a whole model and a KVCache", fix="use a rule that needs no predictions",
        )  # fmt: skip
    return read_out(h_RWD, replace(ctx, cache=ctx.cache.readout), t)
