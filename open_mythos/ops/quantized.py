"""Weights packed to 8 or 4 bits: packing, matmuls and routed experts.

Weight-only: activations stay bfloat16. int8 has one scale per output, int4 sixteen evenly spaced
values between the minimum and the maximum of each group of inputs:

    int8:  w = level * scale                 level in -127 .. 127
    int4:  w = (level - 8) * scale + zero    level in 0 .. 15

The kernel is chosen by shape. The packed kernels of PyTorch's CPU backend read the levels directly;
their time grows with the rows, so they serve the few rows of decoding. For many rows, the weight is
unpacked to bfloat16 piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError, InternalError
from open_mythos.ops.experts.routed import routed_experts
from open_mythos.ops.experts.rows import activated

DTYPE = torch.bfloat16
"""Dtype of activations, scales and results."""
GROUPS = (32, 64, 128, 256)
"""Group sizes of int4 that the packed kernels support."""
PACKED_ROWS = {8: 16, 4: 56}
"""Bits -> most rows at which the packed kernel is faster than unpacking."""
PIECE = 1 << 19
"""Elements unpacked at a time: as bfloat16 they stay in a core's second-level cache."""


@dataclass(frozen=True)
class PackedWeight:
    """A matrix that maps I inputs to O outputs, or a stack of E such matrices.

    It is stored zero-padded: inputs to a multiple of ``group`` (int8: of 16) and, in int4, outputs
    to a multiple of 16. The kernels read past the end of rows of other sizes.

    Attributes:
        levels: int8 (..., O, I), or uint8 (..., O, I / 2) in the order of the CPU's int4 kernel.
        scale: bfloat16; int8 (..., O), int4 (..., I / group, O, 2): scale and zero.
        inputs: I without padding.
        outputs: O without padding.
        group: Inputs that share a scale in int4; 0 for int8.
    """

    levels: Tensor
    scale: Tensor
    inputs: int
    outputs: int
    group: int = 0

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 4 if self.group else 8

    @property
    def stored(self) -> tuple[int, int]:
        """(O, I) with padding."""
        outputs, width = self.levels.shape[-2:]
        return outputs, 2 * width if self.group else width

    def __getitem__(self, index: int | Tensor) -> PackedWeight:
        """Index a stack: one matrix, or a stack of the matrices in ``index``."""
        return replace(self, levels=self.levels[index], scale=self.scale[index])

    def part(self, first: int, count: int) -> PackedWeight:
        """Slice ``count`` stored outputs; ``first`` is a multiple of 64, the largest int4 block."""
        some = slice(first, first + count)
        scale = self.scale[..., some, :] if self.group else self.scale[..., some]
        return replace(self, levels=self.levels[..., some, :], scale=scale, outputs=count)

    def unpacked(self, dtype: torch.dtype = DTYPE) -> Tensor:
        """Return the weights (..., I, O), the right operand of ``x @ w``."""
        if self.group:
            parts = [block.transpose(-3, -2).flatten(-2) for block in self.blocks(dtype)]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        else:
            whole = (self.levels.to(dtype) * self.scale.to(dtype).unsqueeze(-1)).mT
        return whole[..., : self.inputs, : self.outputs]

    def blocks(self, dtype: torch.dtype = DTYPE) -> Iterator[Tensor]:
        """Yield int4 weights in stored order, (..., blocks, I, outputs of a block).

        Whole blocks first, then the remaining outputs.
        """
        block, halves = _order()
        outputs, _ = self.stored
        whole = outputs - outputs % block
        if whole:
            yield self.part(0, whole)._as_blocks(block, halves, dtype)
        if whole < outputs:
            yield self.part(whole, outputs - whole)._as_blocks(outputs - whole, False, dtype)

    def _as_blocks(self, block: int, halves: bool, dtype: torch.dtype) -> Tensor:
        outputs, inputs = self.stored
        pairs = self.levels.unflatten(-2, (outputs // block, -1))
        pairs = pairs.reshape(*pairs.shape[:-2], inputs, block // 2)
        levels = pairs.new_empty(*pairs.shape[:-1], block, dtype=dtype)
        ours = levels.chunk(2, -1) if halves else (levels[..., 0::2], levels[..., 1::2])
        for places, half in zip(ours, (pairs & 15, pairs >> 4), strict=True):
            places.copy_(half.view(torch.int8).sub_(8))
        by_group = levels.unflatten(-2, (-1, self.group))  # (..., blocks, I / group, group, block)
        scale, zero = (
            each.unflatten(-1, (-1, block)).transpose(-3, -2).unsqueeze(-2).contiguous()
            for each in self.scale.to(dtype).unbind(-1)
        )
        return torch.addcmul(zero, by_group, scale, out=by_group).flatten(-3, -2)


def check_packing(inputs: int, group: int, where: str) -> None:
    """Check that a matrix with ``inputs`` inputs can be packed; int8 (``group`` 0) always can.

    Raises:
        ConfigError: Unsupported group size, or one larger than ``inputs``.
    """
    if group and (group not in GROUPS or group > inputs):
        raise ConfigError(
            "this layer cannot be rounded to int4", where=where,
            value=f"groups of {group} for {inputs} inputs",
            allowed=f"groups of {', '.join(map(str, GROUPS))}, no wider than the inputs",
            fix="take a smaller group_size, or int8, which takes every width",
        )  # fmt: skip


@torch.no_grad()
def pack(weight: Tensor, group: int = 0) -> PackedWeight:
    """Round ``weight`` (..., O, I) to int8, or to int4 in groups of ``group`` inputs.

    Levels are computed from the scale and zero already rounded to bfloat16, so that storing those
    in bfloat16 adds no error. A stack is packed one matrix at a time.
    """
    check_packing(weight.shape[-1], group, "pack")
    if weight.dim() > 2:
        parts = [pack(each, group) for each in weight.unbind()]
        levels = torch.stack([part.levels for part in parts])
        return replace(parts[0], levels=levels, scale=torch.stack([part.scale for part in parts]))
    outputs, inputs = weight.shape
    more = (0, -inputs % (group or 16), 0, -outputs % 16 if group else 0)
    weight = F.pad(weight.float(), more)
    levels, scale = _pack_int4(weight, group) if group else _pack_int8(weight)
    return PackedWeight(levels, scale, inputs, outputs, group)


_TINY = torch.finfo(DTYPE).tiny


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(-1) / 127).clamp_min(_TINY).to(DTYPE)
    levels = (weight / scale.float().unsqueeze(-1)).round_().clamp_(-127, 127)
    return levels.to(torch.int8), scale


def _pack_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(-1, (-1, group))  # (O, I / group, group)
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp_min(_TINY).to(DTYPE)
    zero = (low + 8 * scale.float()).to(DTYPE)
    levels = (groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    levels = levels.round_().add_(8).clamp_(0, 15).flatten(-2).to("cpu", torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    scales = torch.stack((scale.T, zero.T), -1)  # (I / group, O, 2)
    return packed.to(weight.device), scales.contiguous()


@cache
def _order() -> tuple[int, bool]:
    """Detect this CPU's int4 layout: outputs per block, and whether bytes pair its halves.

    Blocks have 64 or 32 outputs, depending on the vector width. The low nibbles of a block hold its
    first outputs and the high nibbles the rest, or else neighbors share a byte. PyTorch does not
    document which, so this packs a known matrix.
    """
    probe = torch.arange(64 * 32, dtype=torch.int32).mul(7).remainder(13).view(64, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    for block, halves in ((64, True), (32, True), (64, False), (32, False), (16, False)):
        pairs = packed.reshape(64 // block, 32, block // 2)
        low, high = pairs & 15, pairs >> 4
        found = torch.cat((low, high), -1) if halves else torch.stack((low, high), -1).flatten(-2)
        if torch.equal(found.mT.flatten(0, 1), probe.to(torch.uint8)):
            return block, halves
    raise InternalError(
        "this PyTorch packs 4-bit weights in an unknown order",
        where="int4",
        value=torch.__version__,
        allowed="the order of supported versions of PyTorch",
    )


def packed_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply ``x`` (..., I) by a packed matrix; returns (..., O) in bfloat16."""
    rows = x.reshape(-1, x.shape[-1]).to(DTYPE)
    added = weight.stored[1] - weight.inputs
    rows = F.pad(rows, (0, added)) if added else rows.contiguous()
    few = rows.device.type == "cpu" and len(rows) <= PACKED_ROWS[weight.bits]
    out = (_by_kernel if few else _unpacked)(rows, weight)
    return out[:, : weight.outputs].reshape(*x.shape[:-1], weight.outputs)


def _by_kernel(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply with the CPU's packed kernels."""
    if not weight.group:
        return torch._weight_int8pack_mm(x, weight.levels, weight.scale)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.levels, weight.group, weight.scale)


def _unpacked(x: Tensor, weight: PackedWeight) -> Tensor:
    """Unpack and multiply: the whole matrix on a GPU, piece by piece on a CPU."""
    if x.is_cuda:
        return x[:, : weight.inputs] @ weight.unpacked()
    outputs, inputs = weight.stored
    step = max(64, PIECE // inputs // 64 * 64)
    out = x.new_empty(len(x), outputs)
    for first in range(0, outputs, step):
        part = weight.part(first, min(step, outputs - first))
        here = out[:, first : first + step]
        if weight.group:
            pieces = [(x @ block).transpose(0, 1).flatten(1) for block in part.blocks()]
            here.copy_(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1))
        else:
            # levels are exact in bfloat16: the result is scaled instead
            here.copy_(x @ part.levels.to(DTYPE).mT)
    return out if weight.group else out.mul_(weight.scale)


def packed_experts(
    x_ND: Tensor, gate_up: PackedWeight, down: PackedWeight, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Sum the outputs of each token's C chosen experts, times their weights; (N, D) bfloat16.

    A CPU multiplies expert by expert. A GPU avoids a host-device sync: it unpacks one expert per
    choice, or all experts if that is less. See
    :func:`open_mythos.ops.experts.routed.routed_experts` for the arguments.
    """
    x_ND, weights_NC = x_ND.to(DTYPE), weights_NC.to(DTYPE)
    if x_ND.device.type == "cpu":
        return _each(x_ND, gate_up, down, experts_NC, weights_NC)
    if experts_NC.numel() <= len(gate_up.levels):
        return _gathered(x_ND, gate_up, down, experts_NC, weights_NC)
    return routed_experts(x_ND, gate_up.unpacked(), down.unpacked(), experts_NC, weights_NC)


def _each(
    x_ND: Tensor, gate_up: PackedWeight, down: PackedWeight, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Multiply the tokens of each expert, sorted by expert."""
    n_chosen, flat = experts_NC.shape[1], experts_NC.flatten()
    order = flat.argsort(stable=True)
    rows, weights = x_ND[order // n_chosen], weights_NC.flatten()[order].unsqueeze(-1)
    made, first = torch.empty_like(rows), 0
    for expert, count in enumerate(flat.bincount().tolist()):
        if count:
            mine = slice(first, first + count)
            hidden = activated(packed_linear(rows[mine], gate_up[expert]), weights[mine])
            made[mine] = packed_linear(hidden, down[expert])
            first += count
    by_token = torch.empty_like(made).index_copy_(0, order, made)
    return by_token.view(-1, n_chosen, rows.shape[1]).sum(1)


def _gathered(
    x_ND: Tensor, gate_up: PackedWeight, down: PackedWeight, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Unpack the expert of every choice and run batched matmuls."""
    n_chosen, flat = experts_NC.shape[1], experts_NC.flatten()
    rows = x_ND.repeat_interleave(n_chosen, 0).unsqueeze(1)
    hidden = activated(rows @ gate_up[flat].unpacked(), weights_NC.view(-1, 1, 1))
    return (hidden @ down[flat].unpacked()).view(-1, n_chosen, x_ND.shape[1]).sum(1)
