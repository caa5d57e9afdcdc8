"""A training job, and its layout over GPUs: plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from open_mythos.accounting import Accounting, account
from open_mythos.checks import check_count, pick
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.plan.parameters import Parameter, parameters

DTYPES = ("bfloat16", "float16", "float32")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Job:
    """A training run, independent of the hardware.

    Attributes:
        cfg: The model.
        n_layers: Layers of a dense transformer; None for the looped model.
        context: Tokens T of a training sequence.
        n_loops: Mean loops of a sequence; they determine the FLOPs.
        max_loops: Most loops of a sequence; they determine the memory.
        grad_loops: Truncated backpropagation through this many loops; None for all.
        dtype: Of the matmuls; weights and optimizer state are float32.
        optimizer: "adamw" or "muon".
        ema: Whether an exponential moving average of the weights is kept.
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
        self.cfg.validate()
        # a copy: changing the caller's object must not change a job that has been planned for
        object.__setattr__(self, "cfg", replace(self.cfg))
        check_count("context", self.context)
        check_count("max_loops", self.max_loops)
        if self.context > self.cfg.max_seq_len:
            raise ConfigError(
                "the sequences are longer than the model's context", where="context",
                value=self.context, allowed=f"at most max_seq_len ({self.cfg.max_seq_len})",
                fix="shorten them, or plan for a configuration with a larger max_seq_len",
            )  # fmt: skip
        if not 1 <= self.n_loops <= self.max_loops:
            raise ConfigError(
                "the mean number of loops is not between 1 and the largest", where="n_loops",
                value=self.n_loops, allowed=f"1 .. max_loops ({self.max_loops})",
                fix="raise max_loops: it has to hold the deepest sequence of a step",
            )  # fmt: skip
        if self.grad_loops is not None:
            check_count("grad_loops", self.grad_loops)
        for name, allowed in (("dtype", DTYPES), ("optimizer", OPTIMIZERS)):
            pick(allowed, getattr(self, name), name)

    @property
    def looped(self) -> bool:
        """Whether it is the looped model."""
        return self.n_layers is None

    @property
    def half(self) -> bool:
        """Whether matmuls run in half precision, by autocast."""
        return self.dtype != "float32"

    @property
    def last_loops(self) -> int:
        """Loops of the deepest sequence that carry gradient."""
        return min(self.max_loops, self.grad_loops or self.max_loops)

    @cached_property
    def counts(self) -> Accounting:
        """Parameters and FLOPs."""
        return account(
            self.cfg, self.max_loops if self.looped else None, self.context, n_layers=self.n_layers
        )

    @cached_property
    def parameters(self) -> list[Parameter]:
        """Every parameter."""
        return parameters(self.cfg, self.n_layers)

    def training_flops(self) -> float:
        """Return the useful FLOPs of a token."""
        return self.counts.training_flops(self.n_loops, self.grad_loops)

    def recomputed_flops(self) -> float:
        """Return the FLOPs of a token that activation checkpointing adds.

        They are one more forward pass of each loop that carries gradient.
        """
        loops = min(self.n_loops, self.grad_loops or self.n_loops)
        return self.counts.forward_flops(loops) - self.counts.forward_flops(0)


@dataclass(frozen=True)
class Layout:
    """How GPUs share a job; the fields are those of the ``parallel`` and ``train`` sections.

    Attributes:
        gpus: How many there are.
        kind: "none", "ddp" or "fsdp".
        shard: GPUs that share one copy of the weights; 1 unless "fsdp".
        experts: Size of the expert-parallel group; 1 shards experts like other weights.
        checkpoint_loops: Whether loops are recomputed in the backward pass.
        micro_batch: Sequences that a GPU computes at a time.
        micro_batches: How often it does so in a step.
    """

    gpus: int
    kind: str
    shard: int = 1
    experts: int = 1
    checkpoint_loops: bool = False
    micro_batch: int = 1
    micro_batches: int = 1

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.gpus * self.micro_batch * self.micro_batches

    @property
    def name(self) -> str:
        """A description in one line."""
        kinds = {"none": "one GPU", "ddp": "DDP: every GPU holds the whole model"}
        text = kinds.get(self.kind, "")
        if self.kind == "fsdp":
            copies = self.gpus // self.shard
            text = f"FSDP over all {self.gpus} GPUs" if copies == 1 else (
                f"HSDP: {copies} copies, each over {self.shard} GPUs"
            )  # fmt: skip
        if self.experts > 1:
            text += f"; expert parallelism over {self.experts} GPUs"
        return text

    def options(self, job: Job) -> str:
        """Return the layout, and the settings of ``job``, as options of ``open-mythos train``."""
        given: dict[str, Any] = {"parallel.kind": self.kind}
        if self.kind == "fsdp" and self.shard != self.gpus:
            given["parallel.shard"] = self.shard
        if self.experts > 1:
            given["parallel.experts"] = self.experts
        given |= {
            "train.micro_batch": self.micro_batch, "train.global_batch": self.global_batch,
            "train.seq_len": job.context, "train.dtype": job.dtype,
        }  # fmt: skip
        if job.optimizer != "adamw":
            given["optim.name"] = job.optimizer
        if job.grad_loops is not None:
            given["train.grad_loops"] = job.grad_loops
        if self.checkpoint_loops:
            given["train.checkpoint_loops"] = "true"
        return " ".join(f"--{name} {value}" for name, value in given.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self) | {"global_batch": self.global_batch}
