"""The loss by liger-kernel against the reference implementation."""

from __future__ import annotations

import pytest
import torch

from open_mythos.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")


@pytest.mark.parametrize(
    ("half", "needs", "reduction", "ignored"),
    [
        (False, (True, True), "sum", 2), (False, (True, True), "mean", 2),
        (True, (True, True), "sum", 2), (False, (True, False), "sum", 2),
        (False, (False, True), "sum", 2), (False, (True, True), "mean", 10),
        (False, (False, False), "mean", 2),
    ],
)  # fmt: skip
def test_equals_the_reference(
    half: bool, needs: tuple[bool, bool], reduction: str, ignored: int
) -> None:
    """Values and gradients, of a graph that is used twice."""
    inputs = [torch.randn(*shape) for shape in ((2, 5, 6), (37, 6))]
    for each, needed in zip(inputs, needs, strict=True):
        each.requires_grad_(needed)
    targets = torch.randint(37, (2, 5))
    targets.view(-1)[:ignored] = -100
    wanted = [each for each in inputs if each.requires_grad]

    def results(form, **options) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            total = form(*inputs, targets, reduction=reduction, **options)
        assert total.dtype == torch.float32
        grads: list[torch.Tensor] = []
        for _ in range(2 if wanted else 0):
            grads = list(torch.autograd.grad(3 * total, wanted, retain_graph=True))
        return [total.detach(), *grads]

    got = results(linear_cross_entropy, backend="liger", chunk=4)
    expected = results(linear_cross_entropy_reference)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= (2e-2 if half else 1e-5) * theirs.norm() + 1e-7
