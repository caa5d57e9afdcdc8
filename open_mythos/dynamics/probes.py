"""Linear probes: what a linear map can decode from the state after each loop.

A probe that scores well may have learned the task itself. Its score on a control task with random
labels measures how much a probe of this size memorizes; the difference is its *selectivity*
(Hewitt and Liang, arXiv 1909.03368).

The probe is a multinomial logistic regression, or one binary logistic regression per label for sets
of labels, with an L2 penalty: a convex problem, solved by L-BFGS from zero, hence deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.checks import check_number, checked
from open_mythos.errors import ConfigError
from open_mythos.seeding import seeded_generator

_ITERATIONS = 100


@dataclass(frozen=True)
class ProbeScore:
    """Scores of a probe on held-out samples."""

    score: float
    """Accuracy; for sets of labels the micro-averaged F1."""
    control: float
    """Score of a probe fitted to control labels, on control labels."""
    baseline: float
    """Score of the best constant answer: the most frequent label; for sets, the k most frequent
    labels with the k that maximizes F1."""
    exact: float
    """Fraction of samples with every label correct; equal to ``score`` for single labels."""
    train_score: float
    """``score`` on the training samples."""

    @property
    def selectivity(self) -> float:
        """``score`` - ``control``."""
        return self.score - self.control


@checked
def probe(
    states_ND: Tensor,
    labels: Tensor,
    *,
    types: Tensor | None = None,
    seed: int = 0,
    test_fraction: float = 0.3,
    penalty: float = 1e-3,
) -> ProbeScore:
    """Fit a linear probe and its control on part of the samples; score both on the rest.

    Args:
        states_ND: One state per sample. Take samples from different sequences, or the split leaks.
        labels: (N,) int64 class indices, or (N, K) boolean, which of K labels apply.
        types: (N,) integers, e.g. the token at each sample. The control then assigns each type the
            label of a random sample, as Hewitt and Liang do, so that it can be memorized by type.
            By default the labels are shuffled across samples.
        seed: Seed of the split and of the control labels.
        test_fraction: Fraction of samples held out.
        penalty: Weight of the mean squared norm of the weights, for standardized states.

    Raises:
        ConfigError: Shapes do not match, or the fraction is not between 0 and 1.
    """
    check_number("penalty", penalty, ge=0)
    _check(states_ND, labels, types, test_fraction)
    states_ND, labels = states_ND.detach().float().cpu(), labels.cpu()
    generator = seeded_generator(seed, "probe")
    order_N = torch.randperm(len(states_ND), generator=generator)
    n_test = max(1, round(test_fraction * len(states_ND)))
    test_N, train_N = order_N[:n_test], order_N[n_test:]
    mean_D, std_D = states_ND[train_N].mean(0), states_ND[train_N].std(0)
    states_ND = (states_ND - mean_D) / torch.where(std_D > 0, std_D, 1.0)
    control = _control_labels(labels, types, generator)
    train_ND, test_ND = states_ND[train_N], states_ND[test_N]
    n_labels = int(labels.max()) + 1 if labels.dim() == 1 else labels.shape[1]
    weights = _fit(train_ND, labels[train_N], n_labels, penalty)
    control_weights = _fit(train_ND, control[train_N], n_labels, penalty)
    right = (predicted := _predict(test_ND, weights, labels)) == labels[test_N]
    return ProbeScore(
        score=_score(predicted, labels[test_N]),
        control=_score(_predict(test_ND, control_weights, labels), control[test_N]),
        baseline=_score(_constant(labels[train_N], n_test), labels[test_N]),
        exact=float((right if labels.dim() == 1 else right.all(-1)).float().mean()),
        train_score=_score(_predict(train_ND, weights, labels), labels[train_N]),
    )


def _check(states_ND: Tensor, labels: Tensor, types: Tensor | None, test_fraction: float) -> None:
    single = labels.dim() == 1 and labels.dtype == torch.int64
    several = labels.dim() == 2 and labels.dtype == torch.bool
    fits = states_ND.dim() == 2 and len(states_ND) == len(labels) >= 4
    fits = fits and (types is None or types.shape == labels.shape[:1])
    if not fits or not (single or several) or (single and int(labels.min()) < 0):
        raise ConfigError(
            "states and labels do not match", where="labels",
            value=f"states {tuple(states_ND.shape)}, labels {labels.dtype} {tuple(labels.shape)}",
            allowed="states (N, D) with int64 labels (N,) >= 0 or boolean labels (N, K), N >= 4",
            fix="pass one label per state",
        )  # fmt: skip
    if not 0 < test_fraction < 1:
        raise ConfigError(
            "not a fraction", where="test_fraction", value=test_fraction, allowed="(0, 1)"
        )


def _control_labels(labels: Tensor, types: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return labels of the same frequencies that are independent of the states."""
    if types is None:
        return labels[torch.randperm(len(labels), generator=generator)]
    names, type_N = types.cpu().unique(return_inverse=True)
    sample = torch.randint(len(labels), (len(names),), generator=generator)
    return labels[sample[type_N]]


def _fit(states_ND: Tensor, labels: Tensor, n_labels: int, penalty: float) -> Tensor:
    """Fit the (D + 1, K) weights, biases in the last row."""
    weights = torch.zeros(states_ND.shape[1] + 1, n_labels, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits_NK = states_ND @ weights[:-1] + weights[-1]
        if labels.dim() == 1:
            loss = F.cross_entropy(logits_NK, labels)
        else:
            loss = F.binary_cross_entropy_with_logits(logits_NK, labels.float())
        loss = loss + penalty * weights[:-1].square().sum(0).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return weights.detach()


def _predict(states_ND: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Return the probe's predictions in the format of ``labels``."""
    logits_NK = states_ND @ weights[:-1] + weights[-1]
    return logits_NK.argmax(-1) if labels.dim() == 1 else logits_NK > 0


def _constant(labels: Tensor, count: int) -> Tensor:
    """Repeat the best constant answer ``count`` times."""
    if labels.dim() == 1:
        return labels.mode().values.expand(count)
    share_K = labels.float().mean(0)
    candidates = [(share_K >= share).expand_as(labels) for share in share_K.unique()]
    best = max(candidates, key=lambda answer: _score(answer, labels))
    return best[0].expand(count, -1)


def _score(predicted: Tensor, labels: Tensor) -> float:
    """Return the accuracy, or micro-F1 = 2 hits / (predicted + true), which is 1 for 0 / 0."""
    if labels.dim() == 1:
        return float((predicted == labels).float().mean())
    marked = float(predicted.sum() + labels.sum())
    return 2 * float((predicted & labels).sum()) / marked if marked else 1.0
