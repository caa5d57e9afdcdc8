"""The stable linear system: bounds, discretization, start."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import small_config
from torch import Tensor

from open_mythos import LTIInjection
from open_mythos.model.layers.injection import MAX_DECAY, injection_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("zoh", "euler")
EXTREMES = (0.0, -0.0, 1e-4, 1e4, -1e4, 88.8, -88.8, 3e38, -3e38, math.inf, -math.inf)


def system(log_A: Tensor, dt_bias: Tensor, rule: str = "zoh") -> LTIInjection:
    """A diagonal system with one channel per given parameter."""
    injection = LTIInjection(log_A.numel(), rule, "diagonal")
    injection.log_A = torch.nn.Parameter(log_A)
    injection.dt_bias = torch.nn.Parameter(dt_bias)
    return injection


def draws(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """10,000 pairs over twelve orders of magnitude, and every pair of extremes."""
    generator = torch.Generator().manual_seed(0)
    exponent = torch.rand(2, 10_000, generator=generator) * 12 - 8
    values = 10**exponent * torch.randn(2, 10_000, generator=generator).sign()
    extremes = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES)).T
    log_A, dt_bias = torch.cat((values.clamp(-1e4, 1e4), extremes), 1).to(dtype)
    return log_A, dt_bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_decay_is_inside_the_bounds_for_every_parameter(dtype, rule):
    decay, gain = system(*draws(dtype), rule).coefficients()
    assert decay.dtype == gain.dtype == torch.float32
    assert (decay > 0).all()
    assert (decay <= 0.99609375).all()
    assert gain.isfinite().all()
    assert (gain >= 0).all()
    assert decay.unique().numel() > 1000  # not merely clamped to one end
    for narrow in DTYPES:
        assert (decay.to(narrow) > 0).all()
        assert (decay.to(narrow) < 1).all()


def test_the_bound_is_the_largest_bfloat16_below_one():
    one = torch.ones((), dtype=torch.bfloat16)
    assert torch.nextafter(one, torch.zeros_like(one)).item() == MAX_DECAY == 0.99609375


@pytest.mark.parametrize("rule", RULES)
def test_decay_survives_wild_training(rule):
    """1,000 SGD steps at learning rate 1e3, for 100 seeds side by side."""
    generator = torch.Generator().manual_seed(0)
    seeds, width = 100, 8
    start = LTIInjection(seeds * width, rule, "diagonal")
    noise = torch.randn(2, seeds * width, generator=generator)
    injection = system(start.log_A.data + noise[0], start.dt_bias.data + noise[1], rule)
    optimizer = torch.optim.SGD(injection.parameters(), lr=1e3)
    lowest, highest = 1.0, 0.0
    for _ in range(1000):
        h, e, wanted = torch.randn(3, 1, 1, seeds * width, generator=generator)
        optimizer.zero_grad()
        (injection(h, e) - wanted).square().mean(-1).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in injection.parameters())
        optimizer.step()
        decay = injection.coefficients()[0].detach()
        lowest, highest = min(lowest, decay.min().item()), max(highest, decay.max().item())
    assert 0 < lowest < 1e-3
    assert 0.9 < highest <= 0.99609375


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_bounded_after_1024_loops(dtype):
    """By the geometric series: |h| <= |B e| / (1 - A), whatever the parameters."""
    injection = system(*draws(dtype))
    e = torch.randn(1, 1, injection.log_A.numel(), generator=torch.Generator().manual_seed(1))
    drive = injection.drive(e.to(dtype)).detach()
    h = torch.zeros_like(drive)
    for _ in range(1024):
        h = (injection.hold(h) + drive).detach()
    bound = drive.abs() / (1 - injection.coefficients()[0])
    assert h.isfinite().all()
    assert (h.abs() <= bound * 1.001 + 1e-6).all()


def test_start():
    injection = LTIInjection(6)
    torch.testing.assert_close(injection.get_A(), math.sqrt(1 / 5) * torch.eye(6))
    assert injection.spectral_radius().item() == pytest.approx(0.4472136)
    assert torch.equal(injection.log_A, torch.zeros(6))
    assert torch.equal(injection.B, torch.eye(6))
    assert torch.equal(LTIInjection(6, matrix="diagonal").B, torch.ones(6))


def test_the_matrix_is_that_of_hold():
    injection = system(torch.randn(6), torch.randn(6))
    h = torch.randn(2, 3, 6)
    torch.testing.assert_close(h @ injection.get_A().T, injection.hold(h))
    eigenvalues = torch.linalg.eigvals(injection.get_A().detach())
    torch.testing.assert_close(eigenvalues.abs().max(), injection.spectral_radius().detach())


def ode(log_A: Tensor, dt_bias: Tensor, h: Tensor, drive: Tensor, steps: int = 20_000) -> Tensor:
    """h' = -a h + drive over a time dt, drive held constant, by very many small midpoint steps."""
    a, dt = log_A.double().exp(), torch.nn.functional.softplus(dt_bias.double())
    h, drive, small = h.double(), drive.double(), dt / steps
    for _ in range(steps):
        middle = h + small / 2 * (drive - a * h)
        h = h + small * (drive - a * middle)
    return h.float()


