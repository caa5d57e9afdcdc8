"""Ways to feed the input back into a loop, in one small model with one loop for all of them.

Each rule is a module with ``drive(e)``, computed once, and ``forward(h, drive, t, ctx)``, one loop.
The block is the library's own pre-norm block throughout; only what surrounds it differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.context import Context
from open_mythos.model.init import init_weights
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.trace import LoopTrace


class SandwichBlock(TransformerBlock):
    """The block with every residual sum normalised as well (Huginn, arXiv 2502.05171)."""

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer=layer)
        self.after_attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.after_ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context | None = None,
        loop: int = 0,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        assert ctx is not None
        assert self.attn_norm is not None
        assert self.ffn_norm is not None
        x_BTD = self.after_attn_norm(x_BTD + self.attn(self.attn_norm(x_BTD), ctx, loop))
        assert not isinstance(self.ffn, TransformerBlock)
        return self.after_ffn_norm(x_BTD + self.ffn(self.ffn_norm(x_BTD)))


class Additive(nn.Module):
    """h <- Block(h + e)."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.block = TransformerBlock(cfg, layer=1)

    def drive(self, e_BTD: Tensor) -> Tensor:
        """e."""
        return e_BTD

    def forward(self, h_BTD: Tensor, drive_BTD: Tensor, t: int, ctx: Context) -> Tensor:
        """One loop."""
        return self.block(h_BTD + drive_BTD, ctx, t)

    def spectral_radius(self) -> float:
        """Of the linear part: the block adds its input, so it is the identity."""
        return 1.0


class Concatenated(nn.Module):
    """h <- Block(W [h; e]), as Huginn does (arXiv 2502.05171)."""

    def __init__(self, cfg: MythosConfig, block: type[TransformerBlock] = TransformerBlock) -> None:
        super().__init__()
        self.block = block(cfg, layer=1)
        self.mix = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.mix_input = nn.Linear(cfg.dim, cfg.dim, bias=False)

    def drive(self, e_BTD: Tensor) -> Tensor:
        """The part of W [h; e] that does not change."""
        return self.mix_input(e_BTD)

    def forward(self, h_BTD: Tensor, drive_BTD: Tensor, t: int, ctx: Context) -> Tensor:
        """One loop."""
        return self.block(self.mix(h_BTD) + drive_BTD, ctx, t)

    def spectral_radius(self) -> float:
        """Of the linear part W_h."""
        weight = self.mix.weight.detach()
        if not weight.isfinite().all():
            return float("nan")
        return torch.linalg.eigvals(weight).abs().max().item()


class Sandwich(Concatenated):
    """The same with sandwich norms, which is what Huginn settled on."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(cfg, SandwichBlock)


class Stable(nn.Module):
    """h <- A h + B e + R(A h + B e): this library's own loop."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.recurrent = RecurrentBlock(cfg, first_layer=1)

    def drive(self, e_BTD: Tensor) -> Tensor:
        """B e."""
        return self.recurrent.injection.drive(e_BTD)

    def forward(self, h_BTD: Tensor, drive_BTD: Tensor, t: int, ctx: Context) -> Tensor:
        """One loop."""
        return self.recurrent.step(h_BTD, drive_BTD, t, ctx)

    def spectral_radius(self) -> float:
        """rho(A)."""
        return self.recurrent.injection.spectral_radius().item()


class Predecessor(nn.Module):
    """h <- A h + B e + Block(norm(h + e)); the block adds its own input once more."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.injection = LTIInjection(cfg.dim, cfg.injection_rule, cfg.injection_matrix)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.block = TransformerBlock(cfg, layer=1)

    def drive(self, e_BTD: Tensor) -> Tensor:
        """e: it enters twice."""
        return e_BTD

    def forward(self, h_BTD: Tensor, drive_BTD: Tensor, t: int, ctx: Context) -> Tensor:
        """One loop."""
        inner_BTD = self.block(self.norm(h_BTD + drive_BTD), ctx, t)
        return self.injection(h_BTD, drive_BTD) + inner_BTD

    def spectral_radius(self) -> float:
        """rho(A), which is not all of the linear part here."""
        return self.injection.spectral_radius().item()


Rule = Additive | Concatenated | Stable | Predecessor
RULES: dict[str, Callable[[MythosConfig], Rule]] = {
    "additive": Additive,
    "concat": Concatenated,
    "sandwich": Sandwich,
    "stable": Stable,
    "predecessor": Predecessor,
}


class LoopedLM(CausalLM):
    """Prelude block, one looped block under a rule, coda block.

    Args:
        cfg: One block each; ``prelude_norm`` and ``injection_rule`` are read.
        rule: A key of :data:`RULES`.
    """

    def __init__(self, cfg: MythosConfig, rule: str) -> None:
        super().__init__(cfg)
        outer = SandwichBlock if rule == "sandwich" else TransformerBlock
        self.prelude = outer(cfg, layer=0)
        self.prelude_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.prelude_norm else nn.Identity()
        self.rule = RULES[rule](cfg)
        self.coda = outer(cfg, layer=2)
        init_weights(self, cfg.dim)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        n_loops: int,
        h_BTD: Tensor,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """(B, T) ids and a state h_0 (B, T, D) -> (B, T, D)."""
        ctx = self.context(input_ids)
        drive_BTD = self.rule.drive(self.prelude_norm(self.prelude(self.embedding(input_ids), ctx)))
        for t in range(n_loops):
            before_BTD, h_BTD = h_BTD, self.rule(h_BTD, drive_BTD, t, ctx)
            if trace is not None:
                trace.record_state(t, before_BTD, h_BTD, None)
        return self.final_norm(self.coda(h_BTD, ctx))
