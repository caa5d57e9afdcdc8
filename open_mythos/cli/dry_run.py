"""What a training run would do, in words: no text is read, no hub asked, nothing built."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from open_mythos.accounting import account
from open_mythos.data.index import read_index
from open_mythos.data.stream_corpus import open_corpus
from open_mythos.tokenizer import DEFAULT_MODEL_ID, load_tokenizer
from open_mythos.tokenizer.files import is_path
from open_mythos.train.config import DataConfig, RunConfig
from open_mythos.train.optimizers.schedule import learning_rate
from open_mythos.train.text import is_prepared, prepared_folder

KNOWN_VOCABULARIES = {DEFAULT_MODEL_ID: 200_064, "openai-community/gpt2": 50_304}
"""``vocab_size`` of tokenizers on the hub, so that a plan need not fetch them: gpt-oss has 200,019
ids and GPT-2 50,257, to which a beginning and a padding token are added; rounded up to 64."""


def described(config: RunConfig, *, fit_vocabulary: bool = True) -> str:
    """Describe a run, line by line.

    Raises:
        ConfigError: The configuration is invalid.
        DataError: A source on this machine is missing.
    """
    config = deepcopy(config)
    vocabulary, tokenizer = _vocabulary(config)
    start = config.train.init_from
    if fit_vocabulary and not start and vocabulary:
        config.model.vocab_size = vocabulary
    config.validate()
    rows = [
        ("model", _model(config)),
        ("depth", _depth(config)),
        ("start", f"weights of {start}" if start else "random weights"),
        ("text", _text(config.data)),
        ("validation", _validation(config.data)),
        ("tokenizer", tokenizer),
        ("length", _length(config)),
        ("batch", _batch(config)),
        ("schedule", _schedule(config)),
        ("precision", _precision(config)),
        ("processes", _processes(config)),
        ("writes", f"{config.train.out_dir}, {_often(config.train.save_every, 'checkpoint')}, "
                   f"{_often(config.train.eval_every, 'evaluation')}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def _model(config: RunConfig) -> str:
    model, counts = config.model, account(config.model)
    experts = (
        f"{model.n_experts} experts of width {model.expert_dim} (top {model.n_experts_per_tok}, "
        f"{model.n_shared_experts} shared)"
        if model.n_experts
        else f"feed-forward of width {model.hidden_dim}"
    )
    blocks = (
        f"{model.prelude_layers} + {model.recurrent_layers} looped + {model.coda_layers} blocks"
    )
    kind = "dense, of about as many parameters as the looped model: "
    return (
        (kind if config.architecture == "dense" else "looped: ")
        + f"{counts.parameters:,} parameters, {counts.active_parameters:,} active per token; "
        f"dim {model.dim}, {model.attn_type.upper()}, {blocks}, {experts}, "
        f"vocabulary {model.vocab_size:,}" + (" (tied)" if model.tie_embeddings else "")
    )


def _depth(config: RunConfig) -> str:
    if config.architecture == "dense":
        return "none"
    depth, loops = config.depth, config.grad_loops
    most = "" if depth.max_loops is None else f", at most {depth.max_loops}"
    gradient = "all loops" if loops is None else f"the last {loops}"
    again = ", each recomputed in the backward pass" if config.train.checkpoint_loops else ""
    return f"{depth.plan}, mean {depth.expected:g} loops{most}; gradient through {gradient}{again}"


def _text(data: DataConfig) -> str:
    if folder := prepared_folder(data):
        return f"{folder}: {_shards(folder)}"
    if not data.source:
        return "the source of Python's standard library, prepared as bytes when the run starts"
    if "://" in data.source:
        files = "files as listed when the run starts"
    else:
        corpus = open_corpus(data.source, data.text_field)
        files = f"{len(corpus.files):,} files, {corpus.size:,} bytes"
    return f"{data.source}: streamed, {files}; {data.workers} workers a process"


def _validation(data: DataConfig) -> str:
    windows = f"{data.eval_windows} windows"
    if data.val:
        kind = _shards(data.val) if is_prepared(data.val) else "streamed"
        return f"{data.val}: {kind}; {windows}"
    if prepared_folder(data) or not data.source:
        return f"the validation split; {windows}"
    return f"{data.held_out:g} of the documents held out; {windows}" if data.held_out else "none"


def _shards(folder: str) -> str:
    splits = read_index(Path(folder)).splits.items()
    return "prepared shards, tokens: " + ", ".join(f"{k} {split.tokens:,}" for k, split in splits)


def _vocabulary(config: RunConfig) -> tuple[int, str]:
    """Return the tokenizer's vocabulary, 0 if it cannot be known yet; and a description."""
    if folder := prepared_folder(config.data):
        index = read_index(Path(folder))
        return index.vocab_size, f"{index.tokenizer}, vocabulary {index.vocab_size:,}"
    name = config.data.tokenizer
    if not name and config.train.init_from:
        return 0, "that of the checkpoint"
    if not config.data.source:
        name = "byte"
    name = name or DEFAULT_MODEL_ID
    if name == "byte" or is_path(name):
        size = load_tokenizer(name).vocab_size
        return size, f"{name}, vocabulary {size:,}"
    if name in KNOWN_VOCABULARIES:
        size = KNOWN_VOCABULARIES[name]
        return size, f"{name}, vocabulary {size:,}, fetched when the run starts"
    return 0, f"{name}, vocabulary known when the run starts"


def _length(config: RunConfig) -> str:
    steps = config.train.steps
    tokens = steps * config.train.global_batch * config.train.seq_len
    text = f"{tokens:,} tokens in {steps:,} steps"
    if config.architecture == "dense":
        return text
    flops = account(config.model, context=config.train.seq_len).training_flops(
        config.depth.expected, config.grad_loops
    )
    return f"{text}, {flops * tokens:.3g} FLOPs"


def _batch(config: RunConfig) -> str:
    train = config.train
    most = f", at most {train.micro_batch} at a time in a process" if train.micro_batch else ""
    tokens = train.global_batch * train.seq_len
    return (
        f"{train.global_batch:,} sequences of {train.seq_len:,} = {tokens:,} tokens a step, over "
        f"all processes{most}"
    )


def _schedule(config: RunConfig) -> str:
    train, optim = config.train, config.optim
    first, last = (learning_rate(step, train, optim) for step in (0, train.steps - 1))
    return (
        f"{optim.name}; learning rate {first:.3g} at the first step, up to {optim.lr:g} over "
        f"{train.warmup_steps:,} steps, {train.schedule}, {last:.3g} at the last"
    )


def _precision(config: RunConfig) -> str:
    named = {"auto": "bfloat16, on older GPUs float16 with a loss scale, on a CPU float32"}
    return named.get(config.train.dtype, config.train.dtype) + f"; device {config.train.device}"


def _processes(config: RunConfig) -> str:
    parallel = config.parallel
    kind = {"auto": "ddp"}.get(parallel.kind, parallel.kind)
    kind = "alone" if kind == "none" else f"alone, or {kind} under torchrun"
    shard = "" if parallel.shard is None else f", {parallel.shard} share a copy"
    experts = "" if parallel.experts == 1 else f", experts over {parallel.experts}"
    return kind + shard + experts


def _often(every: int, what: str) -> str:
    return f"{what} every {every:,} steps" if every else f"{what} at the end"
