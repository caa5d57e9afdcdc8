"""Points of a run at which a fault can be injected.

A moment is the n-th time that a process of the run passes a place of a phase. Counts are the same
in every process of the same length, so a moment is reproducible.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chaos import io_faults
from open_mythos.train import Trainer

PHASES = ("start", "refill", "forward", "backward", "step", "save", "evaluation")
HERE = "phase"
"""Name of the file that says where the run is."""


class Moments:
    """Count the moments of a process, record its phase, and act at one of them.

    Args:
        out: The run's folder.
        phase: Of the moment to act at.
        nth: Its number, from 0; None never acts.
        act: What happens then.
    """

    def __init__(
        self,
        out: Path,
        phase: str = "",
        nth: int | None = None,
        act: Callable[[], None] = lambda: None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()
        self.before_last: dict[str, int] = {}
        """Those that had been when the newest step began."""
        self._target, self._act = (phase, nth), act
        self._phase, self._evaluating = "start", False
        self._file = os.open(out / HERE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._lock = threading.RLock()  # a save may be written beside the training
        self.tick("start")

    def tick(self, phase: str) -> None:
        """The run is at a place of ``phase``."""
        with self._lock:
            phase = "evaluation" if self._evaluating and phase == "forward" else phase
            if phase != self._phase:
                self._phase = phase
                os.pwrite(self._file, bytes([PHASES.index(phase)]), 0)
            number = self.counts[phase]
            self.counts[phase] += 1
        if self._target == (phase, number):
            self._act()

    @contextmanager
    def watch(self, trainer: Trainer) -> Iterator[None]:
        """Within, pass through all places of ``trainer``; what it computes does not change."""
        fetch, evaluate = trainer.loader.next_batch, trainer.evaluate

        def next_batch(step: int) -> Any:
            self.before_last = dict(self.counts)
            self.tick("refill")
            batch = fetch(step)
            self.tick("refill")
            return batch

        def evaluated(model: Any, depths: list[int]) -> Any:
            self._evaluating = True
            try:
                self.tick("evaluation")
                return evaluate(model, depths)
            finally:
                self.tick("evaluation")
                self._evaluating = False

        trainer.loader.next_batch, trainer.evaluate = next_batch, evaluated
        model = trainer.model
        for block in (*model.prelude, *model.recurrent.blocks, *model.coda):
            block.register_forward_hook(lambda *_: self.tick("forward"))
        named = dict(model.named_parameters())
        for name in ("head.weight", "recurrent.injection.log_A", "embedding.weight"):
            named[name].register_post_accumulate_grad_hook(lambda _: self.tick("backward"))
        trainer.optimizer.register_step_pre_hook(lambda *_: self.tick("step"))
        trainer.optimizer.register_step_post_hook(lambda *_: self.tick("step"))
        with io_faults.Interposed(trainer.out_dir / "checkpoints", lambda _: self.tick("save")):
            yield


def where_it_died(out: Path) -> str:
    """The phase in which the last life was."""
    file = out / HERE
    content = file.read_bytes() if file.exists() else b""
    return PHASES[content[0]] if content else "start"
