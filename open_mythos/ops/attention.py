"""Scaled dot-product attention: one signature, the kernel chosen by name."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError, EnvironmentError_

logger = logging.getLogger(__name__)


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of H query heads over G key/value heads (H a multiple of G).

    Args:
        q_BTHK: Queries.
        k_BSGK: Keys.
        v_BSGV: Values; V may differ from K.
        mask: Boolean, broadcastable to (B, 1, T, S), true where a query may look.
        causal: Query i sees keys 0 .. i; needs T = S and no mask.
        scale: Factor on the scores; 1 / sqrt(K) by default.
        backend: "auto", "sdpa", "flash" or "reference".

    Returns:
        (B, T, H, V).

    Raises:
        ConfigError: Unknown backend, or one that cannot serve this call.
        EnvironmentError_: Flash attention was asked for by name and is not installed.
    """
    if backend == "auto":
        flash = q_BTHK.is_cuda and mask is None and _flash_installed() and _is_half(q_BTHK)
        backend = "flash" if flash and q_BTHK.shape[-1] == v_BSGV.shape[-1] else "sdpa"
    if backend not in _BACKENDS:
        raise ConfigError(
            "unknown attention backend", where="attn_backend", value=backend,
            allowed=", ".join(("auto", *_BACKENDS)), fix='set attn_backend to "auto"',
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        _log_once(backend)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    return _BACKENDS[backend](q_BTHK, k_BSGK, v_BSGV, mask, causal, scale)


def _reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The plain twin: scores in float32, softmax, weighted sum."""
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK = k_BSGK.repeat_interleave(groups, dim=2)
    v_BSHV = v_BSGV.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", q_BTHK.float(), k_BSHK.float()) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v_BSHV.float()).to(v_BSGV.dtype)


def _sdpa(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """PyTorch's kernel. Unequal key and value widths would take its slow path, so V is padded."""
    key_width, value_width = k_BSGK.shape[-1], v_BSGV.shape[-1]
    if value_width < key_width:
        v_BSGV = F.pad(v_BSGV, (0, key_width - value_width))
    out = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2),
        attn_mask=mask, is_causal=causal, scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)[..., :value_width]


def _flash(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """FlashAttention 2 (arXiv 2307.08691); the package reads GQA natively."""
    if not _flash_installed():
        raise EnvironmentError_(
            "flash attention was asked for and is not installed",
            where="attn_backend", value="flash",
            fix='pip install "open-mythos[flash]", or set attn_backend to "auto"',
        )  # fmt: skip
    if mask is not None or not _is_half(q_BTHK):
        raise ConfigError(
            "flash attention cannot serve this call", where="attn_backend", value="flash",
            allowed="float16 or bfloat16 on CUDA, without padding or document masks",
            fix='set attn_backend to "auto"',
        )  # fmt: skip
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BTHK, k_BSGK, v_BSGV, softmax_scale=scale, causal=causal)


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


@cache
def _flash_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@cache
def _log_once(backend: str) -> None:
    logger.info("attention backend: %s", backend)


_BACKENDS = {"sdpa": _sdpa, "flash": _flash, "reference": _reference}
