"""Scaled dot-product attention: one signature, several backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.devices import at_least_float32, is_transformed
from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.ops.attention.pieces import attend_pieces, plan_pieces
from open_mythos.ops.attention.visibility import Visibility
from open_mythos.ops.backend import pick_backend

Mask = Tensor | Visibility | None
"""What queries may attend to: a boolean tensor, a rule that builds one, or None."""

MASK_PAIRS = 1 << 24
"""Largest mask, in elements, that is built at once on a GPU."""


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask: Mask = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute attention of H query heads over G key/value heads (H a multiple of G).

    With a :class:`Visibility`, the full (T, S) mask is materialized only if it is small. Padding
    queries return zeros or attend to themselves, depending on the backend; never NaN.

    Args:
        q_BTHK: Queries.
        k_BSGK: Keys.
        v_BSGV: Values; V may differ from K.
        mask: Boolean, broadcastable to (B, 1, T, S), true where a query may attend; or a
            :class:`Visibility`.
        causal: Query i sees keys 0 .. i; needs T = S and no mask.
        scale: Factor on the scores; 1 / sqrt(K) by default.
        backend: "auto", "sdpa", "flash", "flex" or "reference".

    Returns:
        (B, T, H, V).

    Raises:
        ConfigError: Unknown backend, or one that cannot serve this call.
        EnvironmentError_: Flash attention was requested explicitly and is not installed.
    """
    if backend == "auto":
        backend = _choose(q_BTHK, mask)
    run = pick_backend("attention", backend, _BACKENDS, where="attn_backend")
    if is_transformed():  # the kernels have no rules for it
        run = _reference
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    return run(q_BTHK, k_BSGK, v_BSGV, mask, causal, scale)


def _choose(q_BTHK: Tensor, mask: Mask) -> str:
    """Return flash where it can serve, else SDPA; flex, slow to compile, only on request."""
    return "flash" if _flash_problem(q_BTHK, mask) is None and _flash_installed() else "sdpa"


def _reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Mask, causal: bool, scale: float
) -> Tensor:
    """Reference implementation: scores in float32, softmax, weighted sum."""
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK = k_BSGK.repeat_interleave(groups, dim=2)
    v_BSHV = v_BSGV.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", *map(at_least_float32, (q_BTHK, k_BSHK))) * scale
    if isinstance(mask, Visibility):
        mask = mask.rows()
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), at_least_float32(v_BSHV)).to(
        v_BSGV.dtype
    )


def _equal_widths(
    kernel: Callable[..., Tensor],
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *arguments: object,
) -> Tensor:
    """Pad heads to one width: with narrower values ``kernel`` would be slow, or raise."""
    key_width, value_width = k_BSGK.shape[-1], v_BSGV.shape[-1]
    if value_width < key_width:
        v_BSGV = F.pad(v_BSGV, (0, key_width - value_width))
    elif key_width < value_width:
        missing = (0, value_width - key_width)
        q_BTHK, k_BSGK = F.pad(q_BTHK, missing), F.pad(k_BSGK, missing)
    return kernel(q_BTHK, k_BSGK, v_BSGV, *arguments)[..., :value_width]


def _sdpa(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Mask, causal: bool, scale: float
) -> Tensor:
    """PyTorch's kernel, with the cheapest form of mask that the visibility allows."""
    if not isinstance(mask, Visibility):
        return _sdpa_call(q_BTHK, k_BSGK, v_BSGV, mask, causal, scale)
    if torch.compiler.is_compiling():  # the compiler recomputes the mask where that is cheaper
        return _sdpa_call(q_BTHK, k_BSGK, v_BSGV, mask.whole(), False, scale)
    if q_BTHK.device.type != "cpu":
        return _sdpa_blocks(q_BTHK, k_BSGK, v_BSGV, mask, scale)
    if not len(q_BTHK):
        return _sdpa_call(q_BTHK, k_BSGK, v_BSGV, None, False, scale)
    # callers that need second derivatives, which the kernel lacks, disable it
    fused = torch.backends.cuda.flash_sdp_enabled()
    pieces = plan_pieces(mask, q_BTHK.dtype) if fused else None
    if pieces is None:
        return _sdpa_call(q_BTHK, k_BSGK, v_BSGV, mask.bias(q_BTHK.dtype), False, scale)
    return attend_pieces(q_BTHK, k_BSGK, v_BSGV, mask, pieces, scale)


