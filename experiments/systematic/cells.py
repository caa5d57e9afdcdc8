"""The claim in words, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim
from experiments.tasks import ComposedFacts, PermHop
from open_mythos.config import MythosConfig
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig

TASK = ComposedFacts(PermHop(entities=64, relations=8), lone_share=0.2)
HOPS, LONGER = 2, 3
CHOSEN_LOOPS = 16
SOLVED, DENSE_AT_MOST, AHEAD, LEARNT = 0.80, 0.25, 0.25, 0.90
LOOPED, BETWEEN = "looped", "looped-between-layers"
DENSE = ("dense", "dense-lr1e-3", "dense-equal-depth")
"""The verdict is against the best of them."""

# two dense layers, which two hops need, hold as many parameters as the one that is looped
_DENSE = {"architecture": "dense", "layers": 2, "ffn": 171}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    LOOPED: (3, {}),
    BETWEEN: (3, {"around": 1, "ffn": 256}),
    "dense": (3, _DENSE),
    "dense-lr1e-3": (1, _DENSE | {"lr": 1e-3}),
    "dense-equal-depth": (3, _DENSE | {"layers": 6, "ffn": 512, "lr": 1e-3}),
}
"""Arm -> seeds, and what differs from the looped model."""

CLAIM = Claim(
    id="systematic",
    title="Systematic generalisation",
    statement="A looped transformer composes facts that were never composed in training; a dense "
    "transformer composes only those that were.",
    source="Loop, Think, & Generalize, arXiv 2604.07822; dense: Wang et al., arXiv 2405.15071",
    literature="Dense transformers learn to compose known facts long after they have memorised "
    "them, and fail on facts that were only ever shown alone, because the layers that look up a "
    "second fact never learnt them; layers that share their weights do better. Looped models get "
    "there in three stages: memorising, known facts, lone facts.",
    expected="The three stages in the looped model and the first two in the dense ones. Layers of "
    "their own before the loop should undo the gain: they can keep the first hop to themselves.",
    method="64 entities, 8 relations, each a fixed random permutation: 512 facts. A fifth of "
    "them is lone: shown as `<e> <r>` only. Of the two-hop chains `<e> <r1> <r2>` over all other "
    "facts a tenth is held out. Asked are all held-out chains of known facts, all chains of lone "
    "facts, and those with one lone fact at either end; also three hops, which training never "
    "shows. The looped model is one block of width 128, 4 to 8 loops, tied embeddings, weight "
    f"decay 0.5, and is asked at {CHOSEN_LOOPS} loops, a depth fixed before the runs. Arms of the "
    "same steps, batches and decay: one block each before and after the loop; two dense layers "
    "with as many parameters, at two learning rates (the second one seed); six dense layers as "
    "wide as the looped one.",
    pass_mark=f"At {CHOSEN_LOOPS} loops and two hops, means over the seeds: holds if the looped "
    f"model answers at least {SOLVED:.0%} of the chains of lone facts and every dense arm at most "
    f"{DENSE_AT_MOST:.0%}; in part if it is at least {100 * AHEAD:.0f} points ahead of the best "
    f"dense arm; otherwise it does not hold. Unclear if it answers less than {LEARNT:.0%} of the "
    "held-out chains of known facts: it has then not learnt the task.",
    limits="512 facts and two hops, a few hundred steps. Whether dense models get there after many "
    "times as many steps is not tested; published ones did not.",
    hardware={"cpu": "two cores"},
    minutes={"cpu": 11},
)  # fmt: skip

_RUNS = {
    "cpu": {"dim": 128, "batch": 256, "steps": 800, "every": 40, "followed": 256, "most": 2048},
    QUICK: {"dim": 16, "batch": 16, "steps": 4, "every": 2, "followed": 16, "most": 16},
}


def cells(scale: str) -> list[Cell]:
    """Every arm with its seeds."""
    if scale == QUICK:
        return [_cell(LOOPED, 0, scale), _cell("dense", 0, scale)]
    return [_cell(arm, seed, scale) for arm, (seeds, _) in ARMS.items() for seed in range(seeds)]


def _cell(arm: str, seed: int, scale: str) -> Cell:
    sizes = _RUNS[scale]
    fields: dict[str, Any] = {
        "architecture": "looped",
        "around": 0,
        "layers": None,
        "ffn": 512,
        "lr": 2e-3,
    }
    fields |= ARMS[arm][1]
    run = RunConfig(
        architecture=fields["architecture"],
        model=MythosConfig(
            vocab_size=TASK.graph.vocab_size, dim=sizes["dim"], n_heads=4, n_kv_heads=4,
            attn_type="gqa", max_seq_len=16, max_loop_iters=8, prelude_layers=fields["around"],
            coda_layers=fields["around"], n_experts=0, ffn_dim=fields["ffn"], lora_rank=0,
            rope_theta=10.0, tie_embeddings=True, readout=False,
        ),
        depth=DepthConfig(plan="uniform", low=4, high=8),
        optim=OptimConfig(lr=fields["lr"], beta2=0.98, weight_decay=0.5),
        train=TrainConfig(
            steps=sizes["steps"], warmup_steps=sizes["steps"] // 40, seq_len=HOPS + 1,
            global_batch=sizes["batch"], min_lr_ratio=0.02, log_every=sizes["every"],
            eval_every=sizes["every"], device="cpu",
        ),
    ).to_dict()  # fmt: skip
    del run["train"]["seed"], run["data"]
    ask = {"hops": [HOPS, LONGER], "loops": [2, 4, 8, CHOSEN_LOOPS, 32], "at": 8,
           "followed": sizes["followed"], "most": sizes["most"]}  # fmt: skip
    return Cell(arm, seed, {"run": run, "layers": fields["layers"], "ask": ask})
