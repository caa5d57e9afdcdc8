"""The training loop. ``train_step`` is one optimizer step; ``fit`` repeats it, logs and saves.

A step is a pure function of the weights, the moments, the configuration and its number: data,
depths, dropout and initial states are keyed by it. So a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from open_mythos.errors import ConfigError, MythosError
from open_mythos.model import OpenMythos
from open_mythos.runtime import autocast, derive_seed, resolve_device, resolve_dtype
from open_mythos.trace import LoopTrace
from open_mythos.train import checkpoint
from open_mythos.train.build import Model
from open_mythos.train.config import RunConfig
from open_mythos.train.depth import DepthPlan
from open_mythos.train.loss import count_targets, next_token_loss
from open_mythos.train.metrics import (
    JsonlLogger,
    LoggerGroup,
    MetricsLogger,
    merge_trace,
)
from open_mythos.train.optim import build_optimizer, freeze_halting_gate
from open_mythos.train.parallel import apply_activation_checkpointing
from open_mythos.train.resume import refuse_changes
from open_mythos.train.schedule import learning_rate
from open_mythos.train.signals import PreemptedError, StopRequest
from open_mythos.train.state import BatchLoader, StepResult, TokenBatch, TrainState

METRICS_FILE = "metrics.jsonl"

Evaluate = Callable[[Model, list[int]], Mapping[str, Any]]
"""``evaluate(model, depths) -> metrics``; the model is in evaluation mode, without autograd."""


class DivergedError(MythosError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Trainer:
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
        config.validate()
        self.config = deepcopy(config)
        self.looped = isinstance(model, OpenMythos)
        _check_model(model, self.config)
        self.device = resolve_device(config.train.device)
        self.dtype = resolve_dtype(config.train.dtype)
        self.model: Model = model.to(self.device)
        freeze_halting_gate(self.model)
        if config.train.checkpoint_loops and isinstance(self.model, OpenMythos):
            apply_activation_checkpointing(self.model)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.plan = DepthPlan(config.depth, config.train.seed)
        self.loader, self.evaluate = loader, evaluate
        self.state = TrainState()
        self.out_dir = None if config.train.out_dir is None else Path(config.train.out_dir)
        files = [] if self.out_dir is None else [JsonlLogger(self.out_dir / METRICS_FILE)]
        self.logger = LoggerGroup([*files, *loggers])

    def fit(self) -> TrainState:
        """Train until ``train.steps`` steps are done, then evaluate and save.

        SIGINT and SIGTERM let the step finish, save, and raise :class:`PreemptedError`; without an
        ``out_dir`` they act as usual.

        Raises:
            PreemptedError: The run was told to stop, and has saved.
            DivergedError: More than ``train.max_skips`` steps in a row were not finite.
        """
        train = self.config.train
        seconds, tokens = 0.0, 0
        with StopRequest(active=self.out_dir is not None) as stop:
            while self.state.step < train.steps:
                start = time.perf_counter()
                result = self.train_step(self.state.step)
                seconds, tokens = seconds + time.perf_counter() - start, tokens + result.tokens
                step, last = self.state.step, self.state.step == train.steps
                if last or _due(step, train.log_every):
                    self._log(result, tokens / seconds)
                    seconds, tokens = 0.0, 0
                if last or _due(step, train.eval_every):
                    self._evaluate()
                # read once: a signal after this line belongs to the next step
                stopping = stop.received
                if self.out_dir and (last or stopping or _due(step, train.save_every)):
                    self.save()
                if stopping and not last:
                    raise PreemptedError(
                        f"stopped by {stopping.name} after step {step}; a checkpoint was saved",
                        where=str(self.out_dir), fix="resume from it to continue bit for bit",
                    )  # fmt: skip
        return self.state

    def train_step(self, step: int) -> StepResult:
        """One optimizer step: the whole global batch, in micro-batches.

        Args:
            step: Its number, from 0; with the weights it decides everything.
        """
        batch = self._fetch(step)
        depths_B = self.plan.depths(step, batch.sample_index) if self.looped else None
        tokens = count_targets(batch.targets)
        loss, balance, trace = self._forward_backward(batch, depths_B, step, tokens)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # the one decision of the step, taken before anything is changed
        proceed = bool(torch.isfinite(loss) & torch.isfinite(norm))
        lr = learning_rate(step, self.config.train, self.config.optim)
        if proceed:
            clip_grads_with_norm_(self.parameters, self.config.train.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.model.update_router_bias(trace, self.config.train.balance_speed)
        self.optimizer.zero_grad(set_to_none=True)
        self._advance(step, tokens, depths_B, skipped=not proceed)
        return StepResult(
            loss.item(), balance.item(), lr, norm.item(), not proceed, tokens, depths_B, trace
        )

    def _forward_backward(
        self, batch: TokenBatch, depths_B: Tensor | None, step: int, tokens: int
    ) -> tuple[Tensor, Tensor, LoopTrace]:
        """Gradients of the step's loss; returns loss, balance loss and what the loops did."""
        train = self.config.train
        zero = torch.zeros((), device=self.device)
        loss, balance, total = zero, zero, LoopTrace()
        parts = batch.split(len(batch) // (train.micro_batch or len(batch)))
        depths = [None] * len(parts) if depths_B is None else depths_B.chunk(len(parts))
        for part, depth in zip(parts, depths, strict=True):
            trace = LoopTrace(keep_routing=train.balance_coefficient > 0)
            loop = {"n_loops": depth, "grad_loops": self.config.grad_loops, "trace": trace}
            here = part.to(self.device)
            with autocast(self.device, self.dtype):
                out = next_token_loss(
                    self.model, here.input_ids, here.targets,
                    step_tokens=tokens, step_sequences=len(batch),
                    document_ids=here.document_ids,
                    sample_seeds=self._sample_seeds(step, part.sample_index),
                    balance_coefficient=train.balance_coefficient, **(loop if self.looped else {}),
                )  # fmt: skip
            out.total.backward()
            loss, balance = loss + out.nll, balance + out.balance
            merge_trace(total, trace)
        return loss, balance, total

    def _fetch(self, step: int) -> TokenBatch:
        batch, train = self.loader.next_batch(step), self.config.train
        if len(batch) != train.global_batch or batch.input_ids.shape[1] > train.seq_len:
            raise ConfigError(
                "the loader's batches are not those of the configuration", where="loader",
                value=tuple(batch.input_ids.shape),
                allowed=f"({train.global_batch}, at most {train.seq_len})",
                fix="build the loader with train.global_batch and train.seq_len",
            )  # fmt: skip
        return batch

    def _sample_seeds(self, step: int, sample_index_B: Tensor) -> Tensor:
        seed = self.config.train.seed
        seeds = [derive_seed(seed, "sample", step, i) for i in sample_index_B.tolist()]
        return torch.tensor(seeds, device=self.device)

    def _advance(self, step: int, tokens: int, depths_B: Tensor | None, skipped: bool) -> None:
        self.state.advance(tokens, depths_B, skipped)
        self.loader.step = self.state.step
        if self.state.skips > self.config.train.max_skips:
            raise DivergedError(
                "loss or gradient stayed non-finite", where=f"step {step}", value=self.state.skips,
                allowed=f"train.max_skips = {self.config.train.max_skips} such steps in a row",
                fix="resume from the last checkpoint with a lower learning rate",
            )  # fmt: skip

    def _log(self, result: StepResult, tokens_per_second: float) -> None:
        metrics = result.metrics() | {
            "tokens": self.state.tokens,
            "tokens_per_second": tokens_per_second,
        }
        if isinstance(self.model, OpenMythos):
            metrics["rho"] = self.model.recurrent.injection.spectral_radius().item()
        self.logger.log(self.state.step, metrics)

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        try:
            with torch.no_grad(), autocast(self.device, self.dtype):
                found = self.evaluate(self.model, self.config.eval_depths)
        finally:
            self.model.train()
        self.logger.log(self.state.step, {f"eval/{name}": value for name, value in found.items()})

    def save(self) -> Path:
        """Write a checkpoint of the present state; returns its folder.

        Raises:
            ConfigError: There is no ``train.out_dir``.
            EnvironmentError_: It cannot be written.
        """
        state = {
            "train": asdict(self.state),
            "data": self.loader.state_dict(),
            "config": self.config.to_dict(),
            "torch": torch.__version__,
        }
        return checkpoint.save_checkpoint(
            self._checkpoints(), self.state.step, self.model, self.optimizer, state,
            self.config.train.keep,
        )  # fmt: skip

    def resume(
        self, source: str | Path = "latest", *, strict: bool = False, allow: Sequence[str] = ()
    ) -> TrainState:
        """Continue from a checkpoint; call it before :meth:`fit`.

        Args:
            source: "latest" (in ``train.out_dir``), a checkpoint, or the folder of another run.
            strict: Refuse a damaged newest checkpoint instead of falling back to an older one.
            allow: Fields such as "optim.lr" that may differ from the saved configuration, beside
                those of :data:`open_mythos.train.resume.MAY_CHANGE`.

        Raises:
            DataError: There is no whole checkpoint, or it is of another model or other data.
            ConfigError: The configuration differs; names each field.
        """
        folder = self._checkpoints() if source == "latest" else Path(source)
        path = checkpoint.find_checkpoint(folder, strict)
        state = checkpoint.read_state(path)
        refuse_changes(state["config"], self.config.to_dict(), allow)
        self.loader.load_state_dict(state["data"])
        checkpoint.load_checkpoint(path, self.model, self.optimizer)
        self.state = TrainState(**state["train"])
        return self.state

    def _checkpoints(self) -> Path:
        if self.out_dir is None:
            raise ConfigError(
                "there is nowhere to keep checkpoints", where="train.out_dir", value=None,
                allowed="a folder",
            )  # fmt: skip
        return self.out_dir / checkpoint.CHECKPOINTS_FOLDER


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_model(model: Model, config: RunConfig) -> None:
    looped = isinstance(model, OpenMythos)
    if looped != (config.architecture == "looped") or (looped and model.cfg != config.model):
        raise ConfigError(
            "the model is not that of the configuration", where="Trainer(model, config)",
            value=f"{type(model).__name__} of {model.cfg}",
            allowed=f'architecture "{config.architecture}" of {config.model}',
            fix="build it with open_mythos.train.build_model(config)",
        )  # fmt: skip
