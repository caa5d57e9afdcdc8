"""Retrofit: a dense model becomes a looped one, with the same predictions at one loop.

Layers 0 .. P-1 become the prelude, R consecutive ones the loop, the last C the coda. With h_0 = e
the first loop's input is A e + (1 - A) e = e for any decay A, so the looped model starts as the
dense one and training ("healing") only has to teach the block to run again.

| mode | h_0 | input of loop t | at several loops, untrained |
|---|---|---|---|
| "convex" | e | A h_t + (1 - A) e, zero-order hold | pulled back towards e |
| "zero" | 0 | A h_t + e, Euler's rule | farther from the dense model |
| "damped" | e | as "convex"; the state is the mean of all outputs | nearest to the dense model |

Exactly equal in float32 to the same blocks run once where A + (1 - A) rounds to 1 in every product,
as for A = 1/2 and 1/4 ("zero": for any A). Leaving layers out is the choice of McLeish et al.
(arXiv 2511.07384), and gives that up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.checks import check_count, check_number, pick
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.model.mythos import OpenMythos

MODES: dict[str, dict[str, Any]] = {
    "convex": {"initial_state": "prelude", "injection_rule": "zoh"},
    "zero": {"initial_state": "zero", "injection_rule": "euler"},
    "damped": {"initial_state": "prelude", "injection_rule": "zoh", "relaxation": "mean"},
}
"""Mode -> fields of the looped model's configuration."""
DECAY = 0.5
"""Default of the diagonal of A."""


@dataclass(frozen=True)
class Split:
    """Which layers of a dense model go where.

    Attributes:
        n_layers: Layers of the dense model.
        prelude: The first P layers run once.
        loop: R consecutive layers are looped.
        coda: The last C layers run once.
        loop_from: Index of the first looped layer.
    """

    n_layers: int
    prelude: int
    loop: int
    coda: int
    loop_from: int

    @classmethod
    def of(
        cls, n_layers: int, prelude: int, loop: int, coda: int,
        loop_from: int | None = None, drop: bool = False,
    ) -> Split:  # fmt: skip
        """Check a split; by default the loop lies right before the coda.

        Raises:
            ConfigError: The parts overlap, or layers are left out without ``drop``.
        """
        check_count("--prelude", prelude, 0)
        check_count("--loop", loop)
        check_count("--coda", coda, 0)
        last = n_layers - coda - loop
        start = last if loop_from is None else check_count("--loop-from", loop_from, 0)
        if not prelude <= start <= last:
            raise ConfigError(
                "the parts overlap", where="--prelude, --loop, --coda, --loop-from",
                value=f"{prelude}, {loop}, {coda}, {start}",
                allowed=f"a loop between layer {prelude} and layer {n_layers - coda} of {n_layers}",
                fix="choose smaller parts",
            )  # fmt: skip
        split = cls(n_layers, prelude, loop, coda, start)
        if split.dropped and not drop:
            raise ConfigError(
                "the split leaves layers out", where="--prelude, --loop, --coda",
                value=f"{prelude} + {loop} + {coda} of {n_layers} layers, without "
                + ", ".join(map(str, split.dropped)),
                allowed=f"parts that add up to {n_layers}, or --drop",
                fix="with --drop one loop is no longer the dense model, and only healing makes it "
                "useful",
            )  # fmt: skip
        return split

    @property
    def places(self) -> dict[str, int]:
        """Name of a looped model's block -> index of the dense layer it comes from."""
        return (
            {f"prelude.{i}": i for i in range(self.prelude)}
            | {f"recurrent.blocks.{i}": self.loop_from + i for i in range(self.loop)}
            | {f"coda.{i}": self.n_layers - self.coda + i for i in range(self.coda)}
        )

    @property
    def dropped(self) -> list[int]:
        """Indices of the layers that are left out."""
        return sorted(set(range(self.n_layers)) - set(self.places.values()))


def default_split(
    n_layers: int, prelude: int | None, loop: int, coda: int | None,
    loop_from: int | None = None, drop: bool = False,
) -> Split:  # fmt: skip
    """Return :meth:`Split.of`; by default a quarter of the layers precedes the loop.

    Short blocks in the first half tolerate repetition best (docs/retrofit.md).
    """
    if prelude is None:
        room = n_layers - loop - (coda or 0)
        prelude = max(0, min(round(n_layers / 4) if coda is None else room, room))
    if coda is None:
        start = prelude if loop_from is None else loop_from
        coda = max(0, n_layers - start - loop)
    return Split.of(n_layers, prelude, loop, coda, loop_from, drop)


