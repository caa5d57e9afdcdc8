"""Run one prompt through the loops of a model and record the results as plain data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from open_mythos.checks import check_count
from open_mythos.devices import resolve_device
from open_mythos.dynamics import Trajectory, logit_lens, run_trajectory
from open_mythos.errors import ConfigError
from open_mythos.hub.places import first_id, model_directory, stored_tokenizer
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ExitRule, exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.run_folder import GATE_FILE, find_beside
from open_mythos.tokenizer import Tokenizer

SHOWN = 5
"""Predictions kept per token and loop."""
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_RUN = re.compile(r"([␣⏎⇥])\1{3,}")


class Prediction(NamedTuple):
    """One candidate for the next token."""

    token: int
    text: str
    probability: float


class Goal(NamedTuple):
    """The expected next token."""

    token: int
    hops: int | None = None
    """Reasoning steps, if the task counts them."""


@dataclass(frozen=True)
class TokenTrace:
    """One token through L loops."""

    text: str
    """Text with :func:`visible` white space, as in all texts."""
    predictions: list[list[Prediction]]
    """Per loop, best first."""
    change: list[float]
    """Per loop, ||h_{t+1} - h_t|| / ||h_{t+1}||."""
    path: list[tuple[float, float]]
    """h_0 .. h_L in the plane of the two principal components."""
    experts: list[list[list[int]]]
    """Per loop and MoE layer, the chosen experts, ascending; empty without experts."""
    exit: int | None
    """Loops until the exit rule exits; None without a rule."""
    goal: str | None
    """Expected next token; None if unknown."""
    goal_probability: list[float]
    """Per loop, the probability of the goal; empty without a goal."""
    right: list[bool]
    """Per loop, whether the goal is the top prediction; empty without a goal."""
    hops: int | None
    """Reasoning steps to the goal; None if the task does not count them."""

    @property
    def settled(self) -> int:
        """Loop (from 1) after which the top prediction no longer changes."""
        best = [each[0].token for each in self.predictions]
        return 1 + max((t for t in range(1, len(best)) if best[t] != best[t - 1]), default=0)

    @property
    def right_from(self) -> int | None:
        """Loop from which the goal stays the top prediction; None if it is not at the end."""
        if not self.right or not self.right[-1]:
            return None
        return 1 + max((t + 1 for t, right in enumerate(self.right) if not right), default=0)


@dataclass(frozen=True)
class PromptTrace:
    """A prompt through L loops; ``dataclasses.asdict`` returns JSON-ready values."""

    checkpoint: str
    prompt: str
    model: str
    """One-line description of the model."""
    goal_name: str
    """Description of the goals, such as "the prompt's own next token"."""
    n_loops: int
    trained_loops: int
    """``max_loop_iters`` of the model."""
    exit_rule: str
    """The rule's specification; empty without a rule."""
    explained: tuple[float, float]
    """Explained variance of the two principal components, as shares."""
    n_experts: int
    tokens: list[TokenTrace]


def trace_of(
    checkpoint: str,
    prompt: str,
    *,
    n_loops: int | None = None,
    exit: str = "",
    device: str = "auto",
    goals: Callable[[list[int]], list[Goal | None]] | None = None,
    goal_name: str = "the prompt's own next token",
    model: CausalLM | None = None,
) -> PromptTrace:
    """Follow ``prompt`` through the loops of the model in ``checkpoint``.

    Args:
        checkpoint: Folder of a model, a checkpoint or a run.
        prompt: Text.
        n_loops: Number of loops; by default the model's max_loop_iters.
        exit: Exit rule to mark; by default the gate, if one was trained.
        device: "auto", "cpu" or "cuda".
        goals: Function from the T prompt ids to T expected next tokens; by default the prompt's own
            next tokens.
        goal_name: Description of the goals.
        model: With other weights than those of ``checkpoint``, such as averages.

    Raises:
        ConfigError: The model has no loops, or the exit rule or a number is not valid.
        DataError: There is no model or no tokenizer, or the prompt is not in its vocabulary.
    """
    if model is None:
        model = from_pretrained(checkpoint, resolve_device(device))
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "a dense model has no loops", where="trace", value=checkpoint, allowed="a looped model"
        )
    given = None if n_loops is None else check_count("--n-loops", n_loops)
    if not exit and find_beside(model_directory(checkpoint), GATE_FILE):
        exit = "gate"
    tokenizer = stored_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt) or [first_id(tokenizer, checkpoint)]
    wanted = goals(ids) if goals else [*(Goal(token) for token in ids[1:]), None]
    rule = exit_rule(exit, model) if exit else None
    trained = model.cfg.max_loop_iters
    depth = Depth(given, rule).most(trained)
    if given is None:  # a rule that exits early is marked in the whole
        depth = max(depth, trained)
    tokens, explained = _tokens(model, ids, wanted, depth, rule, tokenizer)
    return PromptTrace(
        checkpoint=checkpoint, prompt=prompt, model=_described(model), goal_name=goal_name,
        n_loops=depth, trained_loops=trained, exit_rule=exit,
        explained=explained, n_experts=model.cfg.n_experts, tokens=tokens,
    )  # fmt: skip


