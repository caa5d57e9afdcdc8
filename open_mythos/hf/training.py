"""For the trainers of ``transformers`` and TRL: sampled depths, balanced experts.

Both are callbacks, which know the step; adapters and parallel wrappers around the model are fine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from open_mythos.checks import check_number
from open_mythos.distributed import rank, world_size
from open_mythos.errors import ConfigError
from open_mythos.hf.model import OpenMythosModel
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.trace import LoopTrace
from open_mythos.train.config import DepthConfig
from open_mythos.train.depth import DepthPlan


class SampledDepths(TrainerCallback):
    """Draw the loops of every training sequence from a plan, and truncate back-propagation.

    The depths are a function of (seed, step, sample), so a resumed run has the same ones. Calls in
    evaluation, and calls that say ``n_loops``, are left alone.

    Args:
        plan: How depths are drawn, as in the library's own training.
        grad_loops: Final loops of each sequence that carry gradient; None for all.
        seed: Seed of the plan.
    """

    def __init__(self, plan: DepthConfig, grad_loops: int | None = None, seed: int = 0) -> None:
        self.plan, self.grad_loops = DepthPlan(plan, seed), grad_loops
        self._step, self._seen = 0, 0
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to set the depth of training calls."""
        hook = _inner(kwargs["model"]).register_forward_pre_hook
        self._hook = hook(self._set_depth, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        self._step, self._seen = state.global_step, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if self._hook is not None:
            self._hook.remove()

    def _set_depth(
        self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not module.training or given.get("n_loops") is not None:
            return args, given
        ids = given.get("input_ids")
        rows = len(given["inputs_embeds"] if ids is None else ids)
        first = self._seen * world_size() + rank() * rows
        self._seen += rows
        depths_B = self.plan.depths(self._step, range(first, first + rows))
        return args, {**given, "n_loops": depths_B, "grad_loops": self.grad_loops}


class RouterBalance(TrainerCallback):
    """Balance the experts by their bias after every optimizer step.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2. The load is that of all loops, of all
    micro-batches of the step and of all processes.

    Args:
        speed: Step size of the bias.
    """

    def __init__(self, speed: float = 1e-3) -> None:
        check_number("speed", speed, gt=0)
        self.speed = speed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to record the routing of training calls.

        Raises:
            ConfigError: The model has no experts.
        """
        model = _inner(kwargs["model"])
        if not any(isinstance(module, MoEFFN) for module in model.modules()):
            raise ConfigError(
                "no experts to balance", where="RouterBalance", value="n_experts=0",
                allowed="a model with experts", fix="leave the callback out",
            )  # fmt: skip
        model.traces = []

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the bias of every mixture."""
        model, total = _inner(kwargs["model"]), LoopTrace()
        for trace in model.traces or ():
            total.add(trace)
        load = total.load_by_layer()
        for module in model.modules():
            if isinstance(module, MoEFFN) and module.layer in load:
                load_E = load[module.layer]
                if world_size() > 1:
                    dist.all_reduce(load_E)
                module.update_bias(load_E, self.speed)
        model.traces = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        _inner(kwargs["model"]).traces = None


def _inner(model: nn.Module) -> OpenMythosModel:
    """Return the model inside of wrappers.

    Raises:
        ConfigError: There is none.
    """
    for module in model.modules():
        if isinstance(module, OpenMythosModel):
            return module
    raise ConfigError(
        "not a model of this library", where="model", value=type(model).__name__,
        allowed="OpenMythosForCausalLM or OpenMythosModel, in any wrapper",
    )  # fmt: skip
