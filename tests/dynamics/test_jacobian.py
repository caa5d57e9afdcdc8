"""Jacobians against a linear loop, ``torch.autograd.functional`` and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_same, random_ids, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.dynamics import StepJacobian, fixed_point, run_trajectory
from open_mythos.errors import ConfigError

IDS, T = random_ids(1, 4), 4
LOOP = 2


def state(model, loop: int = LOOP) -> torch.Tensor:
    return run_trajectory(model, IDS, max(loop, 1)).states_LBTD[loop]


def exact(model, h_BTD: torch.Tensor, loops: int = 1) -> torch.Tensor:
    """Compute J (n, n) with torch.autograd.functional."""
    e_BTD = model.embed(IDS).detach()

    def run(h: torch.Tensor) -> torch.Tensor:
        for t in range(LOOP, LOOP + loops):
            h = model.step(h, e_BTD, t)
        return h

    size = h_BTD.numel()
    return torch.autograd.functional.jacobian(run, h_BTD).reshape(size, size)


def test_the_spectrum_of_a_linear_loop_is_that_of_A(linear_model):
    decay = linear_model.recurrent.injection.coefficients()[0].detach()
    jacobian = StepJacobian(linear_model, IDS, state(linear_model), LOOP)
    assert_same(jacobian.matrix(), torch.diag(decay.repeat(T)))
    found = jacobian.eigenvalues()
    expected = np.sort(decay.repeat(T).numpy())[::-1]
    assert found.values == pytest.approx(expected, abs=1e-6)
    assert found.radius == pytest.approx(linear_model.recurrent.injection.spectral_radius().item())
    assert jacobian.singular_values().values == pytest.approx(expected, abs=1e-6)
    # matrix-free, each value once: the start vector has one component per eigenspace
    leading = jacobian.eigenvalues(3, max_matvecs=40)
    assert leading.values == pytest.approx(np.sort(decay.numpy())[::-1][:3], abs=1e-4)


def test_equal_to_autograd(model):
    h_BTD = state(model)
    expected = exact(model, h_BTD)
    jacobian = StepJacobian(model, IDS, h_BTD, LOOP)
    assert_same(jacobian.matrix(), expected)
    v, u = torch.randn(2, jacobian.size)
    assert_same(jacobian.apply(v), expected @ v)
    assert_same(jacobian.apply_transposed(u), expected.T @ u)
    shaped = v.view(1, T, -1)
    assert_same(jacobian.apply(shaped).flatten(), expected @ v)
    for token in (0, T - 1):
        rows = slice(token * jacobian.dim, (token + 1) * jacobian.dim)
        assert_same(jacobian.block(token), expected[rows, rows])
    svd = np.linalg.svd(expected.double().numpy(), compute_uv=False)
    assert jacobian.singular_values().values == pytest.approx(svd, abs=1e-4)
    assert jacobian.singular_values(3).values == pytest.approx(svd[:3], rel=1e-3)


def test_eigenvalues_of_the_blocks_are_those_of_the_whole(model):
    """Attention is causal, so J is block triangular."""
    h_BTD = state(model)
    jacobian = StepJacobian(model, IDS, h_BTD, LOOP)
    whole = jacobian.matrix()
    upper = torch.block_diag(*[torch.ones(jacobian.dim, jacobian.dim)] * T).triu() == 0
    assert not whole[upper.triu(1)].any()
    found = jacobian.eigenvalues()
    expected = np.linalg.eigvals(whole.double().numpy())
    assert np.abs(found.values[:10]) == pytest.approx(
        np.sort(np.abs(expected))[::-1][:10], rel=1e-3
    )
    assert jacobian.token_eigenvalues(0).shape == (jacobian.dim,)
    leading = jacobian.eigenvalues(2, max_matvecs=jacobian.size)
    assert leading.radius == pytest.approx(found.radius, rel=1e-2)


def test_several_loops_are_one_map(shared_model):
    model = shared_model("mla")
    h_BTD = state(model)
    assert_same(StepJacobian(model, IDS, h_BTD, LOOP, loops=2).matrix(), exact(model, h_BTD, 2))


def test_it_matches_a_finite_difference(model):
    h_BTD = state(model)
    v = torch.randn(h_BTD.shape)
    e_BTD = model.embed(IDS)
    with torch.no_grad():
        ahead, behind = (model.step(h_BTD + s * 1e-3 * v, e_BTD, LOOP) for s in (1, -1))
    measured = (ahead - behind) / 2e-3
    assert_same(StepJacobian(model, IDS, h_BTD, LOOP).apply(v), measured, 5e-3)


@pytest.mark.parametrize("attn_backend", ["sdpa", "reference"])
@pytest.mark.parametrize("moe_backend", ["grouped", "sorted", "reference"])
def test_every_kernel_can_be_differentiated_twice(attn_backend, moe_backend):
    model = small_model("mla", attn_backend=attn_backend, moe_backend=moe_backend)
    jacobian = StepJacobian(model, IDS, state(model), LOOP)
    v = torch.randn(jacobian.size)
    assert_same(jacobian.apply(v), jacobian.matrix() @ v)


def test_the_rate_of_contraction_is_the_spectral_radius(contracting_model):
    """Near a fixed point, updates shrink by the spectral radius."""
    model = contracting_model("gqa")
    rest = fixed_point(model, IDS, tolerance=1e-6)
    last = model.cfg.max_loop_iters
    jacobian = StepJacobian(model, IDS, rest.state_BTD, last)
    near = rest.state_BTD + 1e-2 * torch.randn(rest.state_BTD.shape)
    fit = run_trajectory(model, IDS, 24, h_BTD=near).contraction(skip=8)
    assert fit.rate.max().item() == pytest.approx(jacobian.eigenvalues().radius, abs=0.05)


def test_the_model_is_not_modified(attn_type):
    model = small_model(attn_type)
    first, *others = (name for name, p in model.named_parameters() if p.requires_grad)
    model.get_parameter(first).requires_grad_(False)
    StepJacobian(model, IDS, state(model), LOOP).matrix()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == others
    assert all(p.grad is None for p in model.parameters())


def test_fused_attention_has_no_double_backward():
    """The reason for the math kernel; drop it if PyTorch ever supports this."""
    model = small_model("gqa", n_experts=0, n_shared_experts=0).requires_grad_(False)
    h_BTD = state(model).requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = model.step(h_BTD, model.embed(IDS), LOOP)
    u = torch.zeros_like(out, requires_grad=True)
    (pulled,) = torch.autograd.grad(out, h_BTD, u, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(pulled, u, torch.ones_like(h_BTD))


def test_invalid_arguments_are_rejected(shared_model):
    model = shared_model("gqa")
    h_BTD = state(model)
    with pytest.raises(ConfigError, match="one sequence"):
        StepJacobian(model, IDS.expand(2, -1), h_BTD.expand(2, -1, -1), LOOP)
    with pytest.raises(ConfigError, match="one sequence"):
        StepJacobian(model, IDS, h_BTD[:, :3], LOOP)
    with pytest.raises(ConfigError, match="float32"):
        StepJacobian(small_model("gqa").bfloat16(), IDS, h_BTD, LOOP)
