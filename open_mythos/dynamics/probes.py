"""Linear probes: what can be read off the state after each loop by a linear map.

A probe that scores well may have learnt the task itself. Its score on a control task, with labels
that mean nothing, says how much a probe of this size can memorise; the difference is its
*selectivity* (Hewitt and Liang, arXiv 1909.03368).

The probe is a multinomial logistic regression, or one logistic regression per label where several
may hold at once, with an L2 penalty: a convex problem, solved by L-BFGS from zero, so the result
does not depend on chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.seeding import seeded_generator

_ITERATIONS = 100


@dataclass(frozen=True)
class ProbeScore:
    """How well a probe does on samples that it was not fitted to."""

    score: float
    """Accuracy; for sets of labels the micro-averaged F1."""
    control: float
    """The same, of a probe fitted to control labels."""
    baseline: float
    """The same, of the best constant answer: the commonest label; for sets, the k commonest labels
    for the k that serves F1 best."""
    exact: float
    """Share of samples whose labels are all right; equal to ``score`` for single labels."""
    train_score: float
    """``score`` on the samples that the probe was fitted to."""

    @property
    def selectivity(self) -> float:
        """``score`` - ``control``."""
        return self.score - self.control


def probe_loops(
    states_LND: Tensor,
    labels: Tensor,
    *,
    types: Tensor | None = None,
    seed: int = 0,
    test_fraction: float = 0.3,
    penalty: float = 1e-3,
) -> list[ProbeScore]:
    """One probe for every loop, all with the same split: arguments as of :func:`probe`."""
    return [
        probe(
            states_ND, labels, types=types, seed=seed, test_fraction=test_fraction, penalty=penalty
        )
        for states_ND in states_LND
    ]


def probe(
    states_ND: Tensor,
    labels: Tensor,
    *,
    types: Tensor | None = None,
    seed: int = 0,
    test_fraction: float = 0.3,
    penalty: float = 1e-3,
) -> ProbeScore:
    """Fit a linear probe and its control to a part of the samples, score both on the rest.

    Args:
        states_ND: A state per sample. Take samples from different sequences, or the split leaks.
        labels: (N,) int64 classes from 0, or (N, K) boolean, which of K labels hold.
        types: (N,) integers, e.g. the token at each sample. The control then gives every type the
            label of a random sample, as Hewitt and Liang do, so that it can be memorised by type.
            By default the labels are shuffled over the samples.
        seed: Of the split and of the control labels.
        test_fraction: Share of samples held out.
        penalty: Weight of the mean squared norm of the weights, for standardised states.

    Raises:
        ConfigError: States, labels and types do not fit together, or a part would be empty.
    """
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
    weights = _fit(train_ND, labels[train_N], _n_labels(labels), penalty)
    said = _answers(test_ND, weights, labels)
    control_weights = _fit(train_ND, control[train_N], _n_labels(labels), penalty)
    return ProbeScore(
        score=_score(said, labels[test_N]),
        control=_score(_answers(test_ND, control_weights, labels), control[test_N]),
        baseline=_score(_constant(labels[train_N], len(test_N)), labels[test_N]),
        exact=_exact(said, labels[test_N]),
        train_score=_score(_answers(train_ND, weights, labels), labels[train_N]),
    )


def _check(states_ND: Tensor, labels: Tensor, types: Tensor | None, test_fraction: float) -> None:
    single = labels.dim() == 1 and labels.dtype == torch.int64
    several = labels.dim() == 2 and labels.dtype == torch.bool
    fits = states_ND.dim() == 2 and len(states_ND) == len(labels) >= 4
    fits = fits and (types is None or types.shape == labels.shape[:1])
    if not fits or not (single or several) or (single and int(labels.min()) < 0):
        raise ConfigError(
            "states and labels do not fit together", where="labels",
            value=f"states {tuple(states_ND.shape)}, labels {labels.dtype} {tuple(labels.shape)}",
            allowed="states (N, D) with int64 labels (N,) >= 0 or boolean labels (N, K), N >= 4",
            fix="give every sample a state and a label",
        )  # fmt: skip
    if not 0 < test_fraction < 1:
        raise ConfigError(
            "not a share", where="test_fraction", value=test_fraction, allowed="(0, 1)"
        )


def _n_labels(labels: Tensor) -> int:
    return int(labels.max()) + 1 if labels.dim() == 1 else labels.shape[1]


def _control_labels(labels: Tensor, types: Tensor | None, generator: torch.Generator) -> Tensor:
    """Labels of the same frequencies that the states cannot explain."""
    if types is None:
        return labels[torch.randperm(len(labels), generator=generator)]
    names, type_N = types.cpu().unique(return_inverse=True)
    sample = torch.randint(len(labels), (len(names),), generator=generator)
    return labels[sample[type_N]]


def _fit(states_ND: Tensor, labels: Tensor, n_labels: int, penalty: float) -> Tensor:
    """(D + 1, K) weights and, in the last row, biases."""
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


def _answers(states_ND: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """What the probe says, in the form of ``labels``."""
    logits_NK = states_ND @ weights[:-1] + weights[-1]
    return logits_NK.argmax(-1) if labels.dim() == 1 else logits_NK > 0


def _constant(labels: Tensor, count: int) -> Tensor:
    """``count`` times the answer that is best without looking."""
    if labels.dim() == 1:
        return labels.mode().values.expand(count)
    share_K = labels.float().mean(0)
    candidates = [(share_K >= share).expand_as(labels) for share in share_K.unique()]
    best = max(candidates, key=lambda answer: _score(answer, labels))
    return best[0].expand(count, -1)


def _score(said: Tensor, labels: Tensor) -> float:
    """Accuracy, or micro-F1 = 2 hits / (said + true); 1 where there is nothing to find or say."""
    if labels.dim() == 1:
        return float((said == labels).float().mean())
    marked = float(said.sum() + labels.sum())
    return 2 * float((said & labels).sum()) / marked if marked else 1.0


def _exact(said: Tensor, labels: Tensor) -> float:
    right = said == labels
    return float((right if labels.dim() == 1 else right.all(-1)).float().mean())
