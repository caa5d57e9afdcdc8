"""One optimizer step, from a batch to changed weights, in one process or in many.

A step is a pure function of the weights, the moments, the configuration and its number: depths,
dropout and initial states are keyed by it.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from open_mythos.devices import autocast, to_device, training_dtype
from open_mythos.distributed import over_ranks, world_size
from open_mythos.errors import ConfigError
from open_mythos.inference.quantization import is_quantized
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.seeding import derive_seed
from open_mythos.train.build import Model
from open_mythos.train.config import RunConfig, TrainConfig
from open_mythos.train.depth import DepthPlan
from open_mythos.train.loss import count_targets, next_token_loss
from open_mythos.train.monitoring.metrics import merge_trace
from open_mythos.train.optimizers.ema import WeightAverage
from open_mythos.train.optimizers.gradients import gradient_norm, scale_gradients
from open_mythos.train.optimizers.loss_scale import LossScale
from open_mythos.train.optimizers.optim import build_optimizer, freeze_halting_gate
from open_mythos.train.optimizers.schedule import learning_rate
from open_mythos.train.parallel.parallelize import parallelize
from open_mythos.train.parallel.process_group import device_of_process, sum_loads
from open_mythos.train.state import StepCounts, StepResult, TokenBatch


class TrainStep:
    """A model with all that changes its weights.

    Args:
        model: Moved to the device of the configuration; its halting gate is frozen.
        config: The run; validated and copied.

    Raises:
        ConfigError: The configuration is invalid, describes another model, or does not fit the
            number of processes.
    """

    def __init__(self, model: Model, config: RunConfig) -> None:
        config.validate()
        self.config = deepcopy(config)
        self.looped = isinstance(model, OpenMythos)
        _check_model(model, self.config)
        self.device = device_of_process(config.train.device)
        self.dtype = training_dtype(config.train.dtype, self.device)
        self.local_batch = _local_batch(self.config.train)
        self.model: Model = model.to(self.device)
        freeze_halting_gate(self.model)
        self.parallel = parallelize(self.model, self.config)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = self.new_average()
        self.scale = LossScale() if self.dtype == torch.float16 else LossScale.off()
        self.plan = DepthPlan(config.depth, config.train.seed)

    def take_step(self, step: int, batch: TokenBatch, *, correlation: bool = False) -> StepResult:
        """One optimizer step, in micro-batches.

        Args:
            step: Its number, from 0.
            batch: This process's part of the global batch.
            correlation: Also measure how alike the tokens' states become.
        """
        depths_B = self.plan.depths(step, batch.sample_index) if self.looped else None
        counts = self._counts(batch, depths_B)
        loss, balance, trace = self._forward_backward(batch, depths_B, step, counts, correlation)
        self.parallel.finish_gradients()
        norm = gradient_norm(self.parameters) / self.scale.scale
        # the one decision of the step, taken by all processes before anything is changed
        proceed = bool(torch.isfinite(loss) & torch.isfinite(norm))
        lr = learning_rate(step, self.config.train, self.config.optim)
        if proceed:
            scale_gradients(self.parameters, self._clipping(norm))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.model.update_router_bias(trace, self.config.train.balance_speed)
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        gave_way = self.scale.update(overflowed=not proceed)
        return StepResult(
            loss.item(), balance.item(), lr, norm.item(), not proceed, gave_way, counts,
            batch.input_ids.shape[1], depths_B, trace,
        )  # fmt: skip

    def _counts(self, batch: TokenBatch, depths_B: Tensor | None) -> StepCounts:
        """What the step has in all processes together."""
        low, high = (0, 0) if depths_B is None else (int(depths_B.min()), int(depths_B.max()))
        tokens, lows, highs = over_ranks([count_targets(batch.targets), low, high], self.device)
        return StepCounts(int(sum(tokens)), int(min(lows)), int(max(highs)))

    def _clipping(self, norm: Tensor) -> Tensor:
        """What to multiply gradients with: their norm is at most ``train.clip`` then."""
        return (self.config.train.clip / (norm + 1e-6)).clamp(max=1.0) / self.scale.scale

    def _forward_backward(
        self,
        batch: TokenBatch,
        depths_B: Tensor | None,
        step: int,
        counts: StepCounts,
        correlation: bool,
    ) -> tuple[Tensor, Tensor, LoopTrace]:
        """Gradients of the step's loss; returns loss, balance loss and what the loops did."""
        train = self.config.train
        zero = torch.zeros((), device=self.device)
        loss, balance, total = zero, zero, LoopTrace()
        parts = batch.split(len(batch) // min(train.micro_batch or len(batch), len(batch)))
        depths = [None] * len(parts) if depths_B is None else depths_B.chunk(len(parts))
        for number, (part, depth) in enumerate(zip(parts, depths, strict=True), start=1):
            trace = LoopTrace(
                keep_routing=train.balance_coefficient > 0, keep_correlation=correlation
            )
            loops = Depth(
                depth,
                grad_loops=self.config.grad_loops,
                min_loops=counts.max_depth if self.parallel.keep_step else 0,
            )
            here = part.to(self.device)
            with autocast(self.device, self.dtype):
                out = self.parallel.train_on(
                    next_token_loss, last=number == len(parts),
                    input_ids=here.input_ids, targets=here.targets,
                    step_tokens=counts.tokens, step_sequences=train.global_batch,
                    document_ids=here.document_ids,
                    sample_seeds=self._sample_seeds(step, part.sample_index),
                    balance_coefficient=train.balance_coefficient, depth=loops, trace=trace,
                )  # fmt: skip
            (out.total * self.scale.scale if self.scale.dynamic else out.total).backward()
            loss, balance = loss + out.nll, balance + out.balance
            merge_trace(total, trace)
        if world_size() > 1:
            loss, balance = (
                torch.tensor(sum(each), device=self.device)
                for each in over_ranks([loss.item(), balance.item()], self.device)
            )
            sum_loads(total, counts.max_depth, self.model)
        return loss, balance, total

    def _sample_seeds(self, step: int, sample_index_B: Tensor) -> Tensor:
        seed = self.config.train.seed
        seeds = [derive_seed(seed, "sample", step, i) for i in sample_index_B.tolist()]
        return to_device(torch.tensor(seeds), self.device)

    def new_average(self) -> WeightAverage | None:
        """An average that begins with the present weights; None where none is wanted."""
        decay = self.config.optim.ema_decay
        return WeightAverage(self.model, decay, self.parallel.outermost) if decay else None


def _local_batch(train: TrainConfig) -> int:
    """Sequences of a step that this process computes."""
    local, rest = divmod(train.global_batch, world_size())
    micro = min(train.micro_batch or local, local)
    if rest or local % max(1, micro):
        raise ConfigError(
            "the batch does not divide", where="train.global_batch", value=train.global_batch,
            allowed=f"a multiple of {world_size()} processes, each part one of train.micro_batch "
            f"({train.micro_batch})",
        )  # fmt: skip
    return local


def _check_model(model: Model, config: RunConfig) -> None:
    if is_quantized(model):
        raise ConfigError(
            "a quantised model cannot be trained", where="Trainer(model, config)",
            value=type(model).__name__, allowed="a model as it was before quantize()",
            fix="load the model again",
        )  # fmt: skip
    looped = isinstance(model, OpenMythos)
    if looped != (config.architecture == "looped") or (looped and model.cfg != config.model):
        raise ConfigError(
            "the model is not that of the configuration", where="Trainer(model, config)",
            value=f"{type(model).__name__} of {model.cfg}",
            allowed=f'architecture "{config.architecture}" of {config.model}',
            fix="build it with open_mythos.train.build_model(config)",
        )  # fmt: skip
