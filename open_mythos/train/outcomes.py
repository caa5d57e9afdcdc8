"""Progress of a run, read one step behind the device, and reasons for a rollback."""

from __future__ import annotations

import logging

from open_mythos.train.checkpoint.find import checkpoints
from open_mythos.train.checkpoint.saver import Saver
from open_mythos.train.config import RunConfig
from open_mythos.train.monitoring.metrics import MetricsLogger, event, finite
from open_mythos.train.monitoring.monitor import Monitor
from open_mythos.train.state import StepResult, TrainState

logger = logging.getLogger(__name__)


class Outcomes:
    """Reads the result of each queued step once the next one has been queued.

    Attributes:
        state: Progress; ``state.step`` counts queued steps, all other fields those that were read.
        trouble: Why the run should roll back; "" if it should not.
    """

    def __init__(
        self, config: RunConfig, monitor: Monitor, logger: MetricsLogger, saver: Saver | None
    ) -> None:
        self._config, self._monitor, self._logger, self._saver = config, monitor, logger, saver
        self._unread: list[StepResult] = []
        self.restart(TrainState())

    def restart(self, state: TrainState) -> None:
        """Continue from a stored state; unread results are dropped."""
        self.state, self.trouble = state, ""
        self._unread.clear()

    def add(self, result: StepResult) -> None:
        """Count a queued step, and read the outcome of the previous one."""
        self.state.step += 1
        self.read()
        self._unread.append(result)

    def read(self) -> str:
        """Read all outcomes, which waits for the last step; return :attr:`trouble`."""
        while self._unread:
            result = self._unread.pop(0)
            self.state.count(result)
            if result.skipped:
                facts = {"loss": result.loss, "grad_norm": result.grad_norm}
                self._logger.log(result.step + 1, event("skipped", **finite(facts)))
            self.trouble = self.trouble or self._trouble_of(result)
        return self.trouble

    def _trouble_of(self, result: StepResult) -> str:
        skips, allowed = self.state.skips, self._config.train.max_skips
        if skips > allowed:
            return (
                f"{skips} steps in a row had a loss or gradient that is not finite "
                f"(train.max_skips = {allowed})"
            )
        spike = self._monitor.spikes.observe(result.step + 1, result.loss)
        if spike is None or self._saver is None:
            return ""
        if self._config.watch.max_rewinds and checkpoints(self._saver.directory):
            return str(spike)
        # without a checkpoint, continue: the loss may recover
        logger.warning("%s", spike)
        return ""
