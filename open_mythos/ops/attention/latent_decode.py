"""Absorbed latent attention of one new token per row, each row reading the slot of its own loop."""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.ops.backend import CHECKS, triton_serves

WIDEST = {torch.float32: 512, torch.bfloat16: 1024, torch.float16: 1024}
"""Widest latent that the kernel holds, by the slots' dtype."""


def latent_decode(
    q_BHW: Tensor,
    slots_LBSW: Tensor,
    loops_B: Tensor | None,
    lengths_B: Tensor | None,
    rank: int,
    *,
    valid_BS: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend one token of each row to the latents of its slot.

    Row b attends to the first ``lengths_B[b]`` positions of slot ``loops_B[b]`` except those that
    ``valid_BS`` masks. The rest of a slot is not read and may be uninitialized; masked positions
    must be finite. A row with nothing to attend to gets zeros. Loops and lengths stay on the
    device: there is no host-device sync.

    One slot (B, S, W) is ``slot.unsqueeze(0)`` with no ``loops_B``.

    Args:
        q_BHW: Queries, scaled: latent part (``rank``), then rotary part.
        slots_LBSW: Entries of L slots: latents, then rotary keys. Any strides, unit along W.
        loops_B: Integers; a loop past the last slot reads the last, and one below 0 the first.
            None: all rows read slot 0.
        lengths_B: Integers from 0 to S. None: all rows see S positions.
        rank: Width R of a latent.
        valid_BS: Boolean, false on masked positions.
        backend: "triton", "reference", or "auto": the Triton kernel on CUDA where no gradient is
            needed.

    Returns:
        (B, H, R), in the dtype of the slots; sums and softmax are float32.

    Raises:
        ConfigError: Unknown backend, or "triton" was requested and cannot serve the call.
    """
    (batch, _, width), (n_loops, _, positions, _) = q_BHW.shape, slots_LBSW.shape
    assert slots_LBSW.shape == (n_loops, batch, positions, width), (q_BHW.shape, slots_LBSW.shape)
    assert n_loops > 0
    assert 0 < rank <= width, (rank, width)
    for each, shape in ((loops_B, (batch,)), (lengths_B, (batch,)), (valid_BS, (batch, positions))):
        assert each is None or each.shape == shape, (each.shape, shape)
    if not kernel_serves(q_BHW, slots_LBSW, rank, backend):
        return _reference(q_BHW, slots_LBSW, loops_B, lengths_B, rank, valid_BS)
    from open_mythos.ops.kernels.latent_decode import decode, decode_op

    q_BHW = q_BHW.to(slots_LBSW.dtype).contiguous()
    call = decode_op if torch.compiler.is_compiling() else decode
    return call(q_BHW, slots_LBSW, loops_B, lengths_B, rank, valid_BS)


def kernel_serves(q_BHW: Tensor, slots_LBSW: Tensor, rank: int, backend: str = "auto") -> bool:
    """Return whether the Triton kernel serves these entries, not the reference."""
    return triton_serves("latent_decode", backend, slots_LBSW, _problem(q_BHW, slots_LBSW, rank))


def _reference(
    q_BHW: Tensor, slots_LBSW: Tensor, loops_B: Tensor | None, lengths_B: Tensor | None,
    rank: int, valid_BS: Tensor | None,
) -> Tensor:  # fmt: skip
    """Reference implementation: gather the slots; float32 scores, softmax, weighted sum."""
    n_loops, batch, positions, _ = slots_LBSW.shape
    entry_BSW = slots_LBSW[0]
    if loops_B is not None:
        rows = torch.arange(batch, device=slots_LBSW.device)
        entry_BSW = slots_LBSW[loops_B.clamp(0, n_loops - 1).long(), rows]
    seen_BS = torch.ones((batch, positions), dtype=torch.bool, device=slots_LBSW.device)
    if lengths_B is not None:
        seen_BS = torch.arange(positions, device=seen_BS.device) < lengths_B.unsqueeze(1)
    if valid_BS is not None:
        seen_BS = seen_BS & valid_BS
    # zero times what was never written could be NaN
    entry_BSW = entry_BSW.float().masked_fill(~seen_BS.unsqueeze(-1), 0.0)
    scores_BHS = torch.einsum("bhw,bsw->bhs", q_BHW.float(), entry_BSW)
    # a softmax over nothing would be NaN; where nothing is seen the entries are zeros anyway
    hidden_BS = ~seen_BS & seen_BS.any(1, keepdim=True)
    weights_BHS = scores_BHS.masked_fill(hidden_BS.unsqueeze(1), -torch.inf).softmax(-1)
    mixed_BHR = torch.einsum("bhs,bsr->bhr", weights_BHS, entry_BSW[..., :rank])
    return mixed_BHR.to(slots_LBSW.dtype)


def _problem(q_BHW: Tensor, slots_LBSW: Tensor, rank: int) -> str | None:
    """Return why the kernel cannot serve the call, or None."""
    if torch.is_grad_enabled() and (q_BHW.requires_grad or slots_LBSW.requires_grad):
        return "a call that needs a gradient"
    if slots_LBSW.dtype not in WIDEST:
        return f"slots of {slots_LBSW.dtype}"
    if slots_LBSW.stride(-1) != 1:
        return f"entries with stride {slots_LBSW.stride(-1)}"
    if rank > WIDEST[slots_LBSW.dtype]:
        return f"a {slots_LBSW.dtype} latent of {rank}, wider than {WIDEST[slots_LBSW.dtype]}"
    return None


def _small_case(device: torch.device) -> tuple[Tensor, Tensor]:
    """Run two rows with slots of their own through the kernel and the reference."""
    generator = torch.Generator().manual_seed(0)
    slots_LBSW = torch.randn(3, 2, 75, 40, generator=generator).to(device)
    q_BHW = torch.randn(2, 5, 40, generator=generator).to(device)
    loops_B, lengths_B = (torch.tensor(each).to(device) for each in ((2, 0), (75, 33)))
    call = q_BHW, slots_LBSW, loops_B, lengths_B, 32
    with torch.no_grad():
        return latent_decode(*call, backend="triton"), latent_decode(*call, backend="reference")


CHECKS["latent_decode"] = _small_case
