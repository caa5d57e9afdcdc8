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
from open_mythos.ops.attention import latent_decode as decoding
from open_mythos.ops.attention.latent import latent_attend
from open_mythos.ops.attention.latent_decode import latent_decode
from open_mythos.ops.experts.looped_stack import Rows, Use, weight_gradient
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient, kernel_serves
from tests.ops.kernels.cases import error, expert_rows, slots

PACKAGE = Path(choice.__file__).parents[1]


def sum_up(backend: str, dtype: torch.dtype = torch.float32, loops: int = 2) -> object:
    return grouped_weight_gradient(*expert_rows([[2, 1]] * loops, 4, 4, dtype), backend=backend)


def decode(backend: str, dtype: torch.dtype = torch.float32, rank: int = 4) -> object:
    entries = slots((1, 2, 5, rank + 2), dtype)
    return latent_decode(entries[0, :, :2], entries, None, None, rank, backend=backend)


OPS = {"grouped_weight_gradient": sum_up, "latent_decode": decode}
ops = pytest.mark.parametrize(("name", "op"), OPS.items(), ids=list(OPS))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Patch the reason why kernels cannot run on this machine; None for no reason."""
    return lambda problem: monkeypatch.setattr(choice, "_hardware_problem", lambda device: problem)


@ops
def test_unknown_backend(name: str, op: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="auto, triton, reference"):
        op("cutlass")


@ops
def test_without_triton(name: str, op: Callable[..., object], machine) -> None:
    machine("Triton is not installed")
    op("auto")
    with pytest.raises(ConfigError, match="Triton is not installed") as raised:
        op("triton")
    assert name in str(raised.value)


@ops
def test_on_a_cpu(name: str, op: Callable[..., object], caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton", reason="otherwise it is Triton that is missing")
    with pytest.raises(ConfigError, match="tensors on cpu"):
        op("triton")
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.logger.name):
        op("auto")
        op("auto")
    assert caplog.messages == [f"{name} backend: reference"]


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
    assert not decoding.kernel_serves(torch.randn(2, 3, 6), slots((1, 2, 5, 6), torch.float32), 4)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: sum_up("triton", torch.float64), "rows of torch.float64"),
        (lambda: sum_up("triton", loops=257), "257 loops"),
        (lambda: decode("triton", torch.float64), "slots of torch.float64"),
        (lambda: decode("triton", rank=513), "latent of 513, wider than 512"),
        (lambda: decode("triton", torch.bfloat16, rank=1025), "wider than 1024"),
    ],
)
def test_what_a_kernel_cannot_serve(call: Callable[[], object], problem: str, machine) -> None:
    machine(None)
    with pytest.raises(ConfigError, match=problem):
        call()


def test_a_decode_that_needs_a_gradient_uses_the_reference(machine) -> None:
    machine(None)
    entries = slots((1, 2, 5, 6), torch.float32).requires_grad_()
    with pytest.raises(ConfigError, match="needs a gradient"):
        latent_decode(torch.randn(2, 3, 6), entries, None, None, 4, backend="triton")
    latent_decode(torch.randn(2, 3, 6), entries, None, torch.tensor([0, 4]), 4).sum().backward()
    assert entries.grad.isfinite().all()
    assert not entries.grad[:, 0].any()  # it sees nothing
    assert not entries.grad[:, 1, 4:].any()


def test_mismatched_shapes_are_rejected() -> None:
    entries, q = slots((2, 3, 5, 6), torch.float32), torch.randn(3, 2, 6)
    three = torch.ones(3, dtype=torch.long)
    for arguments in (
        (q[:2], entries, None, None, 4), (q, entries[0], None, None, 4),
        (q, entries, three[:2], None, 4), (q, entries, None, three[:1], 4),
        (q, entries, None, None, 7), (q, entries, None, None, 0),
        (q[..., :5], entries, None, None, 4),
    ):  # fmt: skip
        with pytest.raises((AssertionError, ValueError)):
            latent_decode(*arguments)


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


def test_decode_reference_equals_latent_attention() -> None:
    q_BHW, entries = torch.randn(3, 2, 6), slots((2, 3, 7, 6), torch.float32)
    for row, (loop, length) in enumerate([(0, 7), (1, 4), (1, 1)]):
        entry_BSW = entries[loop, row : row + 1, :length]
        expected = latent_attend(q_BHW[row, None, None], entry_BSW, rank=4)[0, 0]
        loops, lengths = torch.tensor([0, 1, 1]), torch.tensor([7, 4, 1])
        got = latent_decode(q_BHW, entries, loops, lengths, 4)[row]
        torch.testing.assert_close(got, expected)
