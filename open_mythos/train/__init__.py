"""Training: configuration, depth plans, loss, optimizer, checkpoints and the trainer.

Names are loaded when they are first used, so that the configuration does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "open_mythos.train.build": ("build_model",),
    "open_mythos.train.saving.checkpoint": (
        "find_checkpoint", "load_checkpoint", "read_state", "save_checkpoint", "verify_checkpoint",
    ),
    "open_mythos.train.config": (
        "DataConfig", "DepthConfig", "OptimConfig", "ParallelConfig", "RunConfig", "TrainConfig",
        "WatchConfig",
    ),
    "open_mythos.train.depth": ("DEPTH_PLANS", "DepthPlan"),
    "open_mythos.train.processes.distributed": ("process_group",),
    "open_mythos.train.optimizers.ema": ("WeightAverage", "averaged_model"),
    "open_mythos.train.gate": ("GATE_TARGETS", "GateConfig", "GateReport", "train_gate"),
    "open_mythos.train.loss": ("LossOutput", "next_token_loss", "sequence_balance_loss"),
    "open_mythos.train.watching.metrics": ("JsonlLogger", "MetricsLogger"),
    "open_mythos.train.optimizers.muon": ("Muon", "MuonAdamW"),
    "open_mythos.train.optimizers.optim": ("build_optimizer", "parameter_groups"),
    "open_mythos.train.processes.parallel": (
        "ParallelModel", "apply_activation_checkpointing", "parallelize",
    ),
    "open_mythos.train.optimizers.schedule": ("SCHEDULES", "learning_rate"),
    "open_mythos.train.signals": ("PreemptedError",),
    "open_mythos.train.state": ("BatchLoader", "StepResult", "TokenBatch", "TrainState"),
    "open_mythos.train.trainer": ("DivergedError", "Trainer"),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'open_mythos.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
