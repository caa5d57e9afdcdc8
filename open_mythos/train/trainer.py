"""The training loop: ``train_step`` is one optimizer step; ``fit`` repeats it, logs and saves.

A step is a pure function of its number, the weights, the optimizer state and the configuration, so
a resumed run equals an uninterrupted one. The host queues steps and reads the outcome of each while
the device computes the next; it waits only at steps that are logged, evaluated or saved.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.devices import autocast
from open_mythos.distributed import over_ranks, rank, world_size
from open_mythos.errors import ConfigError
from open_mythos.files import write_text
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import AVERAGE_FILE, CHECKPOINTS_FOLDER, METRICS_FILE
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.config_changes import reject_changes
from open_mythos.train.checkpoint.find import checkpoints, find_checkpoint, read_state
from open_mythos.train.checkpoint.manifest import as_json
from open_mythos.train.checkpoint.restore import holds_file, load_checkpoint, state_read
from open_mythos.train.checkpoint.saver import Saver
from open_mythos.train.config import RunConfig
from open_mythos.train.finite import DivergedError, spoilt
from open_mythos.train.loop_summary import LoopSummary, depth_metrics
from open_mythos.train.monitoring.loggers import LoggedRun, open_loggers
from open_mythos.train.monitoring.metrics import (
    JsonlLogger,
    LoggerGroup,
    Metrics,
    MetricsLogger,
    event,
    finite,
)
from open_mythos.train.monitoring.monitor import Monitor
from open_mythos.train.monitoring.validated import depth_record, depths_to_validate
from open_mythos.train.outcomes import Outcomes
from open_mythos.train.parallel.process_group import first_decides, merge_over_ranks
from open_mythos.train.signals import PreemptedError, StopRequest
from open_mythos.train.state import BatchLoader, StepResult, TrainState
from open_mythos.train.step import Stepper

logger = logging.getLogger(__name__)

Evaluate = Callable[[Model, list[int]], Mapping[str, Any]]
"""``evaluate(model, depths) -> metrics``; the model is in evaluation mode, without autograd."""


class Trainer:
    """Trains a looped or a dense model.

    Args:
        model: Moved to the device of the configuration; its halting gate is frozen.
        loader: Batches of ``train.global_batch`` sequences.
        config: The run; validated and copied.
        evaluate: Called every ``train.eval_every`` steps and at the end, with the model and
            ``config.eval_depths``; what it returns is logged under ``"eval/..."``.
        loggers: Receive the metrics, beside ``metrics.jsonl`` in ``train.out_dir``.

    Attributes:
        stepper: The model with its optimizer; takes the steps.
        outcomes: Progress of the run, up to the step before the last, and what is wrong with it.

    Raises:
        ConfigError: The configuration is invalid or describes another model.
    """

    @checked
    def __init__(
        self,
        model: Model,
        loader: BatchLoader,
        config: RunConfig,
        *,
        evaluate: Evaluate | None = None,
        loggers: Sequence[MetricsLogger] = (),
    ) -> None:
        _check_loader(loader)
        self.stepper = Stepper(model, config)
        self.config, self.model = self.stepper.config, self.stepper.model
        self.optimizer = self.stepper.optimizer
        self.loader, self.evaluate = loader, evaluate
        self.monitor = Monitor(self.model, self.config, self.stepper.device, self.stepper.dtype)
        self.validated: dict[str, Any] | None = None
        self.out_dir, self.saver = None, None
        own: list[MetricsLogger] = []
        train, watch = self.config.train, self.config.watch
        if train.out_dir is not None:
            self.out_dir = Path(train.out_dir)
            own = [JsonlLogger(self.out_dir / METRICS_FILE)] if rank() == 0 else []
            run = LoggedRun(self.out_dir, watch.project, self.config.to_dict())
            own += open_loggers(watch.loggers, run)
            folder = self.out_dir / CHECKPOINTS_FOLDER
            self.saver = Saver(folder, train.keep, background=train.async_save)
        self.logger = LoggerGroup([*own, *loggers])
        self.outcomes = Outcomes(self.config, self.monitor, self.logger, self.saver)

    @property
    def state(self) -> TrainState:
        """Progress up to the last step, whose outcome this waits for."""
        self.outcomes.read()
        return self.outcomes.state

    def fit(self) -> TrainState:
        """Train until ``train.steps`` steps are done, then evaluate and save.

        SIGINT and SIGTERM let the step finish, save, and raise :class:`PreemptedError`; without an
        ``out_dir`` they act as usual. One signal to one process stops all of them.

        Whether a step calls for a rollback is decided after the next one is queued, or before a
        checkpoint is saved; logging more often changes nothing.

        Raises:
            PreemptedError: The run was told to stop, and has saved.
            DivergedError: The loss spiked or stayed non-finite, and rolling back did not help.
            EnvironmentError_: Checkpoints cannot be written; found out before the first step where
                possible.
        """
        train = self.config.train
        saving = nullcontext() if self.saver is None else self.saver
        stop = StopRequest(active=self.out_dir is not None)
        before: StepResult | None = None
        with closing(self.logger), saving, stop:
            if self.saver is not None and self.outcomes.state.step < train.steps:
                self.saver.prepare(self.model, self.optimizer, self._extra())
            while self.outcomes.state.step < train.steps:
                result = self._timed_step()
                trouble = self.outcomes.trouble  # of earlier steps: this one has just been queued
                if before is not None and before.skipped and not self._is_logged(before.step):
                    self._log(before)
                if self._is_logged(result.step):
                    self._log(result)
                before = result
                if not trouble:
                    trouble = self._between_steps(stop)
                if trouble:
                    self._roll_back(trouble)
                    before = None
        return self.state

    def train_step(self, step: int) -> StepResult:
        """Queue optimizer step number ``step``, from 0, on the global batch."""
        batch = self.loader.next_batch(step + self.outcomes.state.left_out)
        train, size = self.config.train, self.stepper.local_batch
        if len(batch) != size or batch.input_ids.shape[1] > train.seq_len:
            raise ConfigError(
                "the loader's batches are not those of the configuration", where="loader",
                value=tuple(batch.input_ids.shape), allowed=f"({size}, at most {train.seq_len})",
                fix="build the loader with train.global_batch and train.seq_len, and with the rank "
                "and world size of this process",
            )  # fmt: skip
        result = self.stepper.take(step, batch, correlation=self._is_logged(step))
        self.outcomes.add(result)
        self.loader.step = self.outcomes.state.data_step
        return result

    def _timed_step(self) -> StepResult:
        """Take the next step; wait for it if it is to be logged, evaluated or saved."""
        start = time.perf_counter()
        result = self.train_step(self.outcomes.state.step)
        step, every = result.step + 1, self.config.train.eval_every
        if self._is_logged(result.step) or _due(step, every) or self._is_saved(step):
            result.wait()
        self.monitor.add(time.perf_counter() - start, result)
        return result

    def _between_steps(self, stop: StopRequest) -> str:
        """Evaluate, save and stop, where due; return trouble instead, if there is any."""
        step, last = self.outcomes.state.step, self.outcomes.state.step == self.config.train.steps
        saved = self._is_saved(step)
        if saved and (trouble := self._trouble()):
            return trouble
        if last or _due(step, self.config.train.eval_every):
            self._evaluate(last)
        stopping = self._stopping(stop)
        if stopping and (trouble := self._trouble()):
            return trouble
        if self.saver is not None and (saved or stopping):
            self.save(wait=last or bool(stopping))
        if stopping and not last:
            self.logger.log(step, event("preempted", signal=stopping))
            raise PreemptedError(
                f"stopped by {stopping} after step {step}; a checkpoint was saved",
                where=str(self.out_dir), value=stopping, allowed="a whole run",
                fix="resume from it to continue bit for bit",
            )  # fmt: skip
        return ""

    def _trouble(self) -> str:
        """Return why the present state must not be saved, "" if nothing is wrong with it."""
        return self.outcomes.read() or spoilt(self.model, self.optimizer, self._extra())

    def _roll_back(self, trouble: str) -> None:
        """Restore the newest checkpoint and skip the batches since.

        Raises:
            DivergedError: There is none, or ``watch.max_rewinds`` is reached.
        """
        before = self.state
        if self.saver is not None and before.rewinds < self.config.watch.max_rewinds:
            self.saver.wait()
            if checkpoints(self.saver.directory):
                self._restore("latest", strict=False)
                state = self.outcomes.state
                state.rewinds = before.rewinds + 1
                state.left_out = before.left_out + before.step - state.step
                self.loader.step = state.data_step
                self.logger.log(before.step, event("rewound", to=state.step, why=trouble))
                message = "rolled back from step %d to %d: %s"
                logger.warning(message, before.step, state.step, trouble)
                return
        # without a rollback: write what is needed to find the cause
        state = before
        self.logger.log(state.step, event("stopped", why=trouble))
        where = f"step {state.step}"
        data = self.loader.state_dict()  # a collective call
        if self.out_dir is not None and rank() == 0:
            bundle = self.out_dir / f"diverged_step_{state.step:08d}.json"
            facts = {
                "why": trouble, "state": asdict(state), "watch": self.monitor.state_dict(),
                "data": data, "config": self.config.to_dict(), "torch": torch.__version__,
            }  # fmt: skip
            write_text(bundle, as_json(finite(facts)))
            where = f"{where}; {bundle}"
        raise DivergedError(
            "training has diverged", where=where, value=trouble,
            allowed=f"{self.config.watch.max_rewinds} rollbacks, {state.rewinds} of them done",
            fix="resume from the last checkpoint with a lower learning rate",
        )  # fmt: skip

    def _stopping(self, stop: StopRequest) -> str:
        """Return the signal that any process received, or ""; raise a background save's error."""
        # read once: a signal after this line belongs to the next step
        mine = 0 if stop.received is None else int(stop.received)
        lost = self.saver is not None and self.saver.failed
        received, failed = over_ranks([mine, lost])
        if self.saver is not None and any(failed):
            self.saver.wait()
        return signal.Signals(int(max(received))).name if any(received) else ""

    def _is_logged(self, step: int) -> bool:
        return step + 1 == self.config.train.steps or _due(step + 1, self.config.train.log_every)

    def _is_saved(self, steps: int) -> bool:
        return steps == self.config.train.steps or _due(steps, self.config.train.save_every)

    def _log(self, result: StepResult) -> None:
        trace, depths_B = merge_over_ranks(result.trace, result.depths)
        step, train = result.step + 1, self.config.train
        metrics: Metrics = {
            "loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm,
            "skipped": int(result.skipped),
        }  # fmt: skip
        if result.balance:
            metrics["balance_loss"] = result.balance
        summary = LoopSummary.of(trace)
        if depths_B is not None:
            detail = _due(step, train.eval_every) or step == train.steps
            metrics |= depth_metrics(depths_B) | summary.metrics(detail)
        metrics |= self.monitor.rates() | {"tokens": self.state.tokens}
        if self.stepper.scale.dynamic:
            metrics["loss_scale"] = self.stepper.scale.scale.item()
        if isinstance(self.model, OpenMythos):
            parallel = self.stepper.parallel
            rho = parallel.look_at(lambda model: model.recurrent.injection.spectral_radius())
            metrics["rho"] = rho.item()
            metrics |= self.monitor.look(step, summary, parallel, result.batch)
        self.logger.log(step, metrics)

    def _evaluate(self, last: bool) -> None:
        if self.evaluate is None:
            return
        found = self._measured(self.config.eval_depths)
        if last and self.stepper.looped and "depths" in found:
            mean = self.config.depth.expected
            rows = self._measured(depths_to_validate(mean))["depths"]
            self.validated = depth_record(rows, mean)
            found = {**found, "validated": self.validated}
        named = {f"eval/{name}": value for name, value in found.items()}
        self.logger.log(self.outcomes.state.step, named)

    def _measured(self, depths: list[int]) -> Mapping[str, Any]:
        """Evaluate at these depths, with the averaged weights where there are any."""
        assert self.evaluate is not None
        stepper = self.stepper
        weights = nullcontext() if stepper.average is None else stepper.average.swap()
        self.model.eval()
        try:
            with weights, autocast(stepper.device, stepper.dtype):
                return stepper.parallel.look_at(self.evaluate, depths)
        finally:
            self.model.train()

    def save(self, *, wait: bool = True) -> Path:
        """Write a checkpoint of the present state; return its folder.

        Args:
            wait: With ``train.async_save``, whether to return only when it is on the disk.

        Raises:
            ConfigError: There is no ``train.out_dir``.
            DivergedError: A tensor is not finite; checkpoints are untouched.
            EnvironmentError_: It cannot be written.
        """
        saver = self._saver()
        if why := spoilt(self.model, self.optimizer, self._extra()):
            raise DivergedError(
                "the state is not finite and is not saved", where=f"step {self.state.step}",
                value=why, allowed="finite weights and moments",
                fix="resume from the last checkpoint with a lower learning rate",
            )  # fmt: skip
        progress, scale = self.state, self.stepper.scale
        state = {
            "train": asdict(progress), "data": self.loader.state_dict(),
            "watch": self.monitor.state_dict(), "loss_scale": scale.state_dict(),
            "validated_depths": self.validated, "config": self.config.to_dict(),
            "world_size": world_size(), "torch": torch.__version__,
        }  # fmt: skip
        return saver.save(
            progress.step, self.model, self.optimizer, finite(state), extra=self._extra(), wait=wait
        )

    def resume(
        self, source: str | Path = "latest", *, strict: bool = False, allow: Sequence[str] = ()
    ) -> TrainState:
        """Continue from a checkpoint; call it before :meth:`fit`.

        Args:
            source: "latest" (in ``train.out_dir``), a checkpoint, or the folder of another run.
            strict: Reject a damaged newest checkpoint instead of falling back to an older one.
            allow: Fields such as "optim.lr" that may differ from the saved configuration, beside
                those of :data:`open_mythos.train.checkpoint.config_changes.MAY_CHANGE`.

        Raises:
            DataError: There is no whole checkpoint, or it is of another model or other data.
            ConfigError: The configuration differs; names each field.
        """
        self._restore(source, strict, allow)
        self.logger.log(self.outcomes.state.step, event("resumed", processes=world_size()))
        return self.outcomes.state

    def _restore(self, source: str | Path, strict: bool, allow: Sequence[str] = ()) -> None:
        folder = self._saver().directory if source == "latest" else Path(source)
        path = first_decides(lambda: find_checkpoint(folder, strict))
        state = read_state(path)
        with state_read(path):
            progress = TrainState.of(state["train"], int(path.name.split(".")[0][5:]))
            reject_changes(state["config"], self.config.to_dict(), allow)
            self.loader.load_state_dict(state["data"])
            extra = self._extra() if holds_file(path, AVERAGE_FILE) else {}
            load_checkpoint(path, self.model, self.optimizer, extra)
            if self.stepper.average is not None and not extra:
                self.stepper.average.restart()
            self.monitor.load_state_dict(state["watch"])
            self.stepper.scale.load_state_dict(state["loss_scale"])
            self.validated = state["validated_depths"]
            self.outcomes.restart(progress)

    def _extra(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint beside weights and optimizer state, by file."""
        average = self.stepper.average
        return {} if average is None else {AVERAGE_FILE: average.state_dict()}

    def _saver(self) -> Saver:
        if self.saver is None:
            raise ConfigError(
                "there is nowhere to keep checkpoints", where="train.out_dir", value=None,
                allowed="a folder",
            )  # fmt: skip
        return self.saver


def _check_loader(loader: Any) -> None:
    wanted = ("next_batch", "state_dict", "load_state_dict")
    missing = [name for name in wanted if not callable(getattr(loader, name, None))]
    if missing:
        raise ConfigError(
            f"the loader has no {', '.join(missing)}", where="loader", value=type(loader).__name__,
            allowed="open_mythos.data.Loader, or an object with its methods: the batch of a step "
            "must be a function of the step, so that a run can resume",
            fix="prepare the text, and pass Loader(TokenShards(folder), ...)",
        )  # fmt: skip


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
