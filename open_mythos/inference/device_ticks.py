"""Ticks of constant shape: the device decides which rows loop, wait and leave.

A tick runs a loop of every slot, lets the ``width`` slots that waited longest leave, and enters
their next tokens. The host launches it without reading any value, as one CUDA graph, and reads the
tokens of the tick before while this one runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.devices import HostCopy
from open_mythos.errors import ConfigError
from open_mythos.inference.batch import Batch, Chosen, Needs
from open_mythos.inference.cuda_graphs import Graphs, capture_problem
from open_mythos.inference.runner import Runner
from open_mythos.inference.slots import LOOPING, WAITING


@dataclass(frozen=True)
class Launched:
    """The tokens that a tick chooses, on their way to the host."""

    whole: HostCopy
    """(P, 4 + K) int64: serial or -1, token, loops, whether finite, likely tokens."""
    scores: HostCopy | None
    """(P, 1 + K) float32 log-probabilities."""

    def read(self) -> list[tuple[int, Chosen]]:
        """Wait for the tick; return serial numbers and tokens, with all scores that there are."""
        rows = self.whole.read().tolist()
        scores = [[0.0]] * len(rows) if self.scores is None else self.scores.read().tolist()
        chosen = []
        for (serial, token, loops, finite, *top), (own, *values) in zip(rows, scores, strict=True):
            if serial >= 0:
                likely = tuple(zip(top, values, strict=True))
                chosen.append((serial, Chosen(token, loops, own, likely, bool(finite))))
        return chosen


class DeviceTicks:
    """Launches ticks of a runner.

    Args:
        runner: The runner; its slots must be placed by :meth:`place` as well.
        n_slots: Number of slots. An eighth of them may leave in a tick, or all of a dense model.

    Raises:
        ConfigError: On CUDA, steps of the model read values on the host.
    """

    def __init__(self, runner: Runner, n_slots: int) -> None:
        device = runner.slots.phase.device
        if device.type == "cuda" and (problem := capture_problem(runner.model)) is not None:
            raise ConfigError(
                "steps of this model cannot be captured", where="constant_shapes", value=problem,
                allowed="models whose steps read no value on the host",
                fix="pass constant_shapes=False, or use a bfloat16 model",
            )  # fmt: skip
        width = max(1, n_slots // 8) if runner.max_loops else n_slots
        self._runner, self._width, self._n_slots = runner, width, n_slots
        self._graphs = Graphs(device) if device.type == "cuda" else None
        with torch.device(device):
            self._all_B = torch.arange(n_slots)
            self._serial = torch.full((n_slots,), -1)
            self._age = torch.zeros(n_slots, dtype=torch.long)
            self._now = torch.zeros(1, dtype=torch.long)
        self._out: dict[Needs, tuple[Tensor, Tensor | None]] = {}

    def place(self, slot: int, serial: int) -> None:
        """Set the sequence of a slot; tokens of an earlier one are told apart by its number."""
        self._serial[slot] = serial

    @torch.inference_mode()
    def launch(self, needs: Needs, n_blocks: int) -> Launched:
        """Start a tick, without a host-device sync.

        Args:
            needs: What the running requests ask for.
            n_blocks: Pages of a level to read.
        """
        if self._graphs is None:
            self._tick(needs, n_blocks)
        else:
            self._graphs.run((needs, n_blocks), lambda: self._tick(needs, n_blocks))
        whole, scores = (None if x is None else HostCopy(x.clone()) for x in self._out[needs])
        assert whole is not None
        return Launched(whole, scores)

    def _tick(self, needs: Needs, n_blocks: int) -> None:
        runner, phase = self._runner, self._runner.slots.phase
        if runner.max_loops:
            looped = phase[:-1] == LOOPING
            runner.loop_rows(Batch(self._all_B, needs, n_blocks=n_blocks))
            stopped = looped & (phase[:-1] == WAITING)
            self._age.copy_(torch.where(stopped, self._now, self._age))
        self._now += 1
        waits = phase[:-1] == WAITING
        # the oldest first; of equal age, the lowest slot
        order = torch.where(waits, self._age * self._n_slots + self._all_B, 1 << 62)
        slots_P = order.topk(self._width, largest=False).indices
        batch = Batch(slots_P, needs, n_blocks=n_blocks)
        choice = runner.leave_rows(batch)
        assert choice.real_R is not None
        serial_P = torch.where(choice.real_R, self._serial[slots_P], -1)
        columns = [serial_P, choice.token_R, choice.loops_R, choice.finite_R.long()]
        whole = torch.stack(columns, dim=1)
        scores = None
        if choice.logprob_R is not None and choice.top_RK is not None:
            assert choice.value_RK is not None
            whole = torch.cat((whole, choice.top_RK), dim=1)
            scores = torch.cat((choice.logprob_R.unsqueeze(1), choice.value_RK), dim=1)
        runner.enter_rows(batch)
        if not runner.max_loops:
            self._age[slots_P] = self._now
        self._keep(needs, whole, scores)

    def _keep(self, needs: Needs, whole: Tensor, scores: Tensor | None) -> None:
        """Write the results where every replay of the graph leaves them."""
        if needs not in self._out:
            self._out[needs] = whole.clone(), None if scores is None else scores.clone()
        kept, kept_scores = self._out[needs]
        kept.copy_(whole)
        if scores is not None and kept_scores is not None:
            kept_scores.copy_(scores)
