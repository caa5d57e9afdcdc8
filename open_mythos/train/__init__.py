"""Training: configuration, depth plans, loss, optimizer, checkpoints and the trainer.

Names are loaded when they are first used, so that the configuration does not wait for torch.
"""

from __future__ import annotations

from open_mythos.lazy import lazy_names

_MODULES = {
    "open_mythos.train.build": ("build_model",),
    "open_mythos.train.run": ("Run", "build_run", "train_run"),
    "open_mythos.train.checkpoint.find": ("find_checkpoint", "read_state"),
    "open_mythos.train.checkpoint.manifest": ("verify_checkpoint",),
    "open_mythos.train.checkpoint.restore": ("load_checkpoint",),
    "open_mythos.train.config": (
        "DataConfig", "DepthConfig", "OptimConfig", "ParallelConfig", "RunConfig", "TrainConfig",
        "WatchConfig",
    ),
    "open_mythos.train.depth": ("DEPTH_PLANS", "DepthPlan"),
    "open_mythos.train.parallel.process_group": ("process_group",),
    "open_mythos.train.optimizers.ema": ("WeightAverage",),
    "open_mythos.hub.averages": ("averaged_model",),
    "open_mythos.train.gate": ("GATE_TARGETS", "GateConfig", "GateReport", "train_gate"),
    "open_mythos.train.loss": ("LossOutput", "next_token_loss", "sequence_balance_loss"),
    "open_mythos.train.monitoring.metrics": ("JsonlLogger", "MetricsLogger"),
    "open_mythos.train.optimizers.muon": ("Muon", "MuonAdamW"),
    "open_mythos.train.optimizers.optim": ("build_optimizer", "parameter_groups"),
    "open_mythos.train.parallel.parallelize": ("ParallelModel", "parallelize"),
    "open_mythos.train.optimizers.schedule": ("SCHEDULES", "learning_rate"),
    "open_mythos.train.signals": ("PreemptedError",),
    "open_mythos.train.state": ("BatchLoader", "StepResult", "TokenBatch", "TrainState"),
    "open_mythos.train.trainer": ("DivergedError", "Trainer"),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
