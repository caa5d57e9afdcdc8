"""Static-shape decoding: one step, captured or compiled once and replayed for every token.

The reference, :func:`open_mythos.model.generation.generate`, attends to one more column per token,
so Python dispatches every operation of every loop again. Here the shapes do not depend on the
number of tokens: position, column and draw number are device tensors, and a mask hides the unused
columns of a fixed-width cache. The model's own methods run (``embed``, ``RecurrentBlock.step``,
``final_hidden``), and the tokens equal those of the reference.

**Pieces.** A step is *enter* (embedding and prelude), *loop* 0 .. n - 1, and *leave* (coda, head,
sampling). Each loop has its own CUDA graph, because its cache slots and adapter have their own
addresses; the depth decides which graphs are replayed. Compiled code takes the loop index as a
tensor, so one graph serves all loops.

**Buckets.** A graph reads a fixed number of columns: 128, 192, 256, 384, 512, ..., at most half
more than are in use.

Exit rules change shapes, so only the reference supports them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from open_mythos.checks import check_count, pick
from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.inference.cuda_graphs import Graphs
from open_mythos.model.active import Active
from open_mythos.model.cache import Columns, KVCache
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.layers.gqa import GQAttention
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.ops.rope import rope_table
from open_mythos.ops.sampling import SamplingParams

MODES = ("static", "graph", "compile")
"""How a step runs: eagerly, as CUDA graphs, or compiled (and captured on CUDA)."""


class StaticDecoder:
    """Static-shape decoder for a batch of rows.

    :meth:`start` reads the prompts and chooses the first token, every :meth:`step` the next one.
    Cache, buffers and graphs are kept for later calls of :meth:`start`. Weights may change in
    place, but must not be moved, replaced or cast. The model must be in evaluation mode.

    Args:
        model: Any :class:`CausalLM`; rows of a looped one may differ in depth.
        batch: Number of rows.
        capacity: Maximum positions of a row, prompt and new tokens together.
        mode: "static" (eager, the reference of the others), "graph" (CUDA graphs) or "compile"
            (``torch.compile``, and CUDA graphs on CUDA).
        bucket: Minimum number of columns that a step reads.

    Raises:
        ConfigError: Unknown mode, sizes out of range, or an unsupported model.
        EnvironmentError_: "graph" for a model that is not on a CUDA device.
    """

    running_B: Tensor
    """(B,) boolean: rows that have not ended. Set one to false in place to end the row."""

    def __init__(
        self, model: CausalLM, batch: int, capacity: int, *, mode: str = "static", bucket: int = 128
    ) -> None:
        device = model.final_norm.weight.device
        pick(MODES, mode, "mode", what="decoding mode", fix='"static" runs everywhere')
        if mode == "graph" and device.type != "cuda":
            raise EnvironmentError_(
                "CUDA graphs need a CUDA device", where="mode", value=f"graph, on {device}",
                fix='move the model to a CUDA device, or use "static" or "compile"',
            )  # fmt: skip
        captured = device.type == "cuda" and mode != "static"
        if (problem := static_problem(model, captured)) is not None:
            reject(f"{mode} decoding does not support this model", problem)
        self.batch = check_count("batch", batch)
        self.capacity = check_count("capacity", capacity)
        self.model, self.mode, self._bucket = model, mode, check_count("bucket", bucket)
        self._recurrent: RecurrentBlock | None = getattr(model, "recurrent", None)
        self._cache = KVCache(capacity, model.cfg.kv_share == "last")
        self._contexts: dict[Hashable, Context] = {}
        self._loops: list[tuple[Tensor, Tensor]] = []
        self._depths = [0] * batch
        self._held = 0
        self._params = SamplingParams()
        cfg, dtype = model.cfg, torch.float32 if self._recurrent else model.final_norm.weight.dtype
        with torch.device(device):
            self._rope_rows = rope_table(torch.arange(capacity), cfg.rope_dim, cfg.rope_theta)
            self._rope = torch.zeros(2, batch, 1, self._rope_rows.shape[-1])
            self._visible_B11S = torch.zeros(batch, 1, 1, capacity, dtype=torch.bool)
            self._seen_BS = torch.zeros(batch, capacity, dtype=torch.long)
            self._token_B1 = torch.zeros(batch, 1, dtype=torch.long)
            self._position_B1 = torch.zeros(batch, 1, dtype=torch.long)
            self._column_1 = torch.zeros(1, dtype=torch.long)
            self._number_1 = torch.zeros(1, dtype=torch.long)
            self._keys_B = torch.zeros(batch, dtype=torch.long)
            self._h_B1D = torch.zeros(batch, 1, cfg.dim, dtype=dtype)
            self._drive_B1D = torch.zeros(batch, 1, cfg.dim)
            self.running_B = torch.ones(batch, dtype=torch.bool)
        self._graphs = Graphs(device) if captured else None
        self._pieces: dict[str, Callable[..., None]] = {
            "enter": self._enter, "loop": self._loop, "leave": self._leave,
        }  # fmt: skip
        if mode == "compile":
            self._pieces = {name: torch.compile(piece) for name, piece in self._pieces.items()}

    def start(
        self,
        input_ids: Tensor,
        params: SamplingParams,
        depth: Depth,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Reset, read the prompts and choose the first token of every row.

        Args:
            input_ids: (B, T) prompts, left-padded if ragged.
            params: Sampling parameters; ``stop`` is left to the caller (see ``running_B``).
            depth: Loops of a looped model, for all rows or per row.
            attention_mask: (B, T), false on padding.

        Returns:
            (B,) tokens, in a buffer that the next step overwrites.

        Raises:
            ConfigError: The prompts do not fit the decoder, an exit rule is given, autocast is
                on, or the model is in training mode.
        """
        self._check_start(input_ids)
        batch, n_prompt = input_ids.shape
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real_BT = mask_BT.bool()
        if depth.exit_rule is not None:
            reject("exit rules change shapes", "exit_rule", "calls without one")
        if self._recurrent is not None:
            self._depths = depth.of_rows(batch, self.model.cfg.max_loop_iters)
        with torch.no_grad():
            self._cache.clear()
            ctx = self.model.context(input_ids, self._cache, attention_mask=attention_mask)
            logits_BV = self.model.head(self.model.hidden(input_ids, ctx, depth)[:, -1])
            self._set_loops()
            self._visible_B11S.zero_()[:, 0, 0, :n_prompt] = real_BT
            self._seen_BS.fill_(-1)[:, :n_prompt] = input_ids.masked_fill(~real_BT, -1)
            self._position_B1.copy_(real_BT.sum(1, keepdim=True) - 1)
            self._column_1.fill_(n_prompt - 1)
            self._number_1.zero_()
            self._keys_B.copy_(params.row_keys(batch))
            self.running_B.fill_(True)
            self._held, self._params = n_prompt, params.of_a_step
            self._choose(logits_BV, self._params)
        return self._token_B1[:, 0]

    def step(self) -> Tensor:
        """Return the next token (B,) of every row, in a buffer that the next step overwrites.

        There is no host-device sync.

        Raises:
            ConfigError: The capacity is used up, or :meth:`start` was not called.
        """
        if not 0 < self._held < self.capacity - 1:
            reject(
                "there is no next step", f"{self._held} of {self.capacity} positions used",
                "after start(), until the capacity is used up", where="StaticDecoder.step",
            )  # fmt: skip
        width = self._width(self._held + 1)
        least, most = min(self._depths), max(self._depths)
        with torch.no_grad():
            ctx = self._context(width, 0, ragged=False)
            self._run("enter", (width,), ctx)
            for t in range(most):
                ragged = t >= least
                index = self._loops[t][0] if self.mode == "compile" else t
                self._run("loop", (width, t, ragged), self._context(width, t, ragged), index)
            self._run("leave", (width, self._params), ctx, self._params)
        self._held += 1
        return self._token_B1[:, 0]

    def _enter(self, ctx: Context) -> None:
        """Update rotary table and mask; run embedding and prelude."""
        rope = self._rope_rows.index_select(1, self._position_B1[:, 0])
        self._rope.copy_(rope.unsqueeze(2))
        self._visible_B11S.index_fill_(3, self._column_1, True)
        e_B1D = self.model.embed(self._token_B1, ctx)
        if self._recurrent is None:
            self._h_B1D.copy_(e_B1D)
            return
        self._h_B1D.copy_(self._recurrent.initial_state(e_B1D, ctx))
        self._drive_B1D.copy_(self._recurrent.injection.drive(e_B1D))

    def _loop(self, ctx: Context, t: int | Tensor) -> None:
        """Run loop ``t``, an index or a (1,) tensor; rows at their depth keep their state."""
        assert self._recurrent is not None
        h_B1D = self._recurrent.step(self._h_B1D, self._drive_B1D, t, ctx)
        if ctx.active is not None and ctx.active.real is not None:
            h_B1D = torch.where(ctx.active.real.unsqueeze(-1), h_B1D, self._h_B1D)
        self._h_B1D.copy_(h_B1D)

    def _leave(self, ctx: Context, params: SamplingParams) -> None:
        """Run coda and head, and choose the next token."""
        h_B1D = self.model.final_hidden(self._h_B1D, ctx)
        self._choose(self.model.head(h_B1D)[:, 0], params)

    def _choose(self, logits_BV: Tensor, params: SamplingParams) -> None:
        """Choose a token of every row, and advance to its position."""
        end = params.eos_token_id
        n_prompt_1 = self._column_1 + 1 - self._number_1
        token_B = params.choose(logits_BV, self._seen_BS, self._keys_B, self._number_1, n_prompt_1)
        token_B = token_B.masked_fill(~self.running_B, end or 0)
        self._token_B1.copy_(token_B.unsqueeze(1))
        if end is not None:
            self.running_B.logical_and_(token_B != end)
        for counter in (self._column_1, self._position_B1, self._number_1):
            counter.add_(1)
        self._seen_BS.index_copy_(1, self._column_1, self._token_B1)

    def _run(self, name: str, key: tuple[Hashable, ...], *arguments: Any) -> None:
        piece = self._pieces[name]
        if self._graphs is None:
            piece(*arguments)
        else:
            self._graphs.run((name, *key), partial(piece, *arguments))

    def _width(self, columns: int) -> int:
        """Return the bucket width for ``columns``: few and wide ones where each costs a capture."""
        if self._graphs is None:
            width = -(-columns // self._bucket) * self._bucket
        else:
            octave = self._bucket
            while 2 * octave < columns:
                octave *= 2
            width = next(w for w in (octave, octave * 3 // 2, octave * 2) if w >= columns)
        return min(width, self.capacity - 1)

    def _context(self, width: int, t: int, ragged: bool) -> Context:
        """Return the context of loop ``t`` (t = 0: of prelude and coda too) in a bucket."""
        key = (width, t, ragged)
        if key not in self._contexts:
            active = Active(real=self._loops[t][1]) if ragged else None
            cache = self._cache.static(t, width, self._column_1)
            mask = self._visible_B11S[..., :width]
            if self.mode == "compile":
                # one compiled graph for all buckets
                torch._dynamo.maybe_mark_dynamic(mask, 3)
                for slot in cache.slots():
                    torch._dynamo.maybe_mark_dynamic(slot, 1)
            self._contexts[key] = Context(
                self._position_B1, self._rope, mask, Columns(width), cache=cache, active=active
            )
        self._contexts[key].memo.clear()  # compiled code is specialized to its entries
        return self._contexts[key]

    def _set_loops(self) -> None:
        """Set index and running rows of every loop, in buffers of fixed address."""
        device = self._column_1.device
        depth_B1 = torch.tensor(self._depths, device=device).view(-1, 1)
        for t in range(len(self._loops), max(self._depths)):
            self._loops.append((torch.tensor([t], device=device), depth_B1 > t))
        for t, (_, runs_B1) in enumerate(self._loops):
            runs_B1.copy_(depth_B1 > t)

    def _check_start(self, input_ids: Tensor) -> None:
        self.model.check_ids(input_ids)
        batch, n_prompt = input_ids.shape
        if batch != self.batch or n_prompt >= self.capacity:
            reject(
                "the prompts do not fit the decoder", f"{batch} rows of {n_prompt} tokens",
                f"{self.batch} rows of fewer than {self.capacity} tokens", where="input_ids",
            )  # fmt: skip
        device = self._column_1.device
        if not input_ids.device == self.model.final_norm.weight.device == device:
            reject(
                "decoder, model and prompts are on different devices",
                [str(x.device) for x in (self._column_1, self.model.final_norm.weight, input_ids)],
                "one device", where="input_ids",
            )  # fmt: skip
        if self.model.training:
            reject(
                "static-shape decoding needs evaluation mode", "training mode", "evaluation mode",
                where="model.training",
            )  # fmt: skip
        check_no_autocast(device)


def check_no_autocast(device: torch.device) -> None:
    """Raise a ConfigError under autocast, which the buffers do not follow."""
    if torch.is_autocast_enabled(device.type):
        reject(
            "static-shape decoding does not support autocast", "autocast is on",
            "a model converted to its dtype, such as model.to(torch.bfloat16)",
        )  # fmt: skip


def static_problem(model: CausalLM, captured: bool) -> str | None:
    """Return why ``model`` does not support static shapes, or None.

    If steps are ``captured``, experts may not sync with the host.
    """
    for module in model.modules():
        if isinstance(module, GQAttention) and module.cfg.attn_backend == "flash":
            return 'attn_backend="flash", which takes no mask'
        if captured and isinstance(module, MoEFFN):
            backend = getattr(module.experts, "backend", "auto")
            if backend not in ("auto", "grouped"):
                return f'moe_backend="{backend}", whose load is read on the host'
            for name, stack in module.named_parameters(recurse=False):
                if not _grouped_without_sync(stack):
                    return f"experts whose grouped matmuls read the load on the host ({name})"
    return None


def _grouped_without_sync(stack: Tensor) -> bool:
    """Return whether PyTorch has a grouped matmul kernel: bfloat16, capability 9.0 and above."""
    aligned = all(width * stack.element_size() % 16 == 0 for width in stack.shape[1:])
    capable = not stack.is_cuda or torch.cuda.get_device_capability(stack.device) >= (9, 0)
    return aligned and capable and stack.dtype == torch.bfloat16


def reject(
    what: str, value: object, allowed: str = "models of static shape, without host syncs",
    where: str = "mode",
) -> NoReturn:  # fmt: skip
    """Raise the ConfigError of a call that needs mode="eager"."""
    raise ConfigError(
        what, where=where, value=value, allowed=allowed,
        fix='use mode="eager", which supports every call',
    )  # fmt: skip