def _sdpa_call(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """One call; the kernel reads shared key heads natively, on a CPU too."""
    out = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2),
        attn_mask=mask, is_causal=causal, scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def _sdpa_blocks(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seen: Visibility, scale: float
) -> Tensor:
    """Blocks of queries, whose masks are recomputed in the backward pass."""
    if seen.plain:
        from torch.nn.attention.bias import causal_lower_right  # which imports the compiler

        lower_right = causal_lower_right(seen.n_queries, seen.n_columns)  # stays in its flash path
        return _sdpa_call(q_BTHK, k_BSGK, v_BSGV, lower_right, False, scale)
    size = max(1, MASK_PAIRS // max(1, seen.batch * seen.n_columns))
    if size >= seen.n_queries:
        return _sdpa_call(q_BTHK, k_BSGK, v_BSGV, seen.bias(q_BTHK.dtype), False, scale)

    def block(q: Tensor, k: Tensor, v: Tensor, *span: int) -> Tensor:
        return _sdpa_call(q, k, v, seen.rows(*span), False, scale)

    call = block
    if torch.is_grad_enabled() and (q_BTHK.requires_grad or k_BSGK.requires_grad):
        call = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([
        call(q_BTHK[:, start:stop], k_BSGK[:, low:high], v_BSGV[:, low:high],
             start, stop, low, high)
        for start, stop, low, high in seen.spans(size)
    ], dim=1)  # fmt: skip


def _flash(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Mask, causal: bool, scale: float
) -> Tensor:
    """FlashAttention 2 (arXiv 2307.08691); the package reads GQA natively.

    Its causal mask is aligned to the lower right, as new tokens after a cached past need. Packed
    and padded sequences are concatenated without padding; masked pairs are not computed.
    """
    if not _flash_installed():
        raise EnvironmentError_(
            "flash attention was requested and is not installed",
            where="attn_backend", value="flash", allowed="auto, sdpa, flex, reference",
            fix='pip install "open-mythos[flash]", or set attn_backend to "auto"',
        )  # fmt: skip
    problem = _flash_problem(q_BTHK, mask)
    if problem is not None:
        raise ConfigError(
            "flash attention cannot serve this call", where="attn_backend", value=problem,
            allowed="float16 or bfloat16 on CUDA; whole sequences, or new tokens after a past "
            "without padding and documents; no window",
            fix='set attn_backend to "auto"',
        )  # fmt: skip
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if not isinstance(mask, Visibility) or mask.plain:
        causal = causal or mask is not None
        return flash_attn_func(q_BTHK, k_BSGK, v_BSGV, softmax_scale=scale, causal=causal)
    number, borders, longest = mask.packing
    if not longest:
        return torch.zeros_like(q_BTHK)
    flat = [x.flatten(0, 1) for x in (q_BTHK, k_BSGK, v_BSGV)]
    packed = flat if number is None else [x[number] for x in flat]
    out = flash_attn_varlen_func(
        *packed, borders, borders, longest, longest, softmax_scale=scale, causal=True
    )
    if number is not None:
        out = out.new_zeros(flat[0].shape).index_copy(0, number, out)
    return out.view(q_BTHK.shape)


def _flash_problem(q_BTHK: Tensor, mask: Mask) -> str | None:
    """Return why flash attention cannot serve a call, or None."""
    if not _on_cuda(q_BTHK) or q_BTHK.dtype not in (torch.float16, torch.bfloat16):
        return f"{q_BTHK.dtype} on {q_BTHK.device.type}"
    if isinstance(mask, Tensor):
        return "a mask"
    if mask is None or mask.plain:
        return None
    if mask.window:
        return "a window"
    if mask.first or mask.columns_BT is not None:
        return "padding or documents, and queries that are not the whole sequence"
    return "padding or documents while compiling" if torch.compiler.is_compiling() else None


def _flex(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Mask, causal: bool, scale: float
) -> Tensor:
    """FlexAttention: see :mod:`open_mythos.ops.attention.flex`."""
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, k_BSGK, v_BSGV))
    problem = "a mask" if isinstance(mask, Tensor) else None
    if wants_grad and q_BTHK.device.type == "cpu":
        problem = "a gradient on the CPU"
    if problem is not None:
        raise ConfigError(
            "FlexAttention cannot serve this call", where="attn_backend", value=problem,
            allowed="positions, padding and documents; gradients on CUDA only",
            fix='set attn_backend to "auto"',
        )  # fmt: skip
    from open_mythos.ops.attention.flex import attend_flex

    if causal:
        mask = Visibility(q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.device)
    assert not isinstance(mask, Tensor)
    return attend_flex(q_BTHK, k_BSGK, v_BSGV, mask, scale)


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda


@cache
def _flash_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": partial(_equal_widths, _sdpa),
    "flash": partial(_equal_widths, _flash),
    "flex": _flex,
    "reference": _reference,
}
