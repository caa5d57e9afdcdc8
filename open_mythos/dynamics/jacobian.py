"""Jacobian of a loop, d h_{t+1} / d h_t: whether nearby states converge or diverge.

The state of one sequence has n = T D entries, so J is an (n, n) matrix. Attention is causal: a
token's state depends on its own and earlier tokens only. J is therefore block lower triangular over
tokens, and its eigenvalues are those of the T diagonal blocks (D, D).

Expert selection is piecewise constant, so J is the Jacobian with the selected experts fixed, their
weights included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.checks import check_count, checked
from open_mythos.dynamics.krylov import Spectrum, leading_eigenvalues, leading_singular_values
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos

_ROWS = 32  # cotangents sent through one forward and backward pass


class StepJacobian:
    """J of ``loops`` consecutive loops at one state of one sequence.

    With ``loops=p`` at a state of a cycle of period p, the eigenvalues say whether the cycle
    attracts (all inside the unit circle), as those of one loop do at a fixed point.

    J^T u is computed in reverse mode. J v differentiates J^T u, which is linear in u, with respect
    to u: unlike forward mode, this works through every attention and expert kernel with a backward
    pass. Attention runs on PyTorch's "math" kernel, as fused kernels have no double backward.

    Args:
        model: A float32 model; it is not modified.
        input_ids: (1, T) token ids.
        h_BTD: (1, T, D) state h_t.
        t: Index of the first loop.
        loops: Number of loops in the map.

    Raises:
        ConfigError: More than one sequence, a mismatched state, or weights that are not float32,
            whose rounding error would exceed small eigenvalues.
    """

    @checked
    def __init__(
        self, model: OpenMythos, input_ids: Tensor, h_BTD: Tensor, t: int, loops: int = 1
    ) -> None:
        expected = (1, input_ids.shape[-1], model.cfg.dim)
        if tuple(h_BTD.shape) != expected or input_ids.shape[0] != 1:
            raise ConfigError(
                "not the state of one sequence", where="h_BTD",
                value=f"{tuple(h_BTD.shape)} for ids {tuple(input_ids.shape)}",
                allowed=f"{expected}", fix="take one row: ids[:1], states[t, :1]",
            )  # fmt: skip
        if model.final_norm.weight.dtype != torch.float32:
            raise ConfigError(
                "a Jacobian needs float32", where="model", value=model.final_norm.weight.dtype,
                allowed="float32 weights", fix="load the model with dtype=torch.float32",
            )  # fmt: skip
        self._t, self._loops = check_count("t", t, least=0), check_count("loops", loops)
        self._model, self._ids = model, input_ids.to(model.final_norm.weight.device)
        self._h_BTD = h_BTD.detach().to(self._ids.device, torch.float32)
        self.tokens, self.dim = expected[1], expected[2]
        self.size = self.tokens * self.dim
        self._ctx = model.context(self._ids)
        with frozen(model, torch.float32):
            self._e_BTD = model.embed(self._ids, self._ctx)
        with self._differentiable():
            self._input = self._h_BTD.clone().requires_grad_()
            self._output = self._map(self._input)
            self._cotangent = torch.zeros_like(self._output, requires_grad=True)
            (self._pullback,) = torch.autograd.grad(
                self._output, self._input, self._cotangent, create_graph=True
            )

    def apply(self, v: Tensor) -> Tensor:
        """Return J v in the shape of ``v``: (n,) or (1, T, D)."""
        return self._product(self._pullback, self._cotangent, v)

    def apply_transposed(self, u: Tensor) -> Tensor:
        """Return J^T u in the shape of ``u``: (n,) or (1, T, D)."""
        return self._product(self._output, self._input, u)

    def matrix(self) -> Tensor:
        """Compute J (n, n): n^2 x 4 bytes and n / 32 passes."""
        unit = torch.eye(self.size, device=self._h_BTD.device)
        return torch.cat([self._pull(rows).flatten(1) for rows in unit.split(_ROWS)])

    def block(self, token: int) -> Tensor:
        """Compute the diagonal block (D, D) of a token, d h_{t+1}[token] / d h_t[token]."""
        unit = torch.zeros(self.dim, self.tokens, self.dim, device=self._h_BTD.device)
        unit[:, token] = torch.eye(self.dim, device=unit.device)
        pulled = [self._pull(rows.flatten(1))[:, token] for rows in unit.split(_ROWS)]
        return torch.cat(pulled)

    def token_eigenvalues(self, token: int) -> np.ndarray:
        """Compute the (D,) eigenvalues of a token's block, complex128, largest first."""
        return _sorted(np.linalg.eigvals(self.block(token).double().cpu().numpy()))

    def eigenvalues(
        self, count: int | None = None, *, max_matvecs: int = 200, tolerance: float = 1e-4
    ) -> Spectrum:
        """Compute all n eigenvalues exactly, or the ``count`` largest matrix-free.

        By default every diagonal block is decomposed: n / 32 passes and T problems of order D.
        ``count``, ``max_matvecs`` and ``tolerance`` are those of :func:`leading_eigenvalues`; J is
        not normal, so check the residuals.
        """
        if count is None:
            values = np.concatenate([self.token_eigenvalues(i) for i in range(self.tokens)])
            return Spectrum(_sorted(values), np.zeros(self.size), 0)
        return leading_eigenvalues(
            self.apply, self.size, count, max_matvecs=max_matvecs, tolerance=tolerance,
            device=self._h_BTD.device,
        )  # fmt: skip

    def singular_values(
        self, count: int | None = None, *, max_matvecs: int = 200, tolerance: float = 1e-4
    ) -> Spectrum:
        """Compute all n singular values, or the ``count`` largest matrix-free.

        The largest is the maximum factor by which the map stretches a small perturbation. See
        :func:`leading_singular_values` for the arguments.
        """
        if count is None:
            values = np.linalg.svd(self.matrix().double().cpu().numpy(), compute_uv=False)
            return Spectrum(values, np.zeros(self.size), 0)
        return leading_singular_values(
            self.apply, self.apply_transposed, self.size, count,
            max_matvecs=max_matvecs, tolerance=tolerance, device=self._h_BTD.device,
        )  # fmt: skip

    def _product(self, output_BTD: Tensor, input_BTD: Tensor, x: Tensor) -> Tensor:
        x_BTD = x.reshape(output_BTD.shape)
        (out,) = torch.autograd.grad(output_BTD, input_BTD, x_BTD, retain_graph=True)
        return out.reshape(x.shape)

    def _map(self, h_BTD: Tensor) -> Tensor:
        """Run ``loops`` loops from ``h_BTD``, whose rows are copies of the sequence."""
        loops = self._model.recurrent.unroll(
            self._e_BTD, self._ctx, self._loops, h_BTD=h_BTD, first_loop=self._t
        )
        *_, (_, h_BTD) = loops
        return h_BTD

    def _pull(self, cotangents: Tensor) -> Tensor:
        """Compute J^T u for a batch of u, (rows, n) -> (rows, T, D)."""
        rows = len(cotangents)
        with self._differentiable():
            h_BTD = self._h_BTD.expand(rows, -1, -1).clone().requires_grad_()
            u_BTD = cotangents.view(h_BTD.shape)
            return torch.autograd.grad(self._map(h_BTD), h_BTD, u_BTD)[0]

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Differentiate with respect to the state only, in evaluation mode, on the math kernel."""
        model = self._model
        trainable = [p for p in model.parameters() if p.requires_grad]
        try:
            with frozen(model, torch.float32), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                model.requires_grad_(False)
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def _sorted(values: np.ndarray) -> np.ndarray:
    return values[np.argsort(-np.abs(values), kind="stable")].astype(complex)
