"""The loop. ``step`` is one iteration, and the only loop body there is; ``forward`` repeats it.

    x       = A h + B e                       linear, rho(A) < 1 by construction
    h_next  = x + R_t(x)                      residual branches: attention, experts, LoRA of loop t

so h_next = A h + B e + Transformer(h, e) with exactly A h + B e as its linear part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.context import Context
from open_mythos.layers.block import TransformerBlock
from open_mythos.layers.halting import ACTHalting
from open_mythos.layers.injection import LTIInjection
from open_mythos.layers.loop_embedding import loop_index_embedding
from open_mythos.layers.lora import LoRAAdapter
from open_mythos.layers.norm import RMSNorm
from open_mythos.ops.random import counter_normal
from open_mythos.trace import LoopTrace

ExitRule = Callable[[int, Tensor, Tensor], Tensor]
"""``rule(t, h_t, h_next) -> (rows,)`` boolean: which of the rows still running stop after loop t.

The states are (rows, T, D). A row that stops leaves the batch: later loops do not compute it.
"""

_INITIAL_STATE_SALT = (1 << 32) - 1  # dropout counts up from 0


class RecurrentBlock(nn.Module):
    """``recurrent_layers`` blocks with shared weights, applied once per loop.

    Args:
        cfg: The model's configuration.
        first_layer: Number of the first of these blocks in the model.
    """

    def __init__(self, cfg: MythosConfig, first_layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.injection = LTIInjection(cfg.dim, cfg.injection_rule, cfg.injection_matrix)
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg, use_moe=cfg.n_experts > 0, layer=first_layer + i)
            for i in range(cfg.recurrent_layers)
        )
        self.lora = (
            LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters) if cfg.lora_rank else None
        )
        self.lora_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.lora_rank else None
        self.halting = ACTHalting(cfg.dim, cfg.act_threshold)

    def step(
        self, h_BTD: Tensor, drive_BTD: Tensor, t: int, ctx: Context, trace: LoopTrace | None = None
    ) -> Tensor:
        """One iteration, h_t -> h_{t+1}.

        Args:
            h_BTD: State h_t; kept in float32 whatever the model's dtype.
            drive_BTD: B e from ``injection.drive(e)``; it is the same at every loop.
            t: Loop index, from 0; past the trained depth LoRA and embedding keep their last.
            ctx: Positions, masks and cache of the call.
            trace: Receives state norms and routing.
        """
        x_BTD = self.injection.hold(h_BTD) + drive_BTD
        if self.cfg.loop_embedding:
            trained = min(t, self.cfg.max_loop_iters - 1)
            x_BTD = loop_index_embedding(x_BTD, trained, self.cfg.dim // 8)
        for block in self.blocks:
            x_BTD = block(x_BTD, ctx, t, trace)
        if self.lora is not None and self.lora_norm is not None:
            x_BTD = x_BTD + self.lora(self.lora_norm(x_BTD), t)
        if trace is not None:
            trace.record_state(t, h_BTD, x_BTD, ctx.rows)
            if trace.keep_states:
                trace.halting[t] = self.halting(x_BTD.detach())
        return x_BTD

    def initial_state(self, e_BTD: Tensor, ctx: Context) -> Tensor:
        """h_0 in float32: zero, the encoded input, or a truncated normal of variance 2/5.

        The normal one is a function of each sequence's key and each token's position, so it does
        not change with the batch, the rank or the chunking.
        """
        if self.cfg.initial_state == "zero":
            return torch.zeros_like(e_BTD, dtype=torch.float32)
        if self.cfg.initial_state == "prelude":
            return e_BTD.float()
        keys_B = ctx.keys_B
        if keys_B is None:
            keys_B = torch.zeros(e_BTD.shape[0], dtype=torch.long, device=e_BTD.device)
        normal = counter_normal(keys_B, ctx.positions, e_BTD.shape[-1], _INITIAL_STATE_SALT)
        return (2 / 5) ** 0.5 * normal

    def forward(
        self,
        e_BTD: Tensor,
        ctx: Context,
        n_loops: int | Sequence[int],
        *,
        h_BTD: Tensor | None = None,
        grad_loops: int | None = None,
        exit_rule: ExitRule | None = None,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Run the loop and return the final state (B, T, D), float32.

        Rows that have reached their own depth leave the batch; the others go on without them.

        Args:
            e_BTD: Encoded input, injected at every loop.
            ctx: Positions, masks and cache of the call.
            n_loops: Loops for all rows, or one number per row; at least 1.
            h_BTD: Initial state; :meth:`initial_state` by default.
            grad_loops: Truncated back-propagation: only the last ``grad_loops`` loops of each row
                carry gradient. All of them by default.
            exit_rule: Stops rows before their depth is reached.
            trace: Receives diagnostics.
        """
        h_BTD = self.initial_state(e_BTD, ctx) if h_BTD is None else h_BTD
        drive_BTD = self.injection.drive(e_BTD)
        live = _LiveRows(n_loops, e_BTD)
        cache, t = ctx.cache, 0
        while live:
            begins_B, any_grad = live.gradient(t, grad_loops)
            if begins_B is not None:
                h_BTD = torch.where(begins_B.view(-1, 1, 1), h_BTD.detach(), h_BTD)
            with torch.set_grad_enabled(any_grad):
                before, h_BTD = h_BTD, self.step(h_BTD, drive_BTD, t, ctx, trace)
            if exit_rule is not None:
                live.stop(exit_rule(t, before, h_BTD), t + 1)
            t += 1
            stay = live.retire(t, h_BTD)
            if stay is not None:
                h_BTD, drive_BTD, ctx = h_BTD[stay], drive_BTD[stay], ctx.select(stay)
        if cache is not None:
            cache.carry_over(t, e_BTD.shape[1])
        return live.final_states()


