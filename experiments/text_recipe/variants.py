"""Changes of the loop, measured one at a time.

All but the orthogonal injection start as the unchanged model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.devices import as_autocast
from open_mythos.model.context import Context
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.experts import Operands
from open_mythos.model.layers.injection import MAX_DECAY, MIN_EXPONENT, LTIInjection
from open_mythos.model.layers.lora import capped
from open_mythos.model.layers.moe import Routing
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.trace import LoopTrace
from open_mythos.train.build import Model

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class GainsPerLoop(TransformerBlock):
    """A block whose branches have gains of their own in every loop, on input and on output."""

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer=layer)
        # their distance from one, so that weight decay pulls them to one
        self.loop_gains = nn.Parameter(torch.zeros(cfg.max_loop_iters, 4, cfg.dim))

    def compute(
        self, x_BTD: Tensor, ctx: Context, loop: int | Tensor, operands: Operands | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Return the output (B, T, D); there is no routing."""
        gains = 1 + self.loop_gains[capped(loop, len(self.loop_gains))]
        attn_in, attn_out, ffn_in, ffn_out = gains
        y_BTD = self.attn(as_autocast(self.attn_norm(x_BTD) * attn_in), ctx, loop)
        x_BTD = x_BTD + y_BTD * attn_out
        return x_BTD + self.ffn(self.ffn_norm(x_BTD) * ffn_in) * ffn_out, None


class OrthogonalInjection(RecurrentBlock):
    """Injects only the part of B e that is orthogonal to the state of the token.

    After arXiv 2610.06833, whose abstract this follows.
    """

    def step(
        self, h_BTD: Tensor, drive_BTD: Tensor, t: int | Tensor, ctx: Context,
        trace: LoopTrace | None = None,
    ) -> Tensor:  # fmt: skip
        """Run one iteration, h_t -> h_{t+1}."""
        size_BT1 = h_BTD.square().sum(-1, keepdim=True).clamp_min(1e-6)
        along_BT1 = (drive_BTD * h_BTD).sum(-1, keepdim=True) / size_BT1
        return super().step(h_BTD, drive_BTD - along_BT1 * h_BTD, t, ctx, trace)


class Lanes(RecurrentBlock):
    """Hyper-connections (arXiv 2409.19606) around the loop: a state of several lanes.

    The blocks read a learned sum of the lanes; what they add is written to every lane with a
    learned weight, and the lanes are mixed by a learned matrix. At the start all lanes are equal.
    """

    def __init__(self, cfg: MythosConfig, final_norm: nn.Module, lanes: int) -> None:
        super().__init__(cfg, 0, final_norm)
        self.read = nn.Parameter(F.one_hot(torch.tensor(0), lanes).float())
        self.write = nn.Parameter(torch.ones(lanes))
        # its distance from the identity
        self.mix = nn.Parameter(torch.zeros(lanes, lanes))

    def initial_state(self, e_BTD: Tensor, ctx: Context) -> Tensor:
        """Return the lanes of h_0, one after the other."""
        return super().initial_state(e_BTD, ctx).repeat(1, 1, len(self.read))

    def step(
        self, h_BTD: Tensor, drive_BTD: Tensor, t: int | Tensor, ctx: Context,
        trace: LoopTrace | None = None,
    ) -> Tensor:  # fmt: skip
        """Run one iteration; the state is (B, T, lanes D)."""
        h_BTLD = h_BTD.unflatten(-1, (len(self.read), -1))
        x_BTD = torch.einsum("l,btld->btd", self.read, h_BTLD)
        added_BTD = super().step(x_BTD, drive_BTD, t, ctx, trace) - x_BTD
        mixed_BTLD = h_BTLD + torch.einsum("kl,btld->btkd", self.mix, h_BTLD)
        return (mixed_BTLD + self.write[:, None] * added_BTD.unsqueeze(2)).flatten(2)


class OfLanes(nn.Module):
    """Reads a learned sum of the lanes before the read-out."""

    def __init__(self, readout: nn.Module, lanes: int) -> None:
        super().__init__()
        self.readout = readout
        self.of_lanes = nn.Parameter(torch.full((lanes,), 1 / lanes))

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Map (B, T, lanes D) to (B, T, D)."""
        h_BTLD = h_BTD.unflatten(-1, (len(self.of_lanes), -1))
        return self.readout(torch.einsum("l,btld->btd", self.of_lanes, h_BTLD))


class SelectiveInjection(LTIInjection):
    """A decay that depends on the state, as in a selective state-space model (arXiv 2312.00752)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.select = nn.Parameter(torch.zeros(dim, dim))

    def decay(self) -> Tensor | None:  # type: ignore[override]
        """Return None: every state has its own."""
        return None

    def hold(self, h_BTD: Tensor, decay: Tensor | None = None) -> Tensor:
        """Return A(h) h, float32, with A in (0, 0.996)."""
        h_BTD = h_BTD.float()
        chosen_BTD = F.rms_norm(h_BTD, h_BTD.shape[-1:], eps=1e-6) @ self.select.mT
        z_BTD = F.softplus(self.dt_bias + chosen_BTD) * self.log_A.exp()
        return torch.exp(-z_BTD.clamp_min(MIN_EXPONENT)).clamp(max=MAX_DECAY) * h_BTD


def _gains(model: OpenMythos) -> None:
    for i, block in enumerate(model.recurrent.blocks):
        model.recurrent.blocks[i] = _with_weights(GainsPerLoop(model.cfg, i), block)


def _orthogonal(model: OpenMythos) -> None:
    changed = OrthogonalInjection(model.cfg, 0, model.final_norm)
    model.recurrent = _with_weights(changed, model.recurrent)


def _selective(model: OpenMythos) -> None:
    changed = SelectiveInjection(model.cfg.dim)
    model.recurrent.injection = _with_weights(changed, model.recurrent.injection)


def _lanes(lanes: int) -> Callable[[OpenMythos], None]:
    def change(model: OpenMythos) -> None:
        changed = Lanes(model.cfg, model.final_norm, lanes)
        model.recurrent = _with_weights(changed, model.recurrent)
        model.readout = OfLanes(model.readout, lanes)  # type: ignore[assignment]

    return change


VARIANTS: dict[str, Callable[[OpenMythos], None]] = {
    "gains": _gains, "orthogonal": _orthogonal, "selective": _selective,
    "2 lanes": _lanes(2), "4 lanes": _lanes(4),
}  # fmt: skip
"""Name -> change of an untrained model with the whole stack in the loop, in place."""


def changed(name: str) -> Callable[[Model], None]:
    """Return the change called ``name``; "" changes nothing."""

    def change(model: Model) -> None:
        if name:
            assert isinstance(model, OpenMythos)
            VARIANTS[name](model)

    return change


def _with_weights(module: ModuleT, of: nn.Module) -> ModuleT:
    """Give ``module`` the weights of ``of``; what it has beside them keeps its start."""
    module.load_state_dict(module.state_dict() | of.state_dict())
    return module
