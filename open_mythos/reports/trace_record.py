"""Run one prompt through the loops of a model and keep what happens as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_count
from open_mythos.devices import resolve_device
from open_mythos.dynamics import Trajectory, logit_lens, run_trajectory
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import from_pretrained, model_directory, stored_tokenizer
from open_mythos.model.exit_rules import ExitRule, exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.run_folder import GATE_FILE, find_beside
from open_mythos.tokenizer import Tokenizer

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
    """Steps of reasoning that it takes, if the task counts them."""


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
    """What should be predicted; None if unknown."""
    goal_probability: list[float]
    """Per loop, the probability of the goal; empty without one."""
    right: list[bool]
    """Per loop, whether the goal is the most likely; empty without one."""
    hops: int | None
    """Steps of reasoning that the goal takes; None if the task does not count them."""

    @property
    def settled(self) -> int:
        """The first loop after which the most likely token no longer changes, counted from 1."""
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
    goal_name: str
    """What should be predicted after a token, such as "the prompt's own next token"."""
    n_loops: int
    trained_loops: int
    """``max_loop_iters`` of the model."""
    exit_rule: str
    """As it was written; empty without one."""
    explained: tuple[float, float]
    """Shares of the states' variance along the two principal components."""
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
) -> PromptTrace:
    """Follow ``prompt`` through the loops of the model in ``checkpoint``.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run.
        prompt: The text.
        n_loops: Loops; by default the model's max_loop_iters.
        exit: Exit rule whose exits are marked; by default the gate, if one was trained.
        device: "auto", "cpu", "cuda".
        goals: Maps the ids of the prompt to what should be predicted after each; by default the
            prompt's own next token.
        goal_name: What the goals are.

    Raises:
        ConfigError: The model has no loops, or the exit rule or a number is not valid.
        DataError: There is no model or no tokenizer, or the prompt is not in its vocabulary.
    """
    model = from_pretrained(checkpoint, resolve_device(device))
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "a dense model has no loops", where="trace", value=checkpoint, allowed="a looped model"
        )
    depth = model.cfg.max_loop_iters if n_loops is None else check_count("--n-loops", n_loops)
    if not exit and find_beside(model_directory(checkpoint), GATE_FILE):
        exit = "gate"
    tokenizer = stored_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt) or [tokenizer.bos_id]
    wanted = goals(ids) if goals else [*(Goal(token) for token in ids[1:]), None]
    run = _run(model, ids, wanted, depth, exit_rule(exit, model) if exit else None)
    return PromptTrace(
        checkpoint=checkpoint, prompt=prompt, model=_described(model), goal_name=goal_name,
        n_loops=depth, trained_loops=model.cfg.max_loop_iters, exit_rule=exit,
        explained=run.explained, n_experts=model.cfg.n_experts,
        tokens=[
            _token(run, i, goal, lambda token: _named(token, tokenizer))
            for i, goal in enumerate(wanted)
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """What was measured of all T tokens at once, over L loops."""

    ids: list[int]
    top: list[tuple[list[list[float]], list[list[int]]]]
    """Per loop, probabilities and ids of the best predictions of each token."""
    goal_LT: list[list[float]]
    change_LT: list[list[float]]
    plane_LT2: list[list[tuple[float, float]]]
    """h_0 .. h_L, so one entry more than loops."""
    explained: tuple[float, float]
    routing: LoopTrace
    exits: list[int] | None


@torch.no_grad()
def _run(
    model: OpenMythos, ids: list[int], goals: list[Goal | None], n_loops: int, rule: ExitRule | None
) -> _Run:
    """Run the prompt once to its full depth, and once more under the exit rule."""
    device = model.head.weight.device
    ids_BT = torch.tensor([ids], device=device)
    routing = LoopTrace(keep_routing=True)
    path = run_trajectory(model, ids_BT, n_loops, trace=routing)
    goal_T = torch.tensor([0 if goal is None else goal.token for goal in goals], device=device)
    top, goal_LT = [], []
    for log_p_BTV in logit_lens(model, path):
        p_TV = log_p_BTV[0].exp()
        best = p_TV.topk(min(SHOWN, p_TV.shape[-1]), dim=-1)
        top.append((best.values.tolist(), best.indices.tolist()))
        goal_LT.append(p_TV.gather(-1, goal_T.unsqueeze(-1)).squeeze(-1).tolist())
    plane_LT2, explained = _principal_plane(path)
    exits = None
    if rule is not None:
        stopped = LoopTrace()
        model(ids_BT, n_loops=n_loops, exit_rule=rule, trace=stopped)
        assert stopped.exits is not None
        exits = stopped.exits[0].tolist()
    return _Run(
        ids, top, goal_LT, path.change()[:, 0].tolist(), plane_LT2.tolist(), explained, routing,
        exits,
    )  # fmt: skip


def _token(run: _Run, i: int, goal: Goal | None, name: Callable[[int], str]) -> TokenTrace:
    """Pick what belongs to token ``i``."""
    layers = sorted({layer for layer, _ in run.routing.experts})
    experts = run.routing.experts
    return TokenTrace(
        text=name(run.ids[i]),
        predictions=[
            [Prediction(v, name(v), p) for p, v in zip(values[i], tokens[i], strict=True)]
            for values, tokens in run.top
        ],
        change=[row[i] for row in run.change_LT],
        path=[(row[i][0], row[i][1]) for row in run.plane_LT2],
        experts=[
            [sorted(experts[layer, t][0, i].tolist()) for layer in layers]
            for t in range(len(run.top) if layers else 0)
        ],
        exit=None if run.exits is None else run.exits[i],
        goal=None if goal is None else name(goal.token),
        goal_probability=[] if goal is None else [row[i] for row in run.goal_LT],
        right=[] if goal is None else [tokens[i][0] == goal.token for _, tokens in run.top],
        hops=None if goal is None else goal.hops,
    )


def _principal_plane(path: Trajectory) -> tuple[Tensor, tuple[float, float]]:
    """Project all states onto their two principal components.

    Returns:
        The coordinates, of shape (L + 1, T, 2), and the shares of the variance.
    """
    states_ND = path.states_LBTD[:, 0].flatten(0, 1)
    centred_ND = (states_ND - states_ND.mean(0)).double().cpu()
    _, scale, axes = torch.linalg.svd(centred_ND, full_matrices=False)
    share = scale.square() / scale.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    # an axis has no sign of its own: the largest component points up, on every machine
    peak = axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True))
    plane_N2 = centred_ND @ (axes[:2] * torch.where(peak < 0, -1.0, 1.0)).mT
    plane = plane_N2.view(*path.states_LBTD.shape[:1], -1, 2)
    return plane, (float(share[0]), float(share[1]))


def _named(token: int, tokenizer: Tokenizer) -> str:
    """Return the text of one token; its number where it has none of its own."""
    text = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
    return f"<{token}>" if not text or "�" in text else text


def _described(model: OpenMythos) -> str:
    cfg, count = model.cfg, sum(p.numel() for p in model.parameters())
    experts = f", {cfg.n_experts} experts top-{cfg.n_experts_per_tok}" if cfg.n_experts else ""
    return f"{count:,} parameters, width {cfg.dim}, {cfg.attn_type.upper()}{experts}"
