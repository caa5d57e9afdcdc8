"""How each public function and class is called: arguments that a bad one takes the place of."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from helpers import random_ids, small_config, small_model

from open_mythos.data import Loader, TokenShards, open_corpus, prepare
from open_mythos.dynamics import run_trajectory
from open_mythos.hub import save_pretrained
from open_mythos.model.exit_rules import FixedDepth
from open_mythos.model.trace import LoopTrace
from open_mythos.plan import GPUS, Job, Layout
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train import DepthConfig, GateConfig, OptimConfig, ParallelConfig, RunConfig
from open_mythos.train.config import DataConfig, TrainConfig

PACKAGES = (
    "", ".data", ".dynamics", ".evaluation", ".hub", ".model", ".plan", ".tokenizer", ".train",
)  # fmt: skip

NOT_INPUT = {
    # what the library makes and hands out
    "Accounting", "AnswerRow", "Batch", "Completion", "ContractionFit", "Corpus", "DepthRow",
    "ExitReport", "ExitRow", "FixedPoint", "GateReport", "Index", "LayerRouting", "LongRun",
    "Look", "LossOutput", "Memory", "MuonAdamW", "ParallelModel", "Plan", "ProbeScore", "Run",
    "Spectrum", "StepResult", "TrainState", "Traffic", "Trajectory", "WeightBytes", "BPETokenizer",
    # errors and protocols
    "ConfigError", "DataError", "DivergedError", "DoesNotFitError", "EnvironmentError_",
    "InternalError", "MythosError", "PreemptedError", "TooFewHeldOutError", "BatchLoader",
    "ExitRule", "MetricsLogger", "TokenBatch", "Tokenizer",
    # their fields are checked by test_fields.py
    "MythosConfig", "DataConfig", "DepthConfig", "GateConfig", "OptimConfig", "ParallelConfig",
    "RunConfig", "TrainConfig", "WatchConfig",
    # of tensors alone, inside compiled graphs: PyTorch looks at their arguments
    "apply_rope", "exit_loops", "graves_weights", "halting_weights", "loop_index_embedding",
    "document_ids", "set_probability", "sequence_balance_loss", "GivenDepths",
}  # fmt: skip
"""Public names without arguments that a user could get wrong, or that are checked elsewhere."""


class Things:
    """Arguments that are right, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = ByteTokenizer()
        self.ids = random_ids(2, 6)
        self.cfg = small_config()
        self.gqa = small_config("gqa")

    @cached_property
    def model(self) -> Any:
        return small_model()

    @cached_property
    def saved(self) -> str:
        save_pretrained(self.model, self.folder / "model")
        self.tokenizer.save(self.folder / "model" / "tokenizer")
        return str(self.folder / "model")

    @cached_property
    def text(self) -> str:
        (self.folder / "text.txt").write_text("a text of some words\n" * 50)
        return str(self.folder / "text.txt")

    @cached_property
    def shards(self) -> TokenShards:
        prepare(
            [f"some text {i}" for i in range(40)],
            self.folder / "shards",
            self.tokenizer,
            val_fraction=0.3,
        )
        return TokenShards(self.folder / "shards")

    @cached_property
    def corpus(self) -> Any:
        return open_corpus(self.text)

    @cached_property
    def path(self) -> Any:
        return run_trajectory(self.model, self.ids, 3)

    @cached_property
    def run(self) -> RunConfig:
        train = TrainConfig(steps=2, seq_len=8, global_batch=2, device="cpu")
        return RunConfig(model=self.cfg, train=train, data=DataConfig(source=self.text))


