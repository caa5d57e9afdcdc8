"""Thresholds and cells of the claim."""

from __future__ import annotations

from typing import Any

from experiments.c1_depth.chain_recipe import ASKED_HOPS, TRAINED_HOPS, recipe
from experiments.claim import QUICK, Cell, Claim
from experiments.text import VOCABULARY

CHAINS, ACT, TEXT = "chains", "act", "text"
ORDERED = 0.9
LOSE_POINTS = 0.5
LOSE = LOSE_POINTS / 100
CHEAPER = 0.7
REMAINING, MARGINAL, ALL_HOPS = "gate, remaining", "gate, marginal", "gate, all hops"

CLAIM = Claim.read(__file__, vars())

_GATES = {
    REMAINING: {"target": "remaining", "hops": TRAINED_HOPS},
    MARGINAL: {"target": "marginal", "hops": TRAINED_HOPS},
    ALL_HOPS: {"target": "remaining", "hops": ASKED_HOPS},
}
_CHAINS: dict[str, Any] = {
    "hops": ASKED_HOPS, "rows": 256, "drawn": 16384, "loops": 24, "lose": LOSE, "repeats": 3,
    "gates": _GATES, "gate": {"n_loops": 16}, "gate_rows": 256,
    "thresholds": ["gate:0.9", "gate:0.99", "gate:0.999"],
    "rules": {
        "divergence": ["kl:0.01,1", "kl:0.001,0.5", "kl:0.0001,0.5"],
        "state change": ["change:0.1", "change:0.05", "change:0.03"],
        "acceleration": ["acceleration:0.1,2", "acceleration:0.05,2", "acceleration:0.03,2"],
        "stable token": ["stable:3", "stable:5", "stable:7"],
    },
    "delays": [0, 2, 4, 6],
}  # fmt: skip
_ACT: dict[str, Any] = {
    "hops": ASKED_HOPS, "rows": 256, "drawn": 16384, "loops": 24, "allowed": [10, 24],
    "ponder": 0.03, "bias": -2.0,
}  # fmt: skip
TEXT_RUN: dict[str, Any] = {
    "model": {
        "vocab_size": VOCABULARY, "dim": 64, "n_heads": 4, "n_kv_heads": 4, "attn_type": "gqa",
        "max_seq_len": 128, "max_loop_iters": 4, "n_experts": 0, "lora_rank": 0,
        "prelude_layers": 0, "recurrent_layers": 2, "coda_layers": 0, "ffn_dim": 128,
        "tie_embeddings": True,
    },
    "depth": {"plan": "mixed", "mean": 4},
    "optim": {"name": "muon", "lr": 4e-2},
    "train": {
        "steps": 800, "seq_len": 128, "global_batch": 16, "warmup_steps": 80, "device": "cpu",
        "min_lr_ratio": 0.02, "log_every": 20,
    },
}  # fmt: skip
"""The recipe of the claim on text."""
_TEXT: dict[str, Any] = {
    "run": TEXT_RUN, "save_every": 0, "val_windows": 128, "loops": 8,
    "gates": {REMAINING: "remaining", MARGINAL: "marginal"}, "gate": {"n_loops": 8},
    "thresholds": ["gate:0.5", "gate:0.7", "gate:0.9"],
    "rules": {
        "divergence": ["kl:0.1,6", "kl:0.03,6", "kl:0.01,6"],
        "state change": ["change:0.4", "change:0.2", "change:0.1"],
        "acceleration": ["acceleration:0.8,1", "acceleration:0.4,1", "acceleration:0.2,1"],
        "stable token": ["stable:1", "stable:2", "stable:3"],
    },
}  # fmt: skip
SEEDS = (10, 11, 12)
"""Disjoint from the seeds on which the settings above were chosen."""


def cells(scale: str) -> list[Cell]:
    """Return chains for all seeds, and the costlier ACT and text for fewer."""
    if scale == QUICK:
        return [_quick_chains()]
    chains = {"run": recipe().to_dict()}
    kinds = ((CHAINS, 3, _CHAINS | chains), (ACT, 1, _ACT | chains), (TEXT, 3, _TEXT))
    return [Cell(arm, seed, settings) for arm, n, settings in kinds for seed in SEEDS[:n]]


def _quick_chains() -> Cell:
    settings = _CHAINS | {
        "run": recipe(quick=True).to_dict(), "rows": 8, "drawn": 64, "loops": 6, "repeats": 1,
        "gates": {REMAINING: _GATES[REMAINING]}, "gate_rows": 8,
        "gate": {"n_loops": 4, "positions": 64, "steps": 5},
        "thresholds": ["gate:0.9"], "rules": {"state change": ["change:0.1"]}, "delays": [1],
    }  # fmt: skip
    return Cell(CHAINS, 0, settings)
