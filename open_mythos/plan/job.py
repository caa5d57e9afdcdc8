"""A training job and its layout over GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from open_mythos.accounting import Accounting, account
from open_mythos.checks import MAX_LOOPS, check_count, check_fields, check_number, pick
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.plan.parameters import Parameter, parameters

EMA_DECAY = 0.999
"""Decay of the averaged weights of a planned run."""


@dataclass(frozen=True)
class Job:
    """A training run, independent of the hardware.

    Attributes:
        cfg: Model configuration.
        n_layers: Layers of a dense transformer; None for the looped model.
        context: Sequence length T in tokens.
        n_loops: Mean loops per sequence; determines FLOPs.
        max_loops: Maximum loops per sequence; determines memory.
        grad_loops: Loops of truncated backpropagation; None for all.
        dtype: Dtype of the matmuls; weights and optimizer state are float32.
        optimizer: "adamw" or "muon".
        ema: Whether to keep an exponential moving average of the weights.
    """

    cfg: MythosConfig = field(hash=False)
    n_layers: int | None = None
    context: int = 4096
    n_loops: float = 1
    max_loops: int = 1
    grad_loops: int | None = None
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    ema: bool = False

    def __post_init__(self) -> None:
        check_fields("", self)
        self.cfg.validate()
        # copy: jobs are cache keys, so later changes to the caller's object must not reach them
        object.__setattr__(self, "cfg", replace(self.cfg))
        check_count("context", self.context)
        check_number("max_loops", check_count("max_loops", self.max_loops), le=MAX_LOOPS)
        if self.context > self.cfg.max_seq_len:
            raise ConfigError(
                "sequences exceed the model's context", where="context", value=self.context,
                allowed=f"at most max_seq_len ({self.cfg.max_seq_len})",
                fix="shorten them, or increase max_seq_len",
            )  # fmt: skip
        if not 1 <= self.n_loops <= self.max_loops:
            raise ConfigError(
                "the mean number of loops is out of range", where="n_loops",
                value=self.n_loops, allowed=f"1 .. max_loops ({self.max_loops})",
                fix="raise max_loops to the maximum depth of a sequence",
            )  # fmt: skip
        if self.grad_loops is not None:
            check_count("grad_loops", self.grad_loops)
        pick(("bfloat16", "float16", "float32"), self.dtype, "dtype")
        pick(("adamw", "muon"), self.optimizer, "optimizer")

    @property
    def looped(self) -> bool:
        """Whether the model is looped."""
        return self.n_layers is None

    @property
    def last_loops(self) -> int:
        """Loops with gradient of a sequence of maximum depth."""
        return min(self.max_loops, self.grad_loops or self.max_loops)

    @cached_property
    def counts(self) -> Accounting:
        """Parameter and FLOP counts."""
        loops = self.max_loops if self.looped else None
        return account(self.cfg, loops, self.context, n_layers=self.n_layers)

    @cached_property
    def parameters(self) -> list[Parameter]:
        """All parameters of the model."""
        return parameters(self.cfg, self.n_layers)

    def training_flops(self) -> float:
        """Return the useful FLOPs per token."""
        return self.counts.training_flops(self.n_loops, self.grad_loops)

    def recomputed_flops(self) -> float:
        """Return the FLOPs per token that activation checkpointing adds: one more forward pass of
        each loop with gradient.
        """
        loops = min(self.n_loops, self.grad_loops or self.n_loops)
        return self.counts.forward_flops(loops) - self.counts.forward_flops(0)


@dataclass(frozen=True)
class Layout:
    """How GPUs share a job; field names follow the ``parallel`` and ``train`` config sections.

    Attributes:
        gpus: Number of GPUs.
        kind: "none", "ddp" or "fsdp".
        shard: GPUs that share one copy of the weights; 1 unless "fsdp".
        experts: Size of the expert-parallel group; 1 shards experts like other weights.
        checkpoint_loops: Whether loops are recomputed in the backward pass.
        micro_batch: Sequences per GPU and forward pass.
        micro_batches: Gradient-accumulation steps per optimizer step.
    """

    gpus: int
    kind: str
    shard: int = 1
    experts: int = 1
    checkpoint_loops: bool = False
    micro_batch: int = 1
    micro_batches: int = 1

    def __post_init__(self) -> None:
        check_fields("", self)

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.gpus * self.micro_batch * self.micro_batches

    @property
    def name(self) -> str:
        """One-line description."""
        text = {"none": "one GPU", "ddp": "DDP: every GPU holds the whole model"}.get(self.kind)
        if text is None and self.shard == self.gpus:
            text = f"FSDP over all {self.gpus} GPUs"
        elif text is None:
            text = f"HSDP: {self.gpus // self.shard} copies, each over {self.shard} GPUs"
        if self.experts > 1:
            text += f"; expert parallelism over {self.experts} GPUs"
        return text

    def options(self, job: Job) -> str:
        """Return the layout and the settings of ``job`` as options of ``open-mythos train``."""
        sharded = self.kind == "fsdp" and self.shard != self.gpus
        fixed = job.n_loops == job.max_loops
        options = {
            "parallel.kind": self.kind,
            "parallel.shard": self.shard if sharded else None,
            "parallel.experts": self.experts if self.experts > 1 else None,
            "train.micro_batch": self.micro_batch,
            "train.global_batch": self.global_batch,
            "train.seq_len": job.context,
            "train.dtype": job.dtype,
            "depth.plan": "fixed" if job.looped and fixed else None,
            "depth.mean": f"{job.n_loops:g}" if job.looped else None,
            "depth.max_loops": job.max_loops if job.looped and not fixed else None,
            "optim.name": job.optimizer if job.optimizer != "adamw" else None,
            "optim.ema_decay": EMA_DECAY if job.ema else None,
            "train.grad_loops": job.grad_loops,
            "train.checkpoint_loops": "true" if self.checkpoint_loops else None,
        }
        return " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