class _LiveRows:
    """Which rows are still being computed, and the final states of those that are not."""

    def __init__(self, n_loops: int | Sequence[int], e_BTD: Tensor) -> None:
        self._device = e_BTD.device
        batch = e_BTD.shape[0]
        self._depths = [n_loops] * batch if isinstance(n_loops, int) else list(n_loops)
        self._rows = list(range(batch))
        self._done: list[tuple[list[int], Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def _index(self, positions: list[int]) -> Tensor:
        return torch.tensor(positions, dtype=torch.long, device=self._device)

    def retire(self, t: int, h_BTD: Tensor) -> Tensor | None:
        """Take out the rows that have run their ``t`` loops.

        Returns:
            The index of the rows that stay; None when it selects nothing: all stay, or none does.
        """
        leave = [i for i, depth in enumerate(self._depths) if depth <= t]
        stay = [i for i, depth in enumerate(self._depths) if depth > t]
        if not leave:
            return None
        rows = [self._rows[i] for i in leave]
        self._done.append((rows, h_BTD[self._index(leave)] if stay else h_BTD))
        self._rows = [self._rows[i] for i in stay]
        self._depths = [self._depths[i] for i in stay]
        return self._index(stay) if stay else None

    def gradient(self, t: int, grad_loops: int | None) -> tuple[Tensor | None, bool]:
        """Which rows' gradient begins at loop ``t``, and whether any row has one by then.

        The first is None where nothing has to be cut off.
        """
        if grad_loops is None or not torch.is_grad_enabled():
            return None, torch.is_grad_enabled()
        first = [max(0, depth - grad_loops) for depth in self._depths]
        begins = [t > 0 and t == start for start in first]
        cut = torch.tensor(begins, device=self._device) if any(begins) else None
        return cut, any(t >= start for start in first)

    def stop(self, stops_B: Tensor, t: int) -> None:
        """Let the rows marked in ``stops_B`` end at depth ``t``."""
        self._depths = [
            t if stops else depth
            for depth, stops in zip(self._depths, stops_B.tolist(), strict=True)
        ]

    def final_states(self) -> Tensor:
        """(B, T, D) in the order of the batch."""
        if len(self._done) == 1:
            return self._done[0][1]
        order = [row for rows, _ in self._done for row in rows]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat([state for _, state in self._done])[self._index(inverse)]