def test_zero_order_hold_is_the_exact_solution():
    log_A, dt_bias = torch.meshgrid(
        torch.linspace(-2, 1, 7), torch.linspace(-2, 1.5, 7), indexing="ij"
    )
    log_A, dt_bias = log_A.flatten(), dt_bias.flatten()
    h, e = torch.randn(2, 1, 1, 49, generator=torch.Generator().manual_seed(2))
    exact = ode(log_A, dt_bias, h, e)
    torch.testing.assert_close(system(log_A, dt_bias)(h, e), exact, rtol=1e-4, atol=1e-5)
    euler = system(log_A, dt_bias, "euler")(h, e)
    assert (euler - exact).abs().max() > 0.1


def test_euler_gain_is_dt():
    log_A, dt_bias = torch.randn(2, 9)
    injection = system(log_A, dt_bias, "euler")
    decay, gain = injection.coefficients()
    dt = torch.nn.functional.softplus(dt_bias)
    torch.testing.assert_close(gain, dt)
    torch.testing.assert_close(decay, torch.exp(-dt * log_A.exp()))


def test_the_gain_belongs_to_the_decay_at_the_bounds_too():
    """The hold of the system that the bound made of it: gain (-log A) = dt (1 - A)."""
    log_A, dt_bias = draws(torch.float32)
    decay, gain = (part.double() for part in system(log_A, dt_bias).coefficients())
    dt = torch.nn.functional.softplus(dt_bias.double().clamp(-60, 1e4))
    torch.testing.assert_close(gain * -decay.log(), dt * (1 - decay), rtol=1e-4, atol=0)
    assert (decay == MAX_DECAY).sum() > 1000


def test_rules_agree_for_small_steps():
    log_A, dt_bias = torch.full((4,), -3.0), torch.linspace(-2.2, -1.5, 4)
    zoh, euler = (system(log_A, dt_bias, rule).coefficients()[1] for rule in RULES)
    torch.testing.assert_close(zoh, euler, rtol=1e-2, atol=0)


def test_full_and_diagonal_matrix():
    h, e = torch.randn(2, 2, 3, 6)
    full, diagonal = LTIInjection(6), LTIInjection(6, matrix="diagonal")
    gains = torch.randn(6)
    full.B.data, diagonal.B.data = torch.diag(gains), gains.clone()
    torch.testing.assert_close(full(h, e), diagonal(h, e))
    full.B.data = torch.randn(6, 6)
    expected = full.coefficients()[1] * torch.einsum("ij,btj->bti", full.B, e)
    torch.testing.assert_close(full.drive(e), expected)


def test_gradients():
    injection = LTIInjection(5, matrix="diagonal").double()
    h, e = torch.randn(2, 1, 2, 5)
    injection(h, e.double()).square().sum().backward()
    for parameter in injection.parameters():
        assert parameter.grad.isfinite().all()
        assert (parameter.grad != 0).all()


def test_a_loop_that_ignores_the_input_is_logged(caplog):
    injection_of(small_config(injection="none", initial_state="prelude"))
    assert not caplog.records
    injection_of(small_config(injection="none"))
    assert "ignores the input tokens" in caplog.text


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_the_decay_is_float32_in_a_half_precision_model(state):
    """A, and the product A h: bfloat16 has 8 bits for them."""
    log_A, dt_bias = torch.full((5,), -3.0), torch.linspace(-1, 1, 5)
    injection = system(log_A, dt_bias).bfloat16()
    h = torch.randn(2, 3, 5).to(state)
    decay = injection.coefficients()[0]
    assert not torch.equal(decay, decay.bfloat16().float())
    for found in (injection.hold(h), injection.hold(h, injection.decay())):
        assert found.dtype == torch.float32
        assert torch.equal(found, decay * h.float())
