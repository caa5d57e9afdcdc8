"""One optimizer step, in one process or many.

Depths, dropout and initial states are keyed by the number of the step. Nothing is read back from
the device, which decides whether the step is applied; results are read later.
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
from open_mythos.train.distillation import Teacher
from open_mythos.train.loss import count_targets, next_token_loss
from open_mythos.train.optimizers.ema import WeightAverage
from open_mythos.train.optimizers.gradients import gradient_norm, scale_gradients, step_if
from open_mythos.train.optimizers.loss_scale import LossScale
from open_mythos.train.optimizers.optim import build_optimizer, freeze_halting_gate
from open_mythos.train.optimizers.schedule import learning_rate
from open_mythos.train.parallel.parallelize import parallelize
from open_mythos.train.parallel.process_group import device_of_process, sum_loads, sum_over_ranks
from open_mythos.train.state import StepCounts, StepResult, TokenBatch


class Stepper:
    """A model with its optimizer. Moves the model to its device and freezes its halting gate.

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
        decay = config.optim.ema_decay
        self.average = WeightAverage(self.model, decay, self.parallel.outermost) if decay else None
        self.scale = LossScale(self.device, dynamic=self.dtype == torch.float16)
        self.plan = DepthPlan(config.depth, config.train.seed)
        self.teacher = Teacher.of(config, self.device)

    def take(self, step: int, batch: TokenBatch, *, correlation: bool = False) -> StepResult:
        """Queue optimizer step number ``step``, from 0, on this process's part of the global batch.

        A step whose loss or gradient is not finite changes no weight, optimizer state or average.
        With ``correlation``, also measure the correlation of the tokens' states.
        """
        depths_B = self.plan.depths(step, batch.sample_index) if self.looped else None
        counts = self._counts(batch, depths_B)
        loss, balance, trace = self._forward_backward(batch, depths_B, step, counts, correlation)
        self.parallel.finish_gradients()
        norm = self.scale.unscale(gradient_norm(self.parameters))
        # equal in all processes
        proceed = torch.isfinite(loss) & torch.isfinite(norm)
        lr = learning_rate(step, self.config.train, self.config.optim)
        clipping = (self.config.train.clip / (norm + 1e-6)).clamp(max=1.0)
        scale_gradients(self.parameters, self.scale.unscale(clipping))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        step_if(self.optimizer, proceed)
        self.model.update_router_bias(trace, self.config.train.balance_speed * proceed)
        if self.average is not None:
            self.average.update(proceed)
        self.optimizer.zero_grad(set_to_none=True)
        rescaled = self.scale.update(proceed)
        return StepResult(
            step, batch, lr, counts, depths_B, trace,
            values=StepResult.pack(loss, balance, norm, ~proceed, rescaled),
        )  # fmt: skip

    def _counts(self, batch: TokenBatch, depths_B: Tensor | None) -> StepCounts:
        low, high = (0, 0) if depths_B is None else (int(depths_B.min()), int(depths_B.max()))
        tokens, lows, highs = over_ranks([count_targets(batch.targets), low, high])
        return StepCounts(int(sum(tokens)), int(min(lows)), int(max(highs)))

    def _forward_backward(
        self,
        batch: TokenBatch,
        depths_B: Tensor | None,
        step: int,
        counts: StepCounts,
        correlation: bool,
    ) -> tuple[Tensor, Tensor, LoopTrace]:
        """Accumulate gradients over micro-batches; return loss, balance loss and loop trace."""
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
                    balance_coefficient=train.balance_coefficient, teacher=self.teacher,
                    depth=loops, trace=trace,
                )  # fmt: skip
            self.scale.apply(out.total).backward()
            loss, balance = loss + out.nll, balance + out.balance
            total.add(trace)
        if world_size() > 1:
            loss, balance = sum_over_ranks(torch.stack([loss, balance])).unbind()
            sum_loads(total, counts.max_depth, self.model)
        return loss, balance, total

    def _sample_seeds(self, step: int, sample_index_B: Tensor) -> Tensor:
        seed = self.config.train.seed
        seeds = [derive_seed(seed, "sample", step, i) for i in sample_index_B.tolist()]
        return to_device(torch.tensor(seeds), self.device)


def _local_batch(train: TrainConfig) -> int:
    """Return how many sequences of a step this process computes."""
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
            "a quantized model cannot be trained", where="Trainer(model, config)",
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
