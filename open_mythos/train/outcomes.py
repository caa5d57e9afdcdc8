"""Progress of a run, read one step behind the device; what calls for a rollback."""

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
    """Takes in the results of queued steps, each when the next one has been queued.

    Args:
        config: Of the run.
        monitor: Detects loss spikes.
        logger: Receives an event for every skipped step.
        saver: Of the checkpoints to roll back to; None if there are none.

    Attributes:
        state: Progress; ``state.step`` counts queued steps, everything else those that were read.
        trouble: What is wrong with the run, "" if nothing is.
    """

    def __init__(
        self, config: RunConfig, monitor: Monitor, logger: MetricsLogger, saver: Saver | None
    ) -> None:
        self._config, self._monitor, self._logger, self._saver = config, monitor, logger, saver
        self._unread: list[StepResult] = []
        self.restart(TrainState())

    def restart(self, state: TrainState) -> None:
        """Continue from a stored state; results that were not read are dropped."""
        self.state, self.trouble = state, ""
        self._unread.clear()

    def add(self, result: StepResult) -> None:
        """Count a step that has been queued, and read the outcome of the one before."""
        self.state.step += 1
        self.read()
        self._unread.append(result)

    def read(self) -> None:
        """Take in all outcomes; waits for the last step."""
        while self._unread:
            result = self._unread.pop(0)
            self.state.count(result)
            if result.skipped:
                facts = {"loss": result.loss, "grad_norm": result.grad_norm}
                self._logger.log(result.step + 1, event("skipped", **finite(facts)))
            self.trouble = self.trouble or self._trouble_of(result)

    def trouble_by_now(self) -> str:
        """Return what is wrong with the run, the last step included."""
        self.read()
        return self.trouble

    def _trouble_of(self, result: StepResult) -> str:
        """Return why this step calls for a rollback; "" if it does not."""
        skips, allowed = self.state.skips, self._config.train.max_skips
        if skips > allowed:
            return (
                f"{skips} steps in a row had a loss or gradient that is not finite "
                f"(train.max_skips = {allowed})"
            )
        spike = self._monitor.spike(result.step + 1, result.loss)
        if spike is None or self._saver is None:
            return ""
        if self._config.watch.max_rewinds and checkpoints(self._saver.directory):
            return str(spike)
        # without a checkpoint it is better to continue: many a loss comes down again
        logger.warning("%s", spike)
        return ""
