"""Negative control: depth learned end to end by Adaptive Computation Time.

The output is a mixture of the states of all loops, weighted by the gate, and the loss has a ponder
cost per loop (Graves, arXiv 1603.08983). Training optimizes the mixture, not the final state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from experiments.c1_depth.chain_recipe import chains
from open_mythos.data import IGNORE_INDEX, Batch
from open_mythos.evaluation.early_exit import GivenDepths, run_exits
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.layers.halting import graves_weights
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.cross_entropy import linear_cross_entropy
from open_mythos.train import RunConfig, build_model, build_optimizer, learning_rate


def train_act(run: RunConfig, ponder: float, bias: float) -> OpenMythos:
    """Train the model of ``run`` on the mixture over ``max_loop_iters`` loops.

    Args:
        run: Model, data, optimizer and seed; its depth plan is unused.
        ponder: Cost of a loop in nats.
        bias: Initial bias of the gate; a low one starts with all loops.
    """
    model = build_model(run)
    assert isinstance(model, OpenMythos)
    gate = model.recurrent.halting.gate.requires_grad_(True)  # here, the loss trains it
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, bias)
    optimizer = build_optimizer(model, run.optim)
    named = [(f"gate.{name}", parameter) for name, parameter in gate.named_parameters()]
    optimizer.add_param_group({"name": "gate", "params": named, "weight_decay": 0.0})
    loader, depth = chains(run), model.cfg.max_loop_iters
    for step in range(run.train.steps):
        batch = loader.next_batch(step)
        hidden_BTD, cost_BT, _ = mixture(model, batch, depth)
        loss = linear_cross_entropy(hidden_BTD, model.head.weight, batch.targets)
        (loss + ponder * cost_BT.mean()).backward()
        clip_grad_norm_(model.parameters(), run.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.train, run.optim)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def mixture(model: OpenMythos, batch: Batch, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the final hidden state (B, T, D) of the mixture, ponder cost and loops (B, T)."""
    ctx = model.context(batch.input_ids)
    states_LBTD = torch.stack([h_BTD for _, h_BTD in model.unroll(batch.input_ids, depth, ctx)])
    halting = model.recurrent.halting
    lambda_LBT = halting(states_LBTD)
    weights_LBT, cost_BT = graves_weights(lambda_LBT, halting.threshold)
    mixed_BTD = (weights_LBT.unsqueeze(-1) * states_LBTD).sum(0)
    loops_BT = (weights_LBT > 0).sum(0)
    return model.final_hidden(mixed_BTD, ctx), cost_BT, loops_BT


def measure_act(model: OpenMythos, test: Batch, depths: list[int]) -> list[dict[str, Any]]:
    """Measure accuracy and loops (B, T) of the mixture for each maximum number of loops.

    "accuracy" is that of the mixture without early exit, as in training; "left" that of exiting
    each position after the loops it used.
    """
    found = []
    asked_BT = test.targets != IGNORE_INDEX
    with frozen(model, torch.float32):
        for depth in depths:
            hidden_BTD, _, loops_BT = mixture(model, test, depth)
            predicted_BT = model.head(hidden_BTD).argmax(-1)
            left = run_exits(model, [test], depth, [GivenDepths(loops_BT)])
            found.append(
                {
                    "allowed": depth,
                    "accuracy": float((predicted_BT == test.targets)[asked_BT].float().mean()),
                    "left": float(left.right_N.float().mean()),
                    "loops": float(loops_BT.float().mean()),
                    "exits": loops_BT,
                }
            )
    return found
