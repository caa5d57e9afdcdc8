"""The training loop. ``train_step`` is one optimizer step; ``fit`` repeats it, logs and saves.

A step is a pure function of the weights, the moments, the configuration and its number: data,
depths, dropout and initial states are keyed by it. So a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from open_mythos.devices import autocast
from open_mythos.distributed import over_ranks, rank, world_size
from open_mythos.errors import ConfigError, MythosError
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE
from open_mythos.train.build import Model
from open_mythos.train.checkpoint import snapshot
from open_mythos.train.checkpoint.manifest import as_json
from open_mythos.train.checkpoint.restore import holds_file, restore
from open_mythos.train.checkpoint.resume import refuse_changes
from open_mythos.train.checkpoint.saver import Saver
from open_mythos.train.checkpoint.snapshot import checkpoints
from open_mythos.train.config import RunConfig
from open_mythos.train.monitoring.loggers import LoggedRun, open_loggers
from open_mythos.train.monitoring.metrics import (
    JsonlLogger,
    LoggerGroup,
    MetricsLogger,
    event,
    finite,
)
from open_mythos.train.monitoring.monitor import Watch
from open_mythos.train.monitoring.validated import depth_record, depths_to_validate
from open_mythos.train.optimizers.ema import AVERAGE_FILE
from open_mythos.train.optimizers.loss_scale import LossScale
from open_mythos.train.parallel.process_group import (
    first_decides,
    merge_over_ranks,
)
from open_mythos.train.signals import PreemptedError, StopRequest
from open_mythos.train.state import BatchLoader, StepResult, TokenBatch, TrainState
from open_mythos.train.step import TrainStep

logger = logging.getLogger(__name__)

Evaluate = Callable[[Model, list[int]], Mapping[str, Any]]
"""``evaluate(model, depths) -> metrics``; the model is in evaluation mode, without autograd."""


class DivergedError(MythosError):
    """The loss spiked or stayed non-finite, and going back to a checkpoint did not help."""


class Trainer(TrainStep):
    """Trains a looped or a dense model.

    Args:
        model: Moved to the device of the configuration; its halting gate is frozen.
        loader: Batches of ``train.global_batch`` sequences.
        config: The run; validated and copied.
        evaluate: Called every ``train.eval_every`` steps and at the end, with the model and
            ``config.eval_depths``; what it returns is logged under ``"eval/..."``.
        loggers: Receive the metrics, beside ``metrics.jsonl`` in ``train.out_dir``.

    Raises:
        ConfigError: The configuration is invalid or describes another model.
    """

    def __init__(
        self,
        model: Model,
        loader: BatchLoader,
        config: RunConfig,
        *,
        evaluate: Evaluate | None = None,
        loggers: Sequence[MetricsLogger] = (),
    ) -> None:
        super().__init__(model, config)
        self.loader, self.evaluate = loader, evaluate
        self.state = TrainState()
        self.watch = Watch(self.model, self.config, self.device, self.dtype)
        self.validated: dict[str, Any] | None = None
        self.out_dir = None if config.train.out_dir is None else Path(config.train.out_dir)
        self.logger = LoggerGroup([*self._own_loggers(), *loggers])
        self.saver = None
        if self.out_dir is not None:
            folder = self.out_dir / CHECKPOINTS_FOLDER
            self.saver = Saver(folder, config.train.keep, background=config.train.async_save)

    def fit(self) -> TrainState:
        """Train until ``train.steps`` steps are done, then evaluate and save.

        SIGINT and SIGTERM let the step finish, save, and raise :class:`PreemptedError`; without an
        ``out_dir`` they act as usual. One signal to one process stops all of them.

        Raises:
            PreemptedError: The run was told to stop, and has saved.
            DivergedError: The loss spiked or stayed non-finite, and going back did not help.
            EnvironmentError_: Checkpoints cannot be written; found out before the first step where
                possible.
        """
        train = self.config.train
        saving = nullcontext() if self.saver is None else self.saver
        stop = StopRequest(active=self.out_dir is not None)
        with closing(self.logger), saving, stop:
            if self.saver is not None and self.state.step < train.steps:
                self.saver.prepare(self.model, self.optimizer, self._extra())
            while self.state.step < train.steps:
                start = time.perf_counter()
                result = self.train_step(self.state.step)
                self.watch.add(time.perf_counter() - start, result, self.local_batch)
                step, last = self.state.step, self.state.step == train.steps
                if last or _due(step, train.log_every) or result.skipped:
                    self._log(result)
                trouble = self._trouble(result)
                if trouble:
                    self._rewind(trouble)
                    continue
                if last or _due(step, train.eval_every):
                    self._evaluate(last)
                stopping = self._stopping(stop)
                due = last or stopping or _due(step, train.save_every)
                if due and self.saver is not None:
                    self.save(wait=last or bool(stopping))
                if stopping and not last:
                    self.logger.log(step, event("preempted", signal=stopping))
                    raise PreemptedError(
                        f"stopped by {stopping} after step {step}; a checkpoint was saved",
                        where=str(self.out_dir), fix="resume from it to continue bit for bit",
                    )  # fmt: skip
        return self.state

    def train_step(self, step: int) -> StepResult:
        """One optimizer step: the whole global batch, in micro-batches.

        Args:
            step: Its number, from 0; with the weights it decides everything.
        """
        self._batch = self._fetch(step)
        result = self.take_step(step, self._batch, correlation=self._is_logged(step))
        self.state.advance(result)
        self.loader.step = self.state.data_step
        return result

    def _fetch(self, step: int) -> TokenBatch:
        batch = self.loader.next_batch(step + self.state.left_out)
        train = self.config.train
        if len(batch) != self.local_batch or batch.input_ids.shape[1] > train.seq_len:
            raise ConfigError(
                "the loader's batches are not those of the configuration", where="loader",
                value=tuple(batch.input_ids.shape),
                allowed=f"({self.local_batch}, at most {train.seq_len})",
                fix="build the loader with train.global_batch and train.seq_len, and with the rank "
                "and world size of this process",
            )  # fmt: skip
        return batch

    def _trouble(self, result: StepResult) -> str:
        """What is wrong with the run after this step; "" if nothing is."""
        skips, allowed = self.state.skips, self.config.train.max_skips
        if skips > allowed:
            return (
                f"{skips} steps in a row had a loss or gradient that is not finite "
                f"(train.max_skips = {allowed})"
            )
        spike = self.watch.spike(self.state.step, result.loss)
        if spike is None or self.saver is None:
            return ""
        if self.config.watch.max_rewinds and checkpoints(self.saver.directory):
            return str(spike)
        # with nothing to go back to, going on is the better choice: many a loss comes down again
        logger.warning("%s", spike)
        return ""

    def _rewind(self, trouble: str) -> None:
        """Go back to the newest checkpoint, and leave out the batches since.

        Raises:
            DivergedError: There is none, or the run has gone back often enough.
        """
        before = self.state
        if self.saver is not None and before.rewinds < self.config.watch.max_rewinds:
            self.saver.wait()
            if checkpoints(self.saver.directory):
                self._restore("latest", strict=False)
                self.state.rewinds = before.rewinds + 1
                self.state.left_out = before.left_out + before.step - self.state.step
                self.loader.step = self.state.data_step
                self.logger.log(before.step, event("rewound", to=self.state.step, why=trouble))
                logger.warning("back from step %d to %d: %s", before.step, self.state.step, trouble)
                return
        self._give_up(trouble)

    def _give_up(self, trouble: str) -> NoReturn:
        """Leave what is needed to find out why, and stop."""
        self.logger.log(self.state.step, event("stopped", why=trouble))
        where = f"step {self.state.step}"
        data = self.loader.state_dict()  # of all processes, which ask for it together
        if self.out_dir is not None and rank() == 0:
            bundle = self.out_dir / f"diverged_step_{self.state.step:08d}.json"
            facts = {"why": trouble, "state": asdict(self.state), "watch": self.watch.state_dict(),
                     "data": data, "config": self.config.to_dict(),
                     "torch": torch.__version__}  # fmt: skip
            bundle.write_text(as_json(finite(facts)), encoding="utf-8")
            where = f"{where}; {bundle}"
        raise DivergedError(
            "training has diverged", where=where, value=trouble,
            allowed=f"{self.config.watch.max_rewinds} rewinds, {self.state.rewinds} of them done",
            fix="resume from the last checkpoint with a lower learning rate",
        )  # fmt: skip

    def _stopping(self, stop: StopRequest) -> str:
        """The signal by which any process was told to stop; "" if none was.

        Raises:
            EnvironmentError_: A background save has failed.
        """
        # read once: a signal after this line belongs to the next step
        mine = 0 if stop.received is None else int(stop.received)
        lost = self.saver is not None and self.saver.failed
        received, failed = over_ranks([mine, lost], self.device)
        if self.saver is not None and any(failed):
            self.saver.wait()
        return signal.Signals(int(max(received))).name if any(received) else ""

    def _is_logged(self, step: int) -> bool:
        """Whether metrics of step number ``step`` will be logged."""
        return step + 1 == self.config.train.steps or _due(step + 1, self.config.train.log_every)

    def _log(self, result: StepResult) -> None:
        trace, depths_B = merge_over_ranks(result.trace, result.depths)
        result = replace(result, trace=trace, depths=depths_B)
        step = self.state.step
        train = self.config.train
        detail = _due(step, train.eval_every) or step == train.steps
        metrics = result.metrics(detail) | self.watch.rates() | {"tokens": self.state.tokens}
        if self.scale.dynamic:
            metrics["loss_scale"] = self.scale.scale
        if isinstance(self.model, OpenMythos):
            metrics["rho"] = self.parallel.look_at(_spectral_radius)
            metrics |= self.watch.look(step, result.figures, self.parallel, self._batch)
        self.logger.log(step, metrics)

    def _evaluate(self, last: bool) -> None:
        if self.evaluate is None:
            return
        found = self._measured(self.config.eval_depths)
        if last and self.looped and "depths" in found:
            mean = self.config.depth.expected
            rows = self._measured(depths_to_validate(mean))["depths"]
            self.validated = depth_record(rows, mean)
            found = {**found, "validated": self.validated}
        self.logger.log(self.state.step, {f"eval/{name}": value for name, value in found.items()})

    def _measured(self, depths: list[int]) -> Mapping[str, Any]:
        """What ``evaluate`` finds at these depths, with the averaged weights where there are."""
        assert self.evaluate is not None
        weights = nullcontext() if self.average is None else self.average.swap()
        self.model.eval()
        try:
            with weights, autocast(self.device, self.dtype):
                return self.parallel.look_at(self.evaluate, depths)
        finally:
            self.model.train()

    def save(self, *, wait: bool = True) -> Path:
        """Write a checkpoint of the present state; returns its folder.

        Args:
            wait: With ``train.async_save``, whether to return only when it is on the disk.

        Raises:
            ConfigError: There is no ``train.out_dir``.
            EnvironmentError_: It cannot be written.
        """
        state = {
            "train": asdict(self.state),
            "data": self.loader.state_dict(),
            "watch": self.watch.state_dict(),
            "loss_scale": asdict(self.scale),
            "validated_depths": self.validated,
            "config": self.config.to_dict(),
            "world_size": world_size(),
            "torch": torch.__version__,
        }
        return self._saver().save(
            self.state.step, self.model, self.optimizer, finite(state), extra=self._extra(),
            wait=wait,
        )  # fmt: skip

    def resume(
        self, source: str | Path = "latest", *, strict: bool = False, allow: Sequence[str] = ()
    ) -> TrainState:
        """Continue from a checkpoint; call it before :meth:`fit`.

        Args:
            source: "latest" (in ``train.out_dir``), a checkpoint, or the folder of another run.
            strict: Refuse a damaged newest checkpoint instead of falling back to an older one.
            allow: Fields such as "optim.lr" that may differ from the saved configuration, beside
                those of :data:`open_mythos.train.checkpoint.resume.MAY_CHANGE`.

        Raises:
            DataError: There is no whole checkpoint, or it is of another model or other data.
            ConfigError: The configuration differs; names each field.
        """
        self._restore(source, strict, allow)
        self.logger.log(self.state.step, event("resumed", processes=world_size()))
        return self.state

    def _restore(self, source: str | Path, strict: bool, allow: Sequence[str] = ()) -> None:
        folder = self._saver().directory if source == "latest" else Path(source)
        path = first_decides(lambda: snapshot.find_checkpoint(folder, strict))
        state = snapshot.read_state(path)
        refuse_changes(state["config"], self.config.to_dict(), allow)
        self.loader.load_state_dict(state["data"])
        extra = self._extra() if holds_file(path, AVERAGE_FILE) else {}
        restore(path, self.model, self.optimizer, extra)
        if extra and self.average is not None:
            self.average.load_state_dict(extra[AVERAGE_FILE])
        else:
            self.average = self.new_average()
        self.watch.load_state_dict(state["watch"])
        self.scale = LossScale(**state["loss_scale"])
        self.validated = state["validated_depths"]
        self.state = TrainState(**state["train"])

    def _extra(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint beside weights and moments, by file."""
        return {} if self.average is None else {AVERAGE_FILE: self.average.state_dict()}

    def _own_loggers(self) -> list[MetricsLogger]:
        if self.out_dir is None:
            return []
        watch = self.config.watch
        run = LoggedRun(self.out_dir, watch.project, self.config.to_dict())
        files = [JsonlLogger(self.out_dir / METRICS_FILE)] if rank() == 0 else []
        return [*files, *open_loggers(watch.loggers, run)]

    def _saver(self) -> Saver:
        if self.saver is None:
            raise ConfigError(
                "there is nowhere to keep checkpoints", where="train.out_dir", value=None,
                allowed="a folder",
            )  # fmt: skip
        return self.saver


def _spectral_radius(model: OpenMythos) -> float:
    return model.recurrent.injection.spectral_radius().item()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
