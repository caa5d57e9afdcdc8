"""Decoding with constant shapes: one step, captured or compiled once, run again for every token.

The reference, :func:`open_mythos.model.generation.generate`, sees one column more at every token,
so Python has to dispatch every operation of every loop again. Here nothing about a step depends on
how many tokens there are. Position, column and number of the draw are tensors on the device; the
cache shows a fixed number of columns, of which a mask hides those not yet in use. The model's own
code runs (``embed``, ``RecurrentBlock.step``, ``final_hidden``), and the tokens are those of the
plain form.

**Pieces.** *enter* is embedding and prelude, *loop* t one loop, *leave* coda, head and the choice
of a token; a step is enter, loops 0 .. n - 1, leave. Each piece is a graph of its own, so what is
replayed follows the depth that is asked for, and a deeper call only adds loops. Every loop has its
graph, because its cache slots and its adapter lie at their own place in memory: a single graph for
all of them would have to copy a loop's whole history to where it reads. Compiled code has no such
places: one code serves all loops, and is told the loop by a tensor.

**Buckets.** A graph always reads the columns it was captured with, so there is one for every bucket
of 128, 192, 256, 384, 512, ... columns: never more than half as many again as are in use.

Exit rules stop single positions, which changes shapes: they stay with the plain form.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any, NoReturn, Protocol, runtime_checkable

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

logger = logging.getLogger(__name__)

MODES = ("static", "graph", "compile")
"""How a step runs: op by op, as CUDA graphs, or compiled (on CUDA also captured)."""


@runtime_checkable
class Looped(Protocol):
    """A model with a loop, whose depth is an argument."""

    recurrent: RecurrentBlock


class StaticDecoder:
    """Decoding steps of constant shape for a batch of rows.

    :meth:`start` reads the prompts and chooses the first token, every :meth:`step` the next one.
    Cache, buffers and graphs stay on the device as long as the object lives, so that a later
    :meth:`start` finds them made. The weights may change in place meanwhile; they must not be
    moved, replaced or converted. The model has to be in evaluation mode.

    Args:
        model: Any :class:`CausalLM`; rows of a looped one may each have their own depth.
        batch: Rows.
        capacity: Positions of a row at most, prompt and new tokens together.
        mode: "static": op by op, the plain twin of the others. "graph": captured as CUDA graphs.
            "compile": through ``torch.compile``, and captured where there is CUDA.
        bucket: Columns that a step reads at least.

    Raises:
        ConfigError: Unknown mode, sizes out of range, or a model that needs other shapes.
        EnvironmentError_: Graphs were asked for, and the model is not on a CUDA device.
    """

    running_B: Tensor
    """(B,) boolean: rows that have not ended. Setting one to false in place ends the row."""

    def __init__(
        self,
        model: CausalLM,
        batch: int,
        capacity: int,
        *,
        mode: str = "static",
        bucket: int = 128,
    ) -> None:
        device = model.final_norm.weight.device
        captured = _check_mode(mode, device)
        if (problem := static_problem(model, captured)) is not None:
            reject(f"{mode} decoding cannot serve this model", problem)
        self.batch = check_count("batch", batch)
        self.capacity = check_count("capacity", capacity)
        self.model, self.mode, self._bucket = model, mode, check_count("bucket", bucket)
        self._looped = model if isinstance(model, Looped) else None
        self._cache = KVCache(capacity, model.cfg.kv_share == "last")
        self._contexts: dict[Hashable, Context] = {}
        self._loops: list[tuple[Tensor, Tensor]] = []
        self._depths = [0] * batch
        self._held = 0
        self._params = SamplingParams()
        cfg, hidden = model.cfg, torch.float32 if self._looped else model.final_norm.weight.dtype
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
            self._h_B1D = torch.zeros(batch, 1, cfg.dim, dtype=hidden)
            self._drive_B1D = torch.zeros(batch, 1, cfg.dim)
            self.running_B = torch.ones(batch, dtype=torch.bool)
        self._graphs = Graphs(device) if captured else None
        self._pieces: dict[str, Callable[..., None]] = {
            "enter": self._enter, "loop": self._loop, "leave": self._leave,
        }  # fmt: skip
        if mode == "compile":
            self._pieces = {name: torch.compile(piece) for name, piece in self._pieces.items()}
        _log_once(mode)

    def start(
        self,
        input_ids: Tensor,
        params: SamplingParams,
        depth: Depth,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Forget what was before, read the prompts and choose the first token of every row.

        Args:
            input_ids: (B, T) prompts, ragged ones padded on the left.
            params: How tokens are chosen; ``stop`` is left to the caller, who ends rows through
                ``running_B``.
            depth: Loops of a looped model's tokens, for all rows or for each.
            attention_mask: (B, T), false on padding.

        Returns:
            (B,) tokens: a buffer that the next step overwrites.

        Raises:
            ConfigError: The prompts do not fit the decoder, an exit rule is given, autocast is
                on, or the model trains.
        """
        self._check_start(input_ids)
        batch, n_prompt = input_ids.shape
        real_BT = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real_BT = attention_mask.bool()
        if depth.exit_rule is not None:
            reject("exit rules change shapes", "exit_rule", "calls without one")
        if self._looped is not None:
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
        """The next token of every row, (B,): a buffer that the next step overwrites.

        Nothing in it waits for the device.

        Raises:
            ConfigError: The capacity is used up, or nothing was started.
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
        """Where the token stands and what it sees; embedding and prelude."""
        rope = self._rope_rows.index_select(1, self._position_B1[:, 0])
        self._rope.copy_(rope.unsqueeze(2))
        self._visible_B11S.index_fill_(3, self._column_1, True)
        e_B1D = self.model.embed(self._token_B1, ctx)
        if self._looped is None:
            self._h_B1D.copy_(e_B1D)
            return
        recurrent = self._looped.recurrent
        self._h_B1D.copy_(recurrent.initial_state(e_B1D, ctx))
        self._drive_B1D.copy_(recurrent.injection.drive(e_B1D))

    def _loop(self, ctx: Context, t: int | Tensor) -> None:
        """Run loop t, an index or (1,) of one; rows that reached their depth keep their state."""
        assert self._looped is not None
        h_B1D = self._looped.recurrent.step(self._h_B1D, self._drive_B1D, t, ctx)
        if ctx.active is not None and ctx.active.real is not None:
            h_B1D = torch.where(ctx.active.real.unsqueeze(-1), h_B1D, self._h_B1D)
        self._h_B1D.copy_(h_B1D)

    def _leave(self, ctx: Context, params: SamplingParams) -> None:
        """Coda, head, the choice of the next token."""
        h_B1D = self.model.final_hidden(self._h_B1D, ctx)
        self._choose(self.model.head(h_B1D)[:, 0], params)

    def _choose(self, logits_BV: Tensor, params: SamplingParams) -> None:
        """Choose a token of every row, and go on to its place."""
        end = params.eos_token_id
        token_B = params.choose(logits_BV, self._seen_BS, self._keys_B, self._number_1)
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
        """The bucket of so many columns: few and wide ones where each costs a capture."""
        if self._graphs is None:
            width = -(-columns // self._bucket) * self._bucket
        else:
            octave = self._bucket
            while 2 * octave < columns:
                octave *= 2
            width = next(w for w in (octave, octave * 3 // 2, octave * 2) if w >= columns)
        return min(width, self.capacity - 1)

    def _context(self, width: int, t: int, ragged: bool) -> Context:
        """The context of loop ``t`` (and, for t = 0, of prelude and coda) in a bucket."""
        key = (width, t, ragged)
        if key not in self._contexts:
            active = Active(real=self._loops[t][1]) if ragged else None
            cache = self._cache.static(t, width, self._column_1)
            mask = self._visible_B11S[..., :width]
            if self.mode == "compile":
                # one code for all buckets
                torch._dynamo.maybe_mark_dynamic(mask, 3)
                for slot in cache.slots():
                    torch._dynamo.maybe_mark_dynamic(slot, 1)
            self._contexts[key] = Context(
                self._position_B1, self._rope, mask, Columns(width), cache=cache, active=active
            )
        return self._contexts[key]

    def _set_loops(self) -> None:
        """Set index and running rows of every loop, in buffers that stay where they are."""
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
                "decoder, model and prompts are on several devices",
                [str(x.device) for x in (self._column_1, self.model.final_norm.weight, input_ids)],
                "one device", where="input_ids",
            )  # fmt: skip
        if self.model.training:
            reject(
                "a decoder needs a model without dropout", "training mode", "evaluation mode",
                where="model.training",
            )  # fmt: skip
        check_no_autocast(device)


def check_no_autocast(device: torch.device) -> None:
    """Check that a decoder would compute in the dtype of the model.

    Raises:
        ConfigError: Autocast is on.
    """
    if torch.is_autocast_enabled(device.type):
        reject(
            "a decoder does not follow autocast", "autocast is on",
            "a model converted to its dtype, such as model.to(torch.bfloat16)",
        )  # fmt: skip


def static_problem(model: CausalLM, captured: bool) -> str | None:
    """Why steps of constant shape cannot serve ``model``, or None.

    Args:
        model: The model.
        captured: Whether its steps are to be captured, so that no expert may wait for the device.
    """
    for module in model.modules():
        if isinstance(module, GQAttention) and module.cfg.attn_backend == "flash":
            return 'attn_backend="flash", which takes no mask'
        if captured and isinstance(module, MoEFFN):
            backend = getattr(module.experts, "backend", "auto")
            if backend not in ("auto", "grouped"):
                return f'moe_backend="{backend}", which asks the host for the load'
            for name, stack in module.named_parameters(recurse=False):
                if not _grouped_waits_for_nothing(stack):
                    return f"experts whose grouped products ask the host for the load ({name})"
    return None


def _grouped_waits_for_nothing(stack: Tensor) -> bool:
    """PyTorch has such a kernel for bfloat16 from compute capability 9.0 on; others are a loop."""
    aligned = all(width * stack.element_size() % 16 == 0 for width in stack.shape[1:])
    capable = not stack.is_cuda or torch.cuda.get_device_capability(stack.device) >= (9, 0)
    return aligned and capable and stack.dtype == torch.bfloat16


def reject(
    what: str,
    value: object,
    allowed: str = "models that need no other shapes or waits",
    where: str = "mode",
) -> NoReturn:
    """Raise the ConfigError of a call that constant shapes cannot serve; mode="eager" can."""
    raise ConfigError(
        what, where=where, value=value, allowed=allowed,
        fix='use mode="eager", which serves every call',
    )  # fmt: skip


def _check_mode(mode: str, device: torch.device) -> bool:
    """Whether steps are to be captured."""
    pick(MODES, mode, "mode", what="way to run a step", fix='"static" runs everywhere')
    if mode == "graph" and device.type != "cuda":
        raise EnvironmentError_(
            "CUDA graphs need a CUDA device", where="mode", value=f"graph, on {device}",
            fix='move the model to a CUDA device, or use "static" or "compile"',
        )  # fmt: skip
    return device.type == "cuda" and mode != "static"


@cache
def _log_once(mode: str) -> None:
    logger.info("decoding of constant shape: %s", mode)