def retrofit(
    dense: DenseTransformer,
    split: Split,
    *,
    mode: str = "convex",
    decay: float = DECAY,
    n_loops: int = 4,
) -> OpenMythos:
    """Return a looped model of the layers of ``dense``, in evaluation mode.

    It shares no memory with ``dense``.

    Args:
        dense: The dense model.
        split: Which layers go where.
        mode: See above.
        decay: Diagonal of A at the start, in (0, 0.99609375].
        n_loops: ``max_loop_iters`` of the looped model: its depth unless a call gives one.

    Raises:
        ConfigError: An argument is out of range.
    """
    fields = pick(MODES, mode, "--mode", what="mode of retrofit")
    check_number("--decay", decay, gt=0, le=0.99609375)
    cfg = looped_config(dense.cfg, split, check_count("--n-loops", n_loops), fields)
    with torch.device("meta"):
        model = OpenMythos(cfg)
    model.load_state_dict(_weights(dense, split, mode, decay), assign=True)
    if cfg.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(next(dense.parameters()).dtype).eval()


@torch.no_grad()
def _weights(dense: DenseTransformer, split: Split, mode: str, decay: float) -> dict[str, Tensor]:
    """Return the weights of the looped model; the halting gate says 1/2 to every state."""
    state, dim = dense.state_dict(), dense.cfg.dim
    found = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for place, index in split.places.items():
        before = f"blocks.{index}."
        for name in (each for each in state if each.startswith(before)):
            found[f"{place}.{name.removeprefix(before)}"] = state[name]
    injection = LTIInjection(dim)
    # A = exp(-dt a); the gain of the input is 1 - A, or dt = 1 by Euler's rule
    a, dt = (-math.log(decay), 1.0) if mode == "zero" else (1.0, -math.log(decay))
    injection.log_A.fill_(math.log(a))
    injection.dt_bias.fill_(math.log(math.expm1(dt)))
    new = {f"injection.{name}": tensor for name, tensor in injection.state_dict().items()}
    new |= {"halting.gate.weight": torch.zeros(1, dim), "halting.gate.bias": torch.zeros(1)}
    copies = {name: tensor.clone() for name, tensor in found.items()}
    return copies | {f"recurrent.{name}": tensor for name, tensor in new.items()}


def looped_config(
    dense: MythosConfig, split: Split, n_loops: int, fields: dict[str, Any]
) -> MythosConfig:
    """Return the configuration of the looped model."""
    own = dense.layer_overrides or {}
    moved = {str(i): own[str(k)] for i, k in enumerate(split.places.values()) if str(k) in own}
    return replace(
        dense, prelude_layers=split.prelude, recurrent_layers=split.loop, coda_layers=split.coda,
        max_loop_iters=n_loops, injection="lti", injection_matrix="full", lora_rank=0,
        prelude_norm=False, readout=False, n_experts=0, dropout=0.0,
        layer_overrides=moved or None, **fields,
    )  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences of the looped model at one loop from the dense model."""

    state: float
    """Of the last state, before the coda, from that of the same blocks run once."""
    logits: float
    """Of the logits from those of the dense model."""
    largest_logit: float


@torch.no_grad()
def compare(dense: DenseTransformer, looped: OpenMythos, split: Split, seed: int = 0) -> Difference:
    """Compare one loop with the dense model on random ids, (2, up to 64) of them, in float32."""
    generator = torch.Generator().manual_seed(seed)
    length = min(64, dense.cfg.max_seq_len)
    ids_BT = torch.randint(dense.cfg.vocab_size, (2, length), generator=generator)
    ctx = looped.context(ids_BT)
    ((_, state_BTD),) = looped.unroll(ids_BT, 1, ctx)
    before_coda = [*split.places.values()][: split.prelude + split.loop]
    x_BTD = _part(dense, before_coda).embed(ids_BT, ctx)
    logits_BTV = dense(ids_BT)
    return Difference(
        _largest(state_BTD - x_BTD), _largest(looped.logits(state_BTD, ctx) - logits_BTV),
        _largest(logits_BTV),
    )  # fmt: skip


def _part(dense: DenseTransformer, layers: Sequence[int]) -> DenseTransformer:
    """Return a model of some layers of ``dense``, which shares its weights."""
    with torch.device("meta"):
        part = DenseTransformer(replace(dense.cfg, layer_overrides=None), len(layers))
    part.embedding = dense.embedding
    part.blocks = nn.ModuleList(dense.blocks[index] for index in layers)
    return part.eval()


def _largest(x: Tensor) -> float:
    return float(x.float().abs().max())
