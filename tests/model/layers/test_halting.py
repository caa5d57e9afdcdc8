"""Halting weights against the definition, position by position, and their sums."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from open_mythos import ACTHalting, exit_loops, graves_weights, halting_weights

CASES = 2000
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gate_outputs(n_loops: int, seed: int = 0) -> Tensor:
    """(L, CASES) probabilities: a fifth exactly 0, a fifth exactly 1, the rest of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(n_loops, CASES, generator=generator)
    size = torch.rand(1, CASES, generator=generator)
    some = torch.rand(n_loops, CASES, generator=generator) * size**4
    some = torch.where(kind < 0.2, 0.0, torch.where(kind > 0.8 + 0.2 * size, 1.0, some))
    some[:, :2] = torch.tensor([0.0, 1.0])
    return some


def depths(n_loops: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_loops)
    return torch.randint(1, n_loops + 1, (CASES,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_loops", [1, 2, 3, 8, 16, 33, 64])
class TestSums:
    def test_hazard_weights(self, n_loops, masked, dtype):
        depth = depths(n_loops) if masked else None
        weights = halting_weights(gate_outputs(n_loops).to(dtype), depth)
        self.check(weights, n_loops, depth)

    def test_graves_weights(self, n_loops, masked, dtype):
        depth = depths(n_loops) if masked else None
        weights, ponder = graves_weights(gate_outputs(n_loops).to(dtype), 0.99, depth)
        self.check(weights, n_loops, depth)
        ran = (weights > 0).flip(0).int().argmax(0)
        assert (ponder <= n_loops - ran + 1 + 1e-6).all()

    def check(self, weights: Tensor, n_loops: int, depth: Tensor | None) -> None:
        assert weights.dtype == (torch.float64 if weights.dtype == torch.float64 else torch.float32)
        assert (weights >= 0).all()
        assert (weights.sum(0) - 1).abs().max() <= 1e-6
        if depth is not None:
            late = torch.arange(n_loops).unsqueeze(1) >= depth
            assert (weights[late] == 0).all()


def slow_hazard(lam: list[float]) -> list[float]:
    weights, survive = [], 1.0
    for t, p in enumerate(lam):
        p = 1.0 if t == len(lam) - 1 else p
        weights.append(survive * p)
        survive *= 1 - p
    return weights


def slow_graves(lam: list[float], threshold: float) -> tuple[list[float], float]:
    weights, total = [], 0.0
    for t, p in enumerate(lam):
        if total + p >= threshold or t == len(lam) - 1:
            return [*weights, 1 - total, *[0.0] * (len(lam) - t - 1)], (t + 1) + (1 - total)
        weights.append(p)
        total += p
    raise AssertionError


@pytest.mark.parametrize("n_loops", [1, 2, 7])
def test_against_the_definition(n_loops):
    lam = gate_outputs(n_loops).double()[:, :200]
    hazard = halting_weights(lam)
    graves, ponder = graves_weights(lam, 0.9)
    for i in range(lam.shape[1]):
        column = lam[:, i].tolist()
        assert hazard[:, i].tolist() == pytest.approx(slow_hazard(column), abs=1e-12)
        weights, cost = slow_graves(column, 0.9)
        assert graves[:, i].tolist() == pytest.approx(weights, abs=1e-12)
        assert ponder[i].item() == pytest.approx(cost)


def test_the_two_mixtures_differ():
    """Control: the hazard form is not Graves' sum of probabilities."""
    lam = torch.full((4, 1), 0.3)
    assert not torch.allclose(halting_weights(lam), graves_weights(lam)[0])


def test_nothing_after_a_certain_halt():
    lam = torch.tensor([0.2, 1.0, 0.7, 0.4]).unsqueeze(1)
    assert halting_weights(lam)[:, 0].tolist() == pytest.approx([0.2, 0.8, 0, 0])
    assert graves_weights(lam)[0][:, 0].tolist() == pytest.approx([0.2, 0.8, 0, 0])


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.99, 1.0])
def test_exit_is_the_first_loop_that_reaches_the_threshold(threshold):
    n_loops, depth = 9, depths(9)
    lam = gate_outputs(n_loops).double()
    exits = exit_loops(lam, threshold, depth)
    for i in range(0, CASES, 10):
        total = list(accumulate(slow_hazard(lam[: depth[i], i].tolist())))
        exit_loop = int(exits[i])
        assert total[exit_loop] >= threshold - 1e-12 or exit_loop == depth[i] - 1
        assert exit_loop == 0 or total[exit_loop - 1] < threshold + 1e-12


