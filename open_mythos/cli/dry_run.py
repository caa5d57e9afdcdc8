"""Summary of a training run for ``--dry-run``: reads no text, contacts no hub, holds no weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from open_mythos.accounting import account
from open_mythos.data.corpus import open_corpus
from open_mythos.data.index import read_index
from open_mythos.model.dense import DenseTransformer, parameter_count
from open_mythos.tokenizer import DEFAULT_MODEL_ID, load_tokenizer
from open_mythos.tokenizer.files import is_path
from open_mythos.train.config import DataConfig, RunConfig
from open_mythos.train.optimizers.schedule import learning_rate
from open_mythos.train.text import is_prepared, prepared_folder

KNOWN_VOCABULARIES = {DEFAULT_MODEL_ID: 200_064, "openai-community/gpt2": 50_304}
"""``vocab_size`` of hub tokenizers, to avoid a download: the 200,019 ids of gpt-oss and the 50,257
of GPT-2 plus BOS and padding tokens, rounded up to a multiple of 64."""


def described(config: RunConfig, *, fit_vocabulary: bool = True) -> str:
    """Describe a run, line by line.

    Raises:
        ConfigError: The configuration is invalid.
        DataError: A source on this machine is missing.
    """
    config = deepcopy(config)
    vocabulary, tokenizer = _vocabulary(config)
    train, optim, start = config.train, config.optim, config.train.init_from
    if fit_vocabulary and not start and vocabulary:
        config.model.vocab_size = vocabulary
    config.validate()
    micro = f", micro-batches of {train.micro_batch}" if train.micro_batch else ""
    first, last = (learning_rate(step, train, optim) for step in (0, train.steps - 1))
    kind = {"auto": "ddp"}.get(config.parallel.kind, config.parallel.kind)
    rows = {
        "model": _model(config),
        "depth": _depth(config),
        "start": f"weights of {start}" if start else "random weights",
        "text": _text(config.data),
        "validation": f"{_validation(config.data)}; {config.data.eval_windows} windows",
        "tokenizer": tokenizer,
        "length": _length(config),
        "batch": f"{train.global_batch:,} sequences of {train.seq_len:,} = "
        f"{train.global_batch * train.seq_len:,} tokens per step over all processes{micro}",
        "schedule": f"{optim.name}, {train.schedule}: learning rate {first:.3g} at the first step, "
        f"{optim.lr:g} after {train.warmup_steps:,} steps, {last:.3g} at the last",
        "precision": f"{train.dtype}, device {train.device}",
        "processes": "one" if kind == "none" else f"one, or several under torchrun ({kind})",
        "writes": f"{train.out_dir}; checkpoint {_every(train.save_every)}, "
        f"evaluation {_every(train.eval_every)}",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


def _model(config: RunConfig) -> str:
    model = config.model
    if config.architecture == "dense":
        with torch.device("meta"):
            dense = DenseTransformer.like(model)
        return (
            f"dense, matched to a looped model: {parameter_count(dense):,} parameters; dim "
            f"{model.dim}, {model.attn_type.upper()}, {dense.n_layers} blocks, feed-forward of "
            f"width {dense.cfg.hidden_dim}, vocabulary {model.vocab_size:,}"
        )
    counts = account(model)
    ffn = f"feed-forward of width {model.hidden_dim}"
    if model.n_experts:
        routing = f"top {model.n_experts_per_tok}, {model.n_shared_experts} shared"
        ffn = f"{model.n_experts} experts of width {model.expert_dim} ({routing})"
    return (
        f"looped: {counts.parameters:,} parameters, {counts.active_parameters:,} active per token; "
        f"dim {model.dim}, {model.attn_type.upper()}, {model.prelude_layers} + "
        f"{model.recurrent_layers} looped + {model.coda_layers} blocks, {ffn}, "
        f"vocabulary {model.vocab_size:,}" + (" (tied)" if model.tie_embeddings else "")
    )


def _depth(config: RunConfig) -> str:
    if config.architecture == "dense":
        return "none"
    depth, loops = config.depth, config.grad_loops
    most = "" if depth.max_loops is None else f", at most {depth.max_loops}"
    gradient = "all loops" if loops is None else f"the last {loops}"
    recomputed = ", recomputed in the backward pass" if config.train.checkpoint_loops else ""
    return f"{depth.plan}, mean {depth.expected:g}{most}; gradient through {gradient}{recomputed}"


def _text(data: DataConfig) -> str:
    if folder := prepared_folder(data):
        return f"{folder}: {_shards(folder)}"
    if not data.source:
        return "Python's standard library as bytes, prepared when the run starts"
    return f"{_stream(data, 'source')}; {data.workers} workers per process"


def _validation(data: DataConfig) -> str:
    if data.val:
        return f"{data.val}: {_shards(data.val)}" if is_prepared(data.val) else _stream(data, "val")
    if prepared_folder(data) or not data.source:
        return "the validation split"
    return f"{data.held_out:g} of the documents" if data.held_out else "none"


def _stream(data: DataConfig, name: str) -> str:
    """Describe the stream in field ``name``; files on this machine must exist."""
    source = getattr(data, name)
    if "://" in source:
        return f"{source}: streamed, files as listed when the run starts"
    corpus = open_corpus(source, data.text_field, where=f"data.{name}")
    return f"{source}: streamed, {len(corpus.files):,} files, {corpus.size:,} bytes"


def _shards(folder: str) -> str:
    splits = read_index(Path(folder)).splits.items()
    return "prepared shards, tokens: " + ", ".join(f"{k} {split.tokens:,}" for k, split in splits)


def _vocabulary(config: RunConfig) -> tuple[int, str]:
    """Return the tokenizer's vocabulary size, 0 if unknown, and a description."""
    if folder := prepared_folder(config.data):
        index = read_index(Path(folder))
        return index.vocab_size, f"{index.tokenizer}, vocabulary {index.vocab_size:,}"
    name = config.data.tokenizer or ("" if config.train.init_from else DEFAULT_MODEL_ID)
    if not config.data.source:
        name = "byte"
    if not name:
        return 0, "that of the checkpoint"
    known = KNOWN_VOCABULARIES.get(name, 0)
    if name == "byte" or is_path(name):
        known = load_tokenizer(name).vocab_size
    return known, f"{name}, vocabulary {known:,}" if known else f"{name}, vocabulary not known yet"


def _length(config: RunConfig) -> str:
    train = config.train
    tokens = train.steps * train.global_batch * train.seq_len
    text = f"{tokens:,} tokens in {train.steps:,} steps"
    if config.architecture == "dense":
        return text
    flops = account(config.model, context=train.seq_len).training_flops(
        config.depth.expected, config.grad_loops
    )
    return f"{text}, {flops * tokens:.3g} FLOPs"


def _every(steps: int) -> str:
    return f"every {steps:,} steps" if steps else "at the end"
