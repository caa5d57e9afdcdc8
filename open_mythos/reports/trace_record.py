"""What a model makes of one prompt, as plain data that JSON can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.dynamics import Trajectory, logit_lens, run_trajectory
from open_mythos.model.exit_rules import ExitRule
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace

SHOWN = 5
"""Predictions kept of every token and loop."""


@dataclass(frozen=True)
class Prediction:
    """One candidate for what comes next."""

    token: int
    """Its id."""
    text: str
    probability: float


@dataclass(frozen=True)
class Goal:
    """What should be predicted after a token."""

    token: int
    """Its id."""
    hops: int | None = None
    """Relations followed up to here; None where the task is not one of chains."""


@dataclass(frozen=True)
class TokenTrace:
    """One token through L loops."""

    text: str
    """The token itself."""
    predictions: list[list[Prediction]]
    """Per loop, best first."""
    change: list[float]
    """Per loop, ||h_{t+1} - h_t|| / ||h_{t+1}||."""
    path: list[tuple[float, float]]
    """h_0 .. h_L in the plane of the two principal components."""
    experts: list[list[list[int]]]
    """Per loop and mixture layer, the experts chosen, ascending; empty where there are none."""
    exit: int | None
    """Loops after which the exit rule stops; None without a rule."""
    goal: str | None
    """What should be predicted; None where nothing is known."""
    goal_probability: list[float]
    """Per loop, the probability of the goal; empty without one."""
    right: list[bool]
    """Per loop, whether the goal is the most likely; empty without one."""
    hops: int | None
    """Relations followed up to here, in a task of chains."""

    @property
    def settled(self) -> int:
        """The loop from which on the most likely token no longer changes, counted from 1."""
        best = [each[0].token for each in self.predictions]
        return 1 + max((t for t in range(1, len(best)) if best[t] != best[t - 1]), default=0)

    @property
    def right_from(self) -> int | None:
        """The loop from which on the goal is the most likely token; None if not to the end."""
        if not self.right or not self.right[-1]:
            return None
        return 1 + max((t + 1 for t, right in enumerate(self.right) if not right), default=0)


@dataclass(frozen=True)
class PromptTrace:
    """A prompt through L loops; ``dataclasses.asdict`` makes it JSON."""

    checkpoint: str
    prompt: str
    model: str
    """What the model is, in a line."""
    task: str
    """"text" or "chains"."""
    n_loops: int
    trained_loops: int
    """``max_loop_iters`` of the model."""
    exit_rule: str
    """As it was written; empty without one."""
    explained: tuple[float, float]
    """Shares of the states' variance along the two principal components."""
    n_experts: int
    tokens: list[TokenTrace]


@torch.no_grad()
def collect(
    model: OpenMythos,
    ids: list[int],
    name: Callable[[int], str],
    goals: list[Goal | None],
    n_loops: int,
    rule: ExitRule | None,
    **about: str,
) -> PromptTrace:
    """Run the prompt once to its full depth, and once more under the exit rule.

    Args:
        model: A looped model.
        ids: The prompt.
        name: The text of a token.
        goals: What should be predicted after each token, where that is known.
        n_loops: Loops.
        rule: Says where each position would stop.
        about: ``checkpoint``, ``prompt``, ``task`` and ``exit_rule`` of the result.
    """
    device = model.head.weight.device
    ids_BT = torch.tensor([ids], device=device)
    routing = LoopTrace(keep_routing=True)
    path = run_trajectory(model, ids_BT, n_loops, trace=routing)
    goal_T = torch.tensor([0 if goal is None else goal.token for goal in goals], device=device)
    best: list[tuple[list[list[float]], list[list[int]]]] = []
    goal_LT: list[list[float]] = []
    for log_p_BTV in logit_lens(model, path):
        p_TV = log_p_BTV[0].exp()
        top = p_TV.topk(min(SHOWN, p_TV.shape[-1]), dim=-1)
        best.append((top.values.tolist(), top.indices.tolist()))
        goal_LT.append(p_TV.gather(-1, goal_T.unsqueeze(-1)).squeeze(-1).tolist())
    plane_LT2, explained = _principal_plane(path)
    change_LT = path.change()[:, 0].tolist()
    exits = _exits(model, ids_BT, n_loops, rule)
    tokens = []
    for i, (token, goal) in enumerate(zip(ids, goals, strict=True)):
        candidates = [(values[i], indices[i]) for values, indices in best]
        tokens.append(
            TokenTrace(
                text=name(token),
                predictions=[
                    [Prediction(v, name(v), p) for p, v in zip(*both, strict=True)]
                    for both in candidates
                ],
                change=[row[i] for row in change_LT],
                path=[(x, y) for x, y in plane_LT2[:, i].tolist()],
                experts=_experts(routing, i, n_loops),
                exit=None if exits is None else exits[i],
                goal=None if goal is None else name(goal.token),
                goal_probability=[] if goal is None else [row[i] for row in goal_LT],
                right=[]
                if goal is None
                else [indices[0] == goal.token for _, indices in candidates],
                hops=None if goal is None else goal.hops,
            )
        )
    return PromptTrace(
        model=_described(model), n_loops=n_loops, trained_loops=model.cfg.max_loop_iters,
        explained=explained, n_experts=model.cfg.n_experts, tokens=tokens, **about,
    )  # fmt: skip


def _principal_plane(path: Trajectory) -> tuple[Tensor, tuple[float, float]]:
    """(L + 1, T, 2) all states seen along their two main directions, and the variance shares."""
    states_ND = path.states_LBTD[:, 0].flatten(0, 1)
    centred_ND = (states_ND - states_ND.mean(0)).double().cpu()
    _, scale, axes = torch.linalg.svd(centred_ND, full_matrices=False)
    share = scale.square() / scale.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    # an axis has no sign of its own: the largest component points up, on every machine
    peak = axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True))
    plane_N2 = centred_ND @ (axes[:2] * torch.where(peak < 0, -1.0, 1.0)).mT
    plane = plane_N2.view(*path.states_LBTD.shape[:1], -1, 2)
    return plane, (float(share[0]), float(share[1]))


def _exits(
    model: OpenMythos, ids_BT: Tensor, n_loops: int, rule: ExitRule | None
) -> list[int] | None:
    if rule is None:
        return None
    stopped = LoopTrace()
    model(ids_BT, n_loops=n_loops, exit_rule=rule, trace=stopped)
    assert stopped.exits is not None
    return stopped.exits[0].tolist()


def _experts(routing: LoopTrace, token: int, n_loops: int) -> list[list[list[int]]]:
    layers = sorted({layer for layer, _ in routing.experts})
    return [
        [sorted(routing.experts[layer, t][0, token].tolist()) for layer in layers]
        for t in range(n_loops if layers else 0)
    ]


def _described(model: OpenMythos) -> str:
    cfg, count = model.cfg, sum(p.numel() for p in model.parameters())
    experts = f", {cfg.n_experts} experts top-{cfg.n_experts_per_tok}" if cfg.n_experts else ""
    return f"{count:,} parameters, width {cfg.dim}, {cfg.attn_type.upper()}{experts}"