Make = Callable[[Things], dict[str, Any]]
CALLS: dict[str, Make] = {
    "ACTHalting": lambda t: {"dim": 8},
    "Acceleration": lambda t: {},
    "ArgmaxStable": lambda t: {},
    "AtLeast": lambda t: {"rule": FixedDepth(1), "loops": 1},
    "ByteTokenizer": lambda t: {},
    "DenseTransformer": lambda t: {"cfg": t.cfg},
    "Depth": lambda t: {},
    "DepthPlan": lambda t: {"config": DepthConfig(), "seed": 0},
    "Engine": lambda t: {"model": t.model},
    "EpochWindows": lambda t: {"shards": t.shards, "seq_len": 4, "global_batch": 1},
    "Expert": lambda t: {"dim": 8, "expert_dim": 8},
    "FixedDepth": lambda t: {"loops": 2},
    "GPU": lambda t: vars(GPUS["h100"]),
    "GQAttention": lambda t: {"cfg": t.gqa},
    "GateExit": lambda t: {"gate": t.model.recurrent.halting, "threshold": 0.5},
    "HeldOutWindows": lambda t: {
        "corpus": t.corpus,
        "tokenizer": t.tokenizer,
        "seq_len": 4,
        "windows": 1,
        "held_out": 0.5,
        "batch": 1,
    },
    "Job": lambda t: {"cfg": t.cfg, "context": 16},
    "JsonlLogger": lambda t: {"path": t.folder / "metrics.jsonl"},
    "KLExit": lambda t: {},
    "KVCache": lambda t: {},
    "LTIInjection": lambda t: {"dim": 8},
    "Layout": lambda t: {"gpus": 1, "kind": "none"},
    "LoRAAdapter": lambda t: {"dim": 8, "rank": 2, "max_loops": 3},
    "Loader": lambda t: {"shards": t.shards, "seq_len": 4, "global_batch": 1},
    "LoopTrace": lambda t: {},
    "MLAttention": lambda t: {"cfg": t.cfg},
    "MoEFFN": lambda t: {"cfg": t.cfg},
    "Muon": lambda t: {"params": [torch.nn.Parameter(torch.ones(2, 2))]},
    "MythosTokenizer": lambda t: {"model_id": t.saved},
    "OpenMythos": lambda t: {"cfg": t.cfg},
    "PackedWindows": lambda t: {"shards": t.shards, "seq_len": 4, "mask_documents": False},
    "Permutation": lambda t: {"n": 10, "seed": 0, "epoch": 0},
    "Question": lambda t: {"prompt": "a", "answer": "b"},
    "RMSNorm": lambda t: {"dim": 8},
    "RecurrentBlock": lambda t: {"cfg": t.cfg},
    "SamplingParams": lambda t: {},
    "StateChange": lambda t: {},
    "StaticDecoder": lambda t: {"model": t.model, "batch": 2, "capacity": 16},
    "StepJacobian": lambda t: {
        "model": t.model,
        "input_ids": t.ids[:1],
        "h_BTD": t.path.states_LBTD[0][:1],
        "t": 0,
    },
    "StreamDecoder": lambda t: {"tokenizer": t.tokenizer},
    "StreamLoader": lambda t: {
        "corpus": t.corpus,
        "tokenizer": t.tokenizer,
        "seq_len": 4,
        "global_batch": 1,
    },
    "TokenShards": lambda t: {"path": t.shards.path},
    "Trainer": lambda t: {
        "model": t.model,
        "loader": Loader(t.shards, seq_len=4, global_batch=1),
        "config": t.run,
    },
    "TransformerBlock": lambda t: {"cfg": t.cfg},
    "WeightAverage": lambda t: {"model": t.model, "decay": 0.9},
    "Wish": lambda t: {},
    "account": lambda t: {"model": t.cfg},
    "averaged_model": lambda t: {"checkpoint": t.saved},
    "build_model": lambda t: {"config": t.run},
    "build_optimizer": lambda t: {"model": t.model, "config": OptimConfig()},
    "build_run": lambda t: {"config": t.run},
    "cache_bytes": lambda t: {"config": t.cfg, "n_loops": 2, "positions": 8},
    "classify": lambda t: {"path": t.path},
    "communication": lambda t: {
        "job": Job(t.cfg, context=16),
        "layout": Layout(1, "none"),
        "gpu": GPUS["h100"],
    },
    "evaluate_answers": lambda t: {
        "model": t.model,
        "questions": [],
        "tokenizer": t.tokenizer,
        "depths": [1],
    },
    "evaluate_depths": lambda t: {"model": t.model, "batches": [], "depths": [1]},
    "evaluate_exits": lambda t: {"model": t.model, "batches": [], "rule": FixedDepth(1)},
    "exit_rule": lambda t: {"text": "kl", "model": t.model},
    "expert_routing": lambda t: {"model": t.model, "batches": []},
    "export_folder": lambda t: {"checkpoint": t.saved, "out": t.folder / "exported"},
    "find_checkpoint": lambda t: {"source": t.saved},
    "fineweb_edu": lambda t: {},
    "fixed_point": lambda t: {"model": t.model, "input_ids": t.ids},
    "from_pretrained": lambda t: {"directory": t.saved},
    "get_vocab_size": lambda t: {"name_or_path": t.saved},
    "gpu": lambda t: {"name": "h100"},
    "is_quantized": lambda t: {"model": t.model},
    "layouts": lambda t: {"job": Job(t.cfg, context=16), "gpus": 1},
    "leading_eigenvalues": lambda t: {"apply": lambda v: v, "size": 8},
    "leading_singular_values": lambda t: {
        "apply": lambda v: v,
        "apply_transposed": lambda v: v,
        "size": 8,
    },
    "learning_rate": lambda t: {"step": 1, "train": TrainConfig(), "optim": OptimConfig()},
    "load_checkpoint": lambda t: {
        "path": t.saved,
        "model": t.model,
        "optimizer": torch.optim.AdamW(t.model.parameters()),
    },
    "load_tokenizer": lambda t: {"name_or_path": t.saved},
    "logit_lens": lambda t: {"model": t.model, "path": t.path},
    "make_plan": lambda t: {
        "job": Job(t.cfg, context=16),
        "gpu": GPUS["h100"],
        "gpus": 1,
        "tokens": 1e6,
    },
    "memory": lambda t: {"job": Job(t.cfg, context=16), "layout": Layout(1, "none")},
    "next_token_loss": lambda t: {
        "model": t.model,
        "input_ids": t.ids,
        "targets": t.ids,
        "step_tokens": 12,
        "step_sequences": 2,
    },
    "open_corpus": lambda t: {"source": t.text},
    "parallelize": lambda t: {"model": t.model, "config": t.run},
    "parameter_groups": lambda t: {"model": t.model, "weight_decay": 0.1},
    "parse_count": lambda t: {"text": "3M", "where": "text"},
    "precompute_rope_freqs": lambda t: {"dim": 8, "max_len": 4},
    "prepare": lambda t: {
        "source": t.text,
        "out_dir": t.folder / "out",
        "tokenizer": t.tokenizer,
    },
    "probe": lambda t: {"states_ND": torch.randn(20, 4), "labels": torch.arange(20) % 2},
    "process_group": lambda t: {"config": ParallelConfig(), "device": "cpu"},
    "push_to_hub": lambda t: {"checkpoint": t.saved, "name": "owner/name"},
    "quantize": lambda t: {"model": t.model, "kind": "int8"},
    "read_documents": lambda t: {"source": t.text},
    "read_questions": lambda t: {"path": t.text},
    "read_state": lambda t: {"path": t.saved},
    "routing_by_layer": lambda t: {"trace": LoopTrace(keep_routing=True)},
    "run_trajectory": lambda t: {"model": t.model, "input_ids": t.ids, "n_loops": 2},
    "save_pretrained": lambda t: {"model": t.model, "directory": t.folder / "again"},
    "train_gate": lambda t: {"model": t.model, "batches": [], "config": GateConfig()},
    "train_run": lambda t: {"config": t.run},
    "variant": lambda t: {"name": "nano"},
    "verify_checkpoint": lambda t: {"path": t.saved},
    "weight_bytes": lambda t: {"model": t.model},
}


def public() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class of the packages once."""
    seen: set[str] = set()
    for package in PACKAGES:
        module = importlib.import_module(f"open_mythos{package}")
        for name in module.__all__:
            thing = getattr(module, name)
            known = name in seen or name.startswith("mythos_") or not callable(thing)
            seen.add(name)
            if not known and (inspect.isfunction(thing) or inspect.isclass(thing)):
                yield name, thing
