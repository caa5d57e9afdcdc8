"""Backend selection of the kernels, and equality of their reference implementations."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from open_mythos.errors import ConfigError
from open_mythos.ops import backend as choice
from open_mythos.ops.attention import paged
from open_mythos.ops.attention.latent import latent_attend
from open_mythos.ops.attention.paged import kv_paged, latent_paged
from open_mythos.ops.experts.looped_stack import Rows, Use, weight_gradient
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient, kernel_serves
from tests.ops.kernels.cases import error, expert_rows, pages

PACKAGE = Path(choice.__file__).parents[1]


def sum_up(backend: str, dtype: torch.dtype = torch.float32, loops: int = 2) -> object:
    return grouped_weight_gradient(*expert_rows([[2, 1]] * loops, 4, 4, dtype), backend=backend)


def latents(backend: str, dtype: torch.dtype = torch.float32, rank: int = 4) -> object:
    history = pages([5, 2], rank + 2, 4, dtype)
    return latent_paged(torch.randn(2, 3, rank + 2), history, rank, backend)


def keys_and_values(backend: str, dtype: torch.dtype = torch.float32, width: int = 4) -> object:
    history = pages([5, 2], 4 * width, 4, dtype)
    return kv_paged(torch.randn(2, 6, width), history, 2, backend)


def contiguous(backend: str) -> object:
    return latent_attend(torch.randn(2, 1, 3, 6), torch.randn(2, 5, 6), rank=4, backend=backend)


OPS = {
    "weight gradient": (sum_up, "grouped_weight_gradient", "grouped_weight_gradient: reference"),
    "latents": (latents, "paged_decode", "paged attention: masked"),
    "keys and values": (keys_and_values, "paged_decode", "paged attention: masked"),
    "contiguous latents": (contiguous, "paged_decode", "latent attention: batched"),
}
"""By case: the op, the name of its kernel, and what serves a call on a CPU."""
ops = pytest.mark.parametrize(("op", "kernel", "other"), OPS.values(), ids=list(OPS))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Patch the reason why kernels cannot run on this machine; None for no reason."""
    return lambda problem: monkeypatch.setattr(choice, "_hardware_problem", lambda device: problem)


@ops
def test_unknown_backend(op: Callable[..., object], kernel: str, other: str) -> None:
    with pytest.raises(ConfigError, match="triton, reference"):
        op("cutlass")


@ops
def test_without_triton(op: Callable[..., object], kernel: str, other: str, machine) -> None:
    machine("Triton is not installed")
    op("auto")
    with pytest.raises(ConfigError, match="Triton is not installed") as raised:
        op("triton")
    assert kernel in str(raised.value)


@ops
def test_on_a_cpu(
    op: Callable[..., object], kernel: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="otherwise it is Triton that is missing")
    with pytest.raises(ConfigError, match="tensors on cpu"):
        op("triton")
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.logger.name):
        op("auto")
        op("auto")
    assert caplog.messages == [other.replace(":", " backend:")]


@pytest.fixture
def small_case(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Register a small case for the op "op", and clear the cache of checks."""
    choice._small_case_problem.cache_clear()
    yield lambda case: monkeypatch.setitem(choice.CHECKS, "op", case)
    choice._small_case_problem.cache_clear()


def test_only_a_kernel_that_agrees_with_its_reference_is_picked(
    machine, small_case, caplog
) -> None:
    machine(None)
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    one = torch.ones(3)

    def broken(device: torch.device) -> None:
        raise RuntimeError("no such instruction")

    cases = {"off by": lambda _: (one, 1.01 * one), "no such instruction": broken}
    cases |= {"off by nan": lambda _: (one * float("nan"), one)}
    for said, case in cases.items():
        small_case(case)
        choice._small_case_problem.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=choice.logger.name):
            assert not choice.triton_serves("op", "auto", gpu, None)
            assert not choice.triton_serves("op", "auto", gpu, None)
        assert len(caplog.messages) == 1
        assert said in caplog.messages[0]
        assert choice.triton_serves("op", "triton", gpu, None), "by name it is meant"
    small_case(lambda _: (one, one * (1 + 1e-6)))
    choice._small_case_problem.cache_clear()
    assert choice.triton_serves("op", "auto", gpu, None)


def test_on_a_gpu(machine, small_case) -> None:
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    small_case(lambda _: (torch.ones(1), torch.ones(1)))
    machine(None)
    assert choice.triton_serves("op", "auto", gpu, None)
    assert not choice.triton_serves("op", "auto", gpu, "too wide")
    assert not choice.triton_serves("op", "reference", gpu, None)
    machine("compute capability 7.5")
    assert not choice.triton_serves("op", "auto", gpu, None)
    with pytest.raises(ConfigError, match=r"compute capability 7\.5"):
        choice.triton_serves("op", "triton", gpu, None)
    # tensors that are not on it
    assert not kernel_serves(*expert_rows([[1, 1]], 4, 4, torch.float32)[:2])
    assert not paged.kernel_serves(torch.randn(2, 1, 3, 6), torch.randn(2, 5, 6), 4)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: sum_up("triton", torch.float64), "rows of torch.float64"),
        (lambda: sum_up("triton", loops=257), "257 loops"),
        (lambda: latents("triton", torch.float64), "entries of torch.float64"),
        (lambda: latents("triton", rank=513), "values of 513, wider than 512"),
        (lambda: keys_and_values("triton", torch.bfloat16, width=1025), "wider than 1024"),
    ],
)
def test_what_a_kernel_cannot_serve(call: Callable[[], object], problem: str, machine) -> None:
    machine(None)
    with pytest.raises(ConfigError, match=problem):
        call()


def test_a_call_that_needs_a_gradient_takes_no_kernel(machine) -> None:
    machine(None)
    entry_BSW = torch.randn(2, 5, 6).requires_grad_()
    with pytest.raises(ConfigError, match="needs a gradient"):
        latent_attend(torch.randn(2, 1, 3, 6), entry_BSW, rank=4, backend="triton")
    latent_attend(torch.randn(2, 1, 3, 6), entry_BSW, rank=4).sum().backward()
    assert entry_BSW.grad.isfinite().all()


def test_nothing_imports_triton_before_a_kernel_is_used() -> None:
    """Only files of ``ops/kernels`` import Triton, and only functions import those files."""
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "kernels":
            continue
        for node in ast.parse(file.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any("triton" in name or "ops.kernels" in name for name in names), file


def test_weight_gradient_reference_equals_the_looped_stack() -> None:
    xs, grads, ends = expert_rows([[2, 0, 3], [1, 4, 0]], 5, 4, torch.float32)
    uses = [Use(Rows(x), Rows(grad), e) for x, grad, e in zip(xs, grads, ends, strict=True)]
    assert (
        error(grouped_weight_gradient(xs, grads, ends), weight_gradient(uses, torch.float32)) < 1e-6
    )