def test_reaching_the_threshold_exactly_is_reaching_it():
    lam = torch.tensor([0.5, 0.5, 0.5])
    assert exit_loops(lam, 0.5) == 0
    assert exit_loops(lam, 0.75) == 1
    assert graves_weights(lam, 0.5)[0].tolist() == [1, 0, 0]


def test_what_a_position_never_ran_is_not_read():
    """Rows that have left hold nothing, or anything at all."""
    lam = torch.full((4, 2), 0.3)
    lam[2:, 0] = torch.nan
    depth = torch.tensor([2, 4])
    for weights in (halting_weights(lam, depth), graves_weights(lam, 0.99, depth)[0]):
        assert weights[:, 0].tolist() == pytest.approx([0.3, 0.7, 0, 0])
    assert exit_loops(lam, 0.99, depth).tolist() == [1, 3]


def test_exit_never_exceeds_the_depth():
    for n_loops in (1, 5, 64):
        lam = gate_outputs(n_loops)
        assert (exit_loops(lam, 1.0) < n_loops).all()
        assert (exit_loops(lam, 1.0, depths(n_loops)) < depths(n_loops)).all()
        assert (exit_loops(torch.zeros_like(lam), 0.99) == n_loops - 1).all()
        assert (exit_loops(torch.ones_like(lam), 0.99) == 0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
def test_any_number_of_axes(shape):
    lam = torch.rand(shape)
    depth = torch.full(shape[1:], 2)
    assert halting_weights(lam, depth).shape == shape
    assert graves_weights(lam)[1].shape == shape[1:]
    assert exit_loops(lam, 0.9, depth).shape == shape[1:]


def test_a_depth_per_row_of_many_positions():
    """The documented broadcast: one depth for every position of a row."""
    lam = torch.rand(5, 3, 7)
    depth = torch.tensor([[1], [5], [2]])
    weights = halting_weights(lam, depth)
    torch.testing.assert_close(weights[0, 0], torch.ones(7))
    torch.testing.assert_close(weights[:2, 2].sum(0), torch.ones(7))
    assert exit_loops(lam, 1.0, depth).shape == (3, 7)


def test_gradients_reach_every_loop_but_the_last():
    lam = torch.rand(5, 3, requires_grad=True)
    (halting_weights(lam) * torch.randn(5, 3)).sum().backward()
    assert (lam.grad[:-1] != 0).all()
    assert (lam.grad[-1] == 0).all()


class TestGate:
    def test_is_a_float32_sigmoid(self):
        halting, h = ACTHalting(8, 0.7), torch.randn(2, 3, 8)
        expected = (h @ halting.gate.weight.T + halting.gate.bias).sigmoid().squeeze(-1)
        torch.testing.assert_close(halting(h), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(halting(h), expected)
        assert halting.bfloat16()(h.bfloat16()).dtype == torch.float32

    def test_uses_its_threshold(self):
        lam = torch.tensor([0.5, 0.5, 0.5])
        assert ACTHalting(8, 0.7).exit_loops(lam) == 1
        assert ACTHalting(8, 0.8).exit_loops(lam) == 2
        assert ACTHalting(8, 0.8).exit_loops(lam, torch.tensor(2)) == 1
