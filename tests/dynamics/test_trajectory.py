"""Paths whose figures are known: geometric decays, circles, and a loop that is linear."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, random_ids

from open_mythos import LoopTrace
from open_mythos.dynamics import Trajectory, fixed_point, run_trajectory
from open_mythos.errors import ConfigError

IDS = random_ids(2, 5)


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


def path(states: list[list[float]] | torch.Tensor) -> Trajectory:
    """One token's states (L + 1, D) as a trajectory."""
    return Trajectory(torch.as_tensor(states, dtype=torch.float32)[:, None, None])


def test_states_are_those_of_the_model(model):
    trace = LoopTrace(keep_routing=True)
    found = run_trajectory(model, IDS, 6, trace=trace)
    assert found.states_LBTD.shape == (7, 2, 5, model.cfg.dim)
    assert found.n_loops == 6
    assert not found.states_LBTD[0].any()
    for depth in (1, 6):
        assert_same(model.logits(found.states_LBTD[depth]), model(IDS, n_loops=depth))
    assert len(trace.experts) == 6  # the caller's collector was used


def test_a_path_may_begin_anywhere(model):
    whole = run_trajectory(model, IDS, 9).states_LBTD
    # from the last trained loop on the map is one and the same
    last = model.cfg.max_loop_iters
    twice = run_trajectory(model, IDS, 9, h_BTD=whole[9]).states_LBTD
    assert_same(twice[0], whole[9])
    assert not torch.allclose(twice[1], whole[1])
    rest = model.step(whole[last], model.embed(IDS), last)
    assert_same(rest, whole[last + 1])


def test_figures_of_a_known_path():
    found = path([[3, 4], [3, 0], [0, 0], [0, 2]])
    assert found.change()[0].item() == pytest.approx(4 / 3)
    assert found.change()[2].item() == pytest.approx(1.0)
    # second differences (-3, 4) and (3, 2); the norms of the states after them 0 and 2
    assert found.acceleration()[1].item() == pytest.approx(13**0.5 / 2)
    assert found.turning().flatten().tolist() == pytest.approx([0, 0])
    assert found.distance(torch.tensor([[[0.0, 4.0]]])).flatten().tolist() == pytest.approx(
        [3 / 4, 5 / 4, 1, 1 / 2]
    )


def test_turning_of_a_line_and_of_a_swing():
    assert path([[0, 1], [1, 1], [3, 1]]).turning().item() == pytest.approx(1)
    assert path([[0, 1], [1, 1], [0, 1]]).turning().item() == pytest.approx(-1)


@pytest.mark.parametrize("rate", [0.3, 0.9, 1.05])
def test_rate_of_a_geometric_path(rate):
    powers = torch.tensor([rate**t for t in range(30)], dtype=torch.float64)
    fit = path(torch.stack((powers, 1 - powers), dim=1)).contraction()
    assert fit.rate.item() == pytest.approx(rate, rel=1e-2)
    assert fit.r_squared.item() > 0.99


def test_updates_below_rounding_are_not_fitted():
    """A path at 0.3 per loop is at rest after a dozen loops; what remains is noise."""
    generator = torch.Generator().manual_seed(0)
    states = torch.tensor([[1 + 0.3**t, 2.0] for t in range(40)])
    states[15:, 0] += 1e-7 * torch.randn(25, generator=generator)
    fit = path(states).contraction()
    assert fit.rate.item() == pytest.approx(0.3, rel=0.02)
    assert fit.loops.item() < 15


def test_a_path_at_rest_has_no_rate():
    fit = path([[1.0, 1.0]] * 6).contraction()
    assert fit.rate.isnan().item()
    assert fit.loops.item() == 0


def test_skipping_leaves_out_the_beginning():
    late = [0.5**t for t in range(12)]
    states = torch.tensor([[9.0], [-5.0], [7.0], *[[x] for x in late]])
    assert path(states).contraction(skip=4).rate.item() == pytest.approx(0.5, rel=1e-3)
    assert path(states).contraction().r_squared.item() < 0.99
    with pytest.raises(ConfigError, match="too few updates"):
        path(states).contraction(skip=12)


def test_fixed_point_of_a_linear_loop_is_known(linear_model):
    """h* = (1 - A)^-1 B e, and the slowest channel decides the rate."""
    injection = linear_model.recurrent.injection
    decay, _ = injection.coefficients()
    exact = injection.drive(linear_model.embed(IDS)) / (1 - decay)
    found = fixed_point(linear_model, IDS, tolerance=1e-6)
    assert found.converged(1e-6).all()
    assert_same(found.state_BTD, exact)
    walk = run_trajectory(linear_model, IDS, found.loops)
    distance = walk.distance(exact)
    assert distance[0].flatten().tolist() == pytest.approx([1.0] * 10)
    assert (distance[-1] < 1e-3).all()
    fit = run_trajectory(linear_model, IDS, 120).contraction(skip=60)
    assert fit.rate.flatten().tolist() == pytest.approx([decay.max().item()] * 10, rel=0.01)


def test_fixed_point_of_a_whole_model(contracting_model, attn_type):
    model = contracting_model(attn_type)
    found = fixed_point(model, IDS)
    assert found.converged().all()
    last = model.cfg.max_loop_iters - 1
    again = model.step(found.state_BTD, model.embed(IDS), last)
    assert_same(again, found.state_BTD)
    # wherever one begins
    other = fixed_point(model, IDS, h_BTD=torch.ones(2, 5, model.cfg.dim))
    assert_same(other.state_BTD, found.state_BTD, 1e-3)


def test_a_run_that_was_too_short_says_so(contracting_model):
    found = fixed_point(contracting_model("gqa"), IDS, max_loops=3)
    assert found.loops == 2
    assert not found.converged().any()
    walk = run_trajectory(contracting_model("gqa"), IDS, 3)
    assert_same(found.state_BTD, walk.states_LBTD[2])
    norm = walk.states_LBTD[2].norm(dim=-1)
    assert_same(found.residual_BT, walk.updates()[2].norm(dim=-1) / norm)


@pytest.mark.parametrize("run", [run_trajectory, lambda m, i, n: fixed_point(m, i, max_loops=n)])
def test_depth_is_checked(linear_model, run):
    with pytest.raises(ConfigError, match="loops"):
        run(linear_model, IDS, 0)
