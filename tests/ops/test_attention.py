"""Attention backends against the reference implementation: values and gradients, odd sizes."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from helpers import assert_differs, assert_same
from torch import Tensor

from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.ops import backend as choice
from open_mythos.ops.attention import attend as attention
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.attention.visibility import Visibility

SHAPES = {  # B, T, S, H, G, K, V
    "square": (2, 8, 8, 4, 4, 16, 16),
    "grouped": (2, 7, 7, 6, 2, 8, 8),
    "one key head": (3, 5, 5, 4, 1, 4, 4),
    "narrow values": (2, 9, 9, 3, 3, 12, 5),
    "wide values": (2, 9, 9, 4, 2, 5, 12),
    "one token": (1, 1, 1, 2, 1, 3, 3),
    "decoding": (2, 1, 13, 4, 2, 8, 8),
    "chunk": (2, 5, 13, 4, 2, 8, 6),
}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, t, s, h, g, k, v = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, t, h, k), (b, s, g, k), (b, s, g, v))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def run(name: str, backend: str, **arguments: object) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients."""
    parts = [part.requires_grad_() for part in inputs(name)]
    out = attend(*parts, backend=backend, **arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    return out.detach(), [part.grad for part in parts]


def random_mask(name: str) -> Tensor:
    b, t, s = SHAPES[name][:3]
    mask = torch.rand(b, 1, t, s, generator=torch.Generator().manual_seed(2)) < 0.6
    return mask | (torch.arange(s) == torch.arange(s - t, s)[:, None])


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("visibility", ["causal", "mask", "all"])
def test_equals_the_reference(name, visibility, scale, backend):
    if visibility == "causal" and SHAPES[name][1] != SHAPES[name][2]:
        pytest.skip("causal means as many queries as keys")
    arguments = {"causal": visibility == "causal", "scale": scale}
    arguments["mask"] = random_mask(name) if visibility == "mask" else None
    expected, slow = run(name, "reference", **arguments)
    out, fast = run(name, backend, **arguments)
    assert out.shape == expected.shape
    if expected.numel() > 20:
        assert_same(out, expected)
    for gradient, reference in zip(fast, slow, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_the_reference_is_the_definition():
    q, k, v = inputs("grouped")
    out = attend(q, k, v, causal=True, backend="reference")
    for head in range(6):
        for i in range(7):
            scores = k[0, : i + 1, head // 3] @ q[0, i, head] / 8**0.5
            expected = scores.softmax(0) @ v[0, : i + 1, head // 3]
            torch.testing.assert_close(out[0, i, head], expected)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_mask_causality_and_scale_matter(backend):
    """Control."""
    q, k, v = inputs("square")
    plain = attend(q, k, v, backend=backend)
    assert_differs(attend(q, k, v, causal=True, backend=backend), plain)
    assert_differs(attend(q, k, v, random_mask("square"), backend=backend), plain)
    assert_differs(attend(q, k, v, scale=2.0, backend=backend), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grouped", "narrow values"])
def test_half_precision(name, dtype):
    exact = attend(*inputs(name), causal=True, backend="reference")
    for backend in ("reference", "sdpa"):
        out = attend(*inputs(name, dtype), causal=True, backend=backend)
        assert out.dtype == dtype
        assert (out.float() - exact).abs().max() < 0.05


def test_the_choice_is_logged_once(caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.logger.name):
        for _ in range(3):
            attend(*inputs("square"), causal=True)
    assert [record.getMessage() for record in caplog.records] == ["attention backend: sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["square", "grouped", "narrow values", "decoding", "chunk"])
def test_gpu_equals_cpu(name):
    parts = inputs(name)
    mask = random_mask(name)
    expected = attend(*parts, mask, backend="reference")
    out = attend(*(part.cuda() for part in parts), mask.cuda())
    assert_same(out.cpu(), expected, tolerance=1e-3)


class TestFlash:
    """The wiring of FlashAttention, with a stand-in of the package that a CPU can run.

    The stand-in follows the package's documentation: heads of one width, causal aligned to the
    lower right, sequences of variable length by their borders.
    """

    @pytest.fixture(autouse=True)
    def package(self, monkeypatch):
        self.calls = []

        def one(q, k, v, softmax_scale, causal):
            assert q.shape[-1] == k.shape[-1] == v.shape[-1]
            old = k.shape[1] - q.shape[1]
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(old)
            mask = mask if causal else torch.ones_like(mask)
            return attend(q, k, v, mask, scale=softmax_scale, backend="reference")

        def flash_attn_func(q, k, v, *, softmax_scale, causal):
            self.calls.append("whole")
            return one(q, k, v, softmax_scale, causal)

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
            softmax_scale, causal,
        ):  # fmt: skip
            self.calls.append("packed")
            assert cu_seqlens_q.dtype == torch.int32
            assert int(cu_seqlens_q[-1]) == len(q) == len(k) == len(v)
            assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_k.diff().max())
            spans = cu_seqlens_q.diff().tolist()
            parts = zip(*(x.split(spans) for x in (q, k, v)), strict=True)
            return torch.cat([one(*(x[None] for x in p), softmax_scale, causal)[0] for p in parts])

        module = types.SimpleNamespace(
            flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
        )
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(attention, "_flash_installed", lambda: True)
        monkeypatch.setattr(attention, "_on_cuda", lambda x: True)

    def visible(self, name: str, kind: str) -> Visibility | None:
        b, t, s = SHAPES[name][:3]
        valid = (
            torch.arange(s).expand(b, s) >= torch.arange(b)[:, None] * 2 if "p" in kind else None
        )
        run = (torch.arange(s).expand(b, s) > s // 2).long() if "d" in kind else None
        return Visibility(t, s, torch.device("cpu"), valid, run) if kind else None

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("grouped", "d"), ("grouped", "p"), ("narrow values", "pd"), ("wide values", "d"),
         ("narrow values", ""), ("wide values", ""), ("chunk", "-"), ("decoding", "")],
    )  # fmt: skip
    def test_equals_the_reference(self, name, kind):
        seen = self.visible(name, kind)
        causal = seen is None and SHAPES[name][1] == SHAPES[name][2]
        found, right = [], []
        for results, backend in ((found, "auto"), (right, "reference")):
            parts = [part.requires_grad_() for part in inputs(name, torch.bfloat16)]
            out = attend(*parts, seen, causal=causal, backend=backend)
            real = torch.ones(out.shape[:2], dtype=torch.bool)
            if seen is not None and seen.valid_BS is not None:
                real = seen.valid_BS
            (out[real].float() ** 2).sum().backward()
            results += [out[real], *(part.grad for part in parts)]
        assert self.calls == ["packed" if set(kind) & set("pd") else "whole"]
        for ours, twin in zip(found, right, strict=True):
            assert (ours - twin).float().norm() < 0.02 * twin.float().norm()

    def test_nothing_but_padding(self):
        q, k, v = inputs("square", torch.bfloat16)
        nothing = torch.zeros(2, 8, dtype=torch.bool)
        seen = Visibility(8, 8, torch.device("cpu"), nothing)
        assert not attend(q, k, v, seen).any()

    @pytest.mark.parametrize("case", ["tensor", "float32", "chunk of documents", "single places"])
    def test_what_it_cannot_serve(self, case):
        """By name it is refused; "auto" takes another."""
        dtype = torch.float32 if case == "float32" else torch.bfloat16
        name = "chunk" if case == "chunk of documents" else "square"
        seen: Tensor | Visibility | None = self.visible(name, "d")
        if case == "tensor":
            seen = random_mask(name)
        if case == "single places":
            seen = self.visible(name, "d").at(torch.tensor([[3, 1], [0, 2]]))
        q, k, v = inputs(name, dtype)
        q = q[:, :2] if case == "single places" else q
        with pytest.raises(ConfigError, match="cannot serve"):
            attend(q, k, v, seen, backend="flash")
        right = attend(q, k, v, seen, backend="reference").float()
        assert (attend(q, k, v, seen).float() - right).abs().max() < 0.05
        assert not self.calls

    def test_without_it_nothing_waits_for_a_compiler(self, monkeypatch):
        q, _, _ = inputs("square", torch.bfloat16)
        assert attention._choose(q, self.visible("square", "d")) == "flash"
        monkeypatch.setattr(attention, "_flash_installed", lambda: False)
        for seen in (self.visible("square", "d"), self.visible("chunk", "d"), None):
            assert attention._choose(q.requires_grad_(), seen) == "sdpa"


def test_flash_must_be_installed(monkeypatch):
    monkeypatch.setattr(attention, "_flash_installed", lambda: False)
    with pytest.raises(EnvironmentError_, match="not installed"):
        attend(*inputs("square"), causal=True, backend="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "flash", "flex"])
@pytest.mark.parametrize("kind", ["documents", "left", "chunk"])
def test_gpu_equals_cpu_without_a_mask_of_all_pairs(backend, kind):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    n = 300
    column, run = torch.arange(n).expand(2, n), None
    valid = column >= torch.tensor([[0], [70]]) if kind == "left" else None
    run = (column > 130).long() if kind == "documents" else None
    new = 40 if kind == "chunk" else n

    def move(x: Tensor | None, device: str) -> Tensor | None:
        return None if x is None else x.to(device)

    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)
        shapes = ((2, new, 4, 64), (2, n, 2, 64), (2, n, 2, 64))
        parts = [torch.randn(x, generator=generator).to(device, dtype) for x in shapes]
        parts = [part.requires_grad_() for part in parts]
        seen = Visibility(new, n, torch.device(device), move(valid, device), move(run, device))
        out = attend(*parts, seen, backend="reference" if device == "cpu" else backend)
        real = torch.ones(2, new, dtype=torch.bool) if valid is None else valid
        (out[real.to(device)].float() ** 2).sum().backward()
        results.append([out.cpu()[real], *(part.grad.cpu() for part in parts)])
    for found, right in zip(*reversed(results), strict=True):
        assert (found.float() - right.float()).norm() < 0.02 * right.float().norm()