@torch.no_grad()
def _tokens(
    model: OpenMythos, ids: list[int], goals: list[Goal | None], n_loops: int,
    rule: ExitRule | None, tokenizer: Tokenizer,
) -> tuple[list[TokenTrace], tuple[float, float]]:  # fmt: skip
    """Run the prompt at full depth and again with the exit rule; return traces and variances."""
    name = partial(_named, tokenizer)
    ids_BT = torch.tensor([ids], device=model.final_norm.weight.device)
    routing, stopped = LoopTrace(keep_routing=True), LoopTrace()
    path = run_trajectory(model, ids_BT, n_loops, trace=routing)
    if rule is not None:
        model(ids_BT, n_loops=n_loops, exit_rule=rule, trace=stopped)
    goal_T = torch.tensor([goal.token if goal else 0 for goal in goals], device=ids_BT.device)
    best_L, goal_LT = [], []
    # one loop at a time, to avoid a tensor of L T V elements
    for log_p_BTV in logit_lens(model, path):
        p_TV = log_p_BTV[0].exp()
        best = p_TV.topk(min(SHOWN, p_TV.shape[-1]))
        best_L.append((best.indices.tolist(), best.values.tolist()))
        goal_LT.append(p_TV.gather(-1, goal_T.unsqueeze(-1)).squeeze(-1).tolist())
    plane_LT2, explained = _principal_plane(path)
    change_LT = path.change()[:, 0].tolist()
    layers = sorted({layer for layer, _ in routing.experts})
    traces = []
    for i, (token, goal) in enumerate(zip(ids, goals, strict=True)):
        predictions = [
            [Prediction(v, name(v), round(p, 4)) for v, p in zip(found[i], p_T[i], strict=True)]
            for found, p_T in best_L
        ]
        experts = [
            [sorted(routing.experts[layer, t][0, i].tolist()) for layer in layers]
            for t in range(n_loops if layers else 0)
        ]
        traces.append(
            TokenTrace(
                text=name(token), predictions=predictions, experts=experts,
                change=[float(f"{change_T[i]:.4g}") for change_T in change_LT],
                path=[(x, y) for x, y in plane_LT2[:, i].tolist()],
                exit=None if stopped.exits is None else int(stopped.exits[0, i]),
                goal=name(goal.token) if goal else None,
                goal_probability=[round(p_T[i], 4) for p_T in goal_LT] if goal else [],
                right=[best[0].token == goal.token for best in predictions] if goal else [],
                hops=goal.hops if goal else None,
            )
        )  # fmt: skip
    return traces, explained


def _principal_plane(path: Trajectory) -> tuple[Tensor, tuple[float, float]]:
    """Return (L + 1, T, 2) coordinates on the two principal components, and their variances."""
    states_ND = path.states_LBTD[:, 0].flatten(0, 1)
    centered_ND = (states_ND - states_ND.mean(0)).double().cpu()
    _, scale, axes = torch.linalg.svd(centered_ND, full_matrices=False)
    share = scale.square() / scale.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    # fix the sign of each axis: its largest component is positive
    peak = axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True))
    plane_N2 = centered_ND @ (axes[:2] * torch.where(peak < 0, -1.0, 1.0)).mT
    plane_LT2 = plane_N2.view(len(path.states_LBTD), -1, 2)
    return plane_LT2, (float(share[0]), float(share[1]))


def visible(text: str) -> str:
    """Replace white space and control characters by symbols; abbreviate long runs."""
    signs = (_SIGNS.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
    return _RUN.sub(lambda run: f"{run[1]}×{len(run[0])}", "".join(signs))  # noqa: RUF001


def _named(tokenizer: Tokenizer, token: int) -> str:
    """Return the visible text of a token, or its id if it is not text."""
    text = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
    return f"<{token}>" if not text or "�" in text else visible(text)


def _described(model: OpenMythos) -> str:
    cfg, count = model.cfg, sum(p.numel() for p in model.parameters())
    experts = f", {cfg.n_experts} experts top-{cfg.n_experts_per_tok}" if cfg.n_experts else ""
    return f"{count:,} parameters, width {cfg.dim}, {cfg.attn_type.upper()}{experts}"
