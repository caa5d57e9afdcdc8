"""Configuration of a training run as plain dataclasses (this module does not import torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from open_mythos.checks import check_fields, is_int, one_of, reject, unknown_key, within
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError

DEPTH_PLAN_NAMES = ("fixed", "uniform", "poisson", "lognormal_poisson", "mixed")
SCHEDULE_NAMES = ("cosine", "wsd", "constant")
DECAY_SHAPES = ("linear", "sqrt")
CURRICULUM_SHAPES = ("linear", "sqrt")
LOGGER_NAMES = ("tensorboard", "wandb", "trackio")
OPTIMIZER_NAMES = ("adamw", "muon")


@dataclass
class _Section:
    """Base of the sections of :class:`RunConfig`."""

    def validate(self) -> None:
        """Raise a ConfigError if a field, or a relation between fields, is out of range."""
        check_fields(type(self).__name__.removesuffix("Config").lower(), self)


@dataclass
class DepthConfig(_Section):
    """Number of loops per training sequence. Dense models ignore it."""

    plan: str = one_of("poisson", DEPTH_PLAN_NAMES)
    """"fixed": always ``mean``; "uniform": ``low`` .. ``high``; "poisson": Poisson(mean), at least
    1; "lognormal_poisson": the heavy tail of Huginn (arXiv 2502.05171), of mean ``mean`` + 1;
    "mixed": ``mean``, or uniform in 1 .. 2 ``mean`` for ``mixed_share`` of the sequences, which
    keeps most of the quality of "fixed" at ``mean`` and works at other depths."""
    mean: float = within(8.0, ge=1, le=1024)
    """Mean depth; a whole number for "fixed" and "mixed"; not used by "uniform"."""
    mixed_share: float = within(0.25, ge=0, le=1)
    """Fraction of the sequences of "mixed", in [0, 1], whose depth is not ``mean``."""
    low: int = within(1, ge=1)
    """Smallest depth of "uniform"."""
    high: int = within(8, ge=1)
    """Largest depth of "uniform"."""
    sigma: float = within(0.5, ge=0, le=2)
    """Standard deviation of the logarithm of the rate of "lognormal_poisson"."""
    max_loops: int | None = within(None, ge=1)
    """Maximum loops of a sequence, without the extra loops of long steps; None for no limit."""
    curriculum_start: float = within(1.0, ge=1, le=1024)
    """``mean`` at the first step of a curriculum."""
    curriculum_steps: int = within(0, ge=0)
    """Steps over which ``mean`` grows from ``curriculum_start``; 0 for no curriculum."""
    curriculum_shape: str = one_of("linear", CURRICULUM_SHAPES)
    """Growth over the share s of these steps: "linear" (s), or "sqrt" (1 - sqrt(1 - s), which stays
    shallow for longer, arXiv 2511.07384)."""
    long_share: float = within(0.0, ge=0, le=1)
    """Fraction of steps whose sequences all run extra loops, so that the model learns to hold its
    answer. With ``train.grad_loops`` they precede the loops that carry gradient: the step starts
    from a detached state."""
    long_loops: int = within(32, ge=1)
    """Maximum number of these extra loops, which is log-uniform from 1."""

    @property
    def expected(self) -> float:
        """Mean depth after the curriculum, before the ``max_loops`` limit and without the extra
        loops of long steps."""
        if self.plan == "uniform":
            return (self.low + self.high) / 2
        further = {"lognormal_poisson": 1.0, "mixed": self.mixed_share / 2}
        return self.mean + further.get(self.plan, 0.0)

    @property
    def expected_further(self) -> float:
        """Mean extra loops per step, averaged over all steps."""
        if self.long_loops == 1:
            return self.long_share
        return self.long_share * (self.long_loops - 1) / math.log(self.long_loops)

    def validate(self) -> None:
        """Raise a ConfigError if a field, or a relation between fields, is out of range."""
        super().validate()
        if self.high < self.low:
            reject("depth", self, "high", f"an integer >= low ({self.low})")
        if self.plan in ("fixed", "mixed") and self.mean != int(self.mean):
            reject("depth", self, "mean", f'a whole number with plan "{self.plan}"')
        if self.plan == "uniform" and self.curriculum_steps:
            reject("depth", self, "curriculum_steps", '0 with plan "uniform", which has no mean')


@dataclass
class OptimConfig(_Section):
    """AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) with AdamW where Muon does not apply."""

    name: str = one_of("adamw", OPTIMIZER_NAMES)
    """"adamw"; "muon": Muon for the matrices of attention, feed-forwards and experts, AdamW for
    the rest; its best learning rate is about four times AdamW's (docs/optimizers.md)."""
    lr: float = within(1e-3, gt=0)
    """Learning rate at the end of the warm-up."""
    adamw_lr: float = within(0.0, ge=0)
    """Muon only: the same for the parameters that AdamW updates; 0 means ``lr``."""
    beta1: float = within(0.9, ge=0, lt=1)
    """Decay of the first moment, in [0, 1)."""
    beta2: float = within(0.95, ge=0, lt=1)
    """Decay of the second moment, in [0, 1)."""
    eps: float = within(1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = within(0.1, ge=0)
    """Decoupled weight decay of the matrices; ``train.optimizers.optim`` defines which."""
    momentum: float = within(0.95, ge=0, lt=1)
    """Muon only: decay of the moving average of gradients, in [0, 1)."""
    nesterov: bool = True
    """Muon only: use Nesterov momentum."""
    ns_steps: int = within(5, ge=1)
    """Muon only: Newton-Schulz iterations."""
    ema_decay: float = within(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which evaluations use, in [0, 1), e.g.
    0.999; 0 keeps none."""

    def validate(self) -> None:
        """Raise a ConfigError if a field, or a relation between fields, is out of range."""
        super().validate()
        if self.adamw_lr and self.name != "muon":
            reject("optim", self, "adamw_lr", '0, or optim.name "muon"')


@dataclass
class DataConfig(_Section):
    """Training and validation text."""

    path: str = ""
    """Folder of prepared token shards; the run uses their tokenizer."""
    source: str = ""
    """Text to stream instead of ``path``: a file or folder, a URL such as hf://datasets/..., or
    "stdlib". A prepared folder named here is used as ``path``."""
    text_field: str = "text"
    """JSON key or Parquet column that holds the text of a stream."""
    tokenizer: str = ""
    """Tokenizer of a stream: "byte", a path, or a Hugging Face model; empty for openai/gpt-oss-20b,
    or that of ``train.init_from``."""
    held_out: float = within(0.005, ge=0, lt=1)
    """Fraction of a stream's documents, in [0, 1), held out for evaluation. Not used with prepared
    shards, which have a validation split, or with ``val``."""
    workers: int = within(2, ge=0)
    """Worker processes per rank that read and tokenize a stream."""
    val: str = ""
    """Separate validation text, given like ``path`` or ``source``. Of a prepared folder, the
    validation split is used, or everything if there is none."""
    document_masks: bool = False
    """Restrict attention to the own document where several share a sequence."""
    eval_windows: int = within(64, ge=1)
    """Maximum number of sequences per evaluation."""

    def validate(self) -> None:
        """Raise a ConfigError if a field is out of range."""
        super().validate()
        if self.path and self.source:
            reject("data", self, "source", "empty if data.path is set: a run has one text")


@dataclass
class ParallelConfig(_Section):
    """Parallelism. Losses do not depend on it."""

    kind: str = one_of("auto", ("auto", "none", "ddp", "fsdp"))
    """"none": one process; "ddp": every process holds the whole model; "fsdp": each holds a shard
    of parameters, gradients and optimizer state (FSDP2); "auto": "none" for one process, "ddp" for
    several."""
    shard: int | None = within(None, ge=1)
    """With "fsdp": processes that share one copy of the model; None for all. Fewer (HSDP) keep one
    copy per group of neighboring ranks, such as the GPUs of a node."""
    experts: int = within(1, ge=1)
    """With "fsdp": size of the expert-parallel group, in which tokens are sent to their experts;
    1 shards experts like other weights."""
    timeout: float = within(600.0, gt=0)
    """Timeout of collective operations in seconds, after which the run ends."""

    def validate(self) -> None:
        """Raise a ConfigError if a field is out of range."""
        super().validate()
        if self.kind != "fsdp":
            for name, default in (("shard", None), ("experts", 1)):
                if getattr(self, name) != default:
                    reject("parallel", self, name, f'{default} unless parallel.kind is "fsdp"')


@dataclass
class WatchConfig(_Section):
    """Monitoring and recovery."""

    loggers: list[str] = field(default_factory=list)
    """Loggers besides ``metrics.jsonl``: "tensorboard", "wandb", "trackio" (optional packages)."""
    project: str = "open-mythos"
    """Project name in wandb and trackio."""
    watchdog: bool = True
    """Raise alarms about the loops: collapse, explosion, loops without effect, expert
    imbalance."""
    spike_window: int = within(128, ge=8)
    """Number of recent losses that a step's loss is compared with."""
    spike_threshold: float = within(6.0, gt=0)
    """Standard deviations above their median at which a loss counts as high."""
    spike_patience: int = within(4, ge=1)
    """Consecutive high losses that make a spike."""
    max_rewinds: int = within(2, ge=0)
    """Maximum number of rollbacks to the last checkpoint, which skip the batches since, after a
    spike or more than ``train.max_skips`` consecutive non-finite steps; then the run stops with an
    error."""
    peak_flops: float | None = within(None, gt=0)
    """Peak FLOP/s of one device, to compute MFU; None looks up known GPUs."""

    def validate(self) -> None:
        """Raise a ConfigError if a field is out of range."""
        super().validate()
        if not set(self.loggers) <= set(LOGGER_NAMES):
            reject("watch", self, "loggers", f"some of {', '.join(LOGGER_NAMES)}")


@dataclass
class TrainConfig(_Section):
    """The training loop: length, batch, precision, evaluations and checkpoints."""

    seed: int = within(0, ge=0)
    """Seed of all randomness: weights, data order, depths, dropout, h_0."""
    steps: int = within(1000, ge=1)
    """Optimizer steps of the whole run."""
    seq_len: int = within(256, ge=1)
    """Tokens T per training sequence."""
    global_batch: int = within(16, ge=1)
    """Sequences per optimizer step."""
    micro_batch: int | None = within(None, ge=1)
    """Sequences per forward and backward pass (gradient accumulation); a divisor of
    ``global_batch``. None for no accumulation."""
    schedule: str = one_of("cosine", SCHEDULE_NAMES)
    """"cosine": down to ``min_lr_ratio`` over the rest of the run; "wsd": stable, then a decay over
    the last ``decay_steps``; "constant"."""
    warmup_steps: int = within(100, ge=0)
    """Steps over which the learning rate rises linearly from (not at) zero."""
    decay_steps: int = within(200, ge=1)
    """Length of the final decay of "wsd"."""
    decay_shape: str = one_of("linear", DECAY_SHAPES)
    """Shape of that decay: "linear", or "sqrt" (1 - sqrt, arXiv 2405.18392)."""
    min_lr_ratio: float = within(0.1, ge=0, le=1)
    """Final learning rate of a decay, as a fraction of ``optim.lr``."""
    clip: float = within(1.0, gt=0)
    """Maximum global gradient norm; larger gradients are scaled down to it."""
    max_skips: int = within(20, ge=0)
    """Consecutive non-finite steps that are skipped before training stops with an error."""
    dtype: str = one_of("float32", ("auto", "float32", "bfloat16", "float16"))
    """Dtype of the matmuls: "float32"; "bfloat16" or "float16" by autocast; "auto" is bfloat16 on
    GPUs that support it, float16 on older ones, float32 on a CPU. Weights and optimizer state stay
    float32; float16 uses dynamic loss scaling."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda", "cuda:N"."""
    grad_loops: int | Literal["auto"] | None = None
    """Truncated back-propagation: loops at the end of each sequence that carry gradient; "auto" for
    half the mean depth (rounded up); None for all, which is better where memory allows."""
    checkpoint_loops: bool = False
    """Activation checkpointing: store one state per loop and recompute the rest in the backward
    pass, at about 25 % more time."""
    compile: bool = False
    """Compile each block (not the model, so that one graph serves any number of loops)."""
    balance_speed: float = within(1e-3, ge=0)
    """Step size of the bias that balances expert load after each step; 0 disables it."""
    balance_coefficient: float = within(0.0, ge=0)
    """Weight of the sequence-wise balance loss (DeepSeek-V3 uses 1e-4); 0 disables it."""
    log_every: int = within(10, ge=1)
    """Steps between log lines."""
    eval_every: int = within(0, ge=0)
    """Steps between evaluations; 0 for one at the end only."""
    eval_depths: list[int] = field(default_factory=list)
    """Loop counts to evaluate at; empty for the mean training depth."""
    save_every: int = within(0, ge=0)
    """Steps between checkpoints; 0 for one at the end only."""
    keep: int = within(2, ge=1)
    """Number of newest checkpoints to keep."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy of the state."""
    out_dir: str | None = None
    """Folder for metrics and checkpoints; None writes nothing."""
    init_from: str = ""
    """Initial weights: a model, a checkpoint or a run (its newest checkpoint); empty for random
    initialization."""
    teacher: str = ""
    """Model whose predictions the loss also matches (a looped one at one loop); empty for none."""
    teacher_weight: float = within(0.5, gt=0)
    """Weight of the divergence from the teacher."""
    teacher_temperature: float = within(2.0, gt=0)
    """Temperature of both distributions in it."""

    def validate(self) -> None:
        """Raise a ConfigError if a field, or a relation between fields, is out of range."""
        super().validate()
        if self.global_batch % (self.micro_batch or 1):
            reject("train", self, "micro_batch", f"a divisor of global_batch ({self.global_batch})")
        if self.grad_loops not in ("auto", None) and not (
            is_int(self.grad_loops) and int(self.grad_loops) >= 1
        ):
            reject("train", self, "grad_loops", 'an integer >= 1, "auto" or None')
        if any(not is_int(depth) or depth < 1 for depth in self.eval_depths):
            reject("train", self, "eval_depths", "integers >= 1")
        if self.out_dir == "":
            reject("train", self, "out_dir", "a folder, or None to write nothing")
        if self.device.startswith("meta"):
            reject("train", self, "device", "a device that computes: auto, cpu, cuda, cuda:N")
        if self.save_every and self.out_dir is None:
            reject("train", self, "save_every", "0 without an out_dir to save in")
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            most = self.steps - self.warmup_steps
            reject("train", self, "decay_steps", f"at most steps - warmup_steps ({most})")


def no_text(where: str) -> ConfigError:
    """Return the error of a run without a text."""
    return ConfigError(
        "the run needs a text", where=where, value="",
        allowed='a file, a folder, a URL, "stdlib", or prepared shards', fix="add --source PATH",
    )  # fmt: skip


def fitting_micro_batch(wanted: int | None, batch: int) -> int | None:
    """Return the largest divisor of ``batch`` up to ``wanted``; None stays None."""
    if wanted is None:
        return None
    return max(size for size in range(1, max(1, min(wanted, batch)) + 1) if batch % size == 0)


@dataclass
class RunConfig:
    """Complete definition of a run; runs with equal configurations are bit-identical."""

    architecture: str = one_of("looped", ("looped", "dense"))
    """"looped", or "dense": a baseline with as many parameters and no loop."""
    model: MythosConfig = field(default_factory=MythosConfig)
    """The looped model; a dense one is derived from it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    depth: DepthConfig = field(default_factory=DepthConfig)
    """Number of loops per training sequence."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """Monitoring and recovery."""

    @property
    def grad_loops(self) -> int | None:
        """Loops that carry gradient; None for all."""
        if self.train.grad_loops == "auto":
            return math.ceil(self.depth.expected / 2)
        return self.train.grad_loops

    @property
    def eval_depths(self) -> list[int]:
        """Loop counts to evaluate at."""
        return list(self.train.eval_depths) or [max(1, round(self.depth.expected))]

    def validate(self) -> None:
        """Raise a ConfigError if any field, or a relation between fields, is out of range."""
        check_fields("", self)
        for name in _SECTIONS:
            getattr(self, name).validate()
        train, dense = self.train, self.architecture == "dense"
        if self.watch.loggers and train.out_dir is None:
            reject("watch", self.watch, "loggers", "[] without a train.out_dir")
        if train.seq_len > self.model.max_seq_len:
            most = self.model.max_seq_len
            reject("train", train, "seq_len", f"at most model.max_seq_len ({most})")
        if dense:
            for name in ("grad_loops", "checkpoint_loops"):
                if getattr(train, name):
                    reject("train", train, name, "unset for a dense model, which has no loops")
        if self.parallel.experts > 1:
            if dense or self.model.n_experts % self.parallel.experts:
                allowed = f"a divisor of model.n_experts ({self.model.n_experts})"
                reject("parallel", self.parallel, "experts", allowed)
            if train.grad_loops is not None:
                # ranks would deadlock if they differed in the loops that carry gradient
                reject("train", train, "grad_loops", "None with parallel.experts above 1")
        if train.balance_coefficient and (dense or not self.model.n_experts):
            reject("train", train, "balance_coefficient", "0 for a model without experts")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, nested, as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Invert :meth:`to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: A key is unknown or a value is invalid.
        """
        config = cls()
        for name, value in _known(values, cls, "RunConfig").items():
            section: Any = type(getattr(config, name))
            if name in _SECTIONS and not isinstance(value, section):
                value = section(**_known(value, section, name))
            setattr(config, name, value)
        config.validate()
        return config


_SECTIONS = ("model", "data", "depth", "optim", "train", "parallel", "watch")


def _known(values: Any, cls: type, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError("not a set of fields", where=where, value=values, allowed="a mapping")
    known = {each.name for each in fields(cls)}
    for key in values:
        if key not in known:
            raise unknown_key(str(key), known, where)
    return values
