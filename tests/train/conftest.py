"""A tiny run: seconds of training on one core."""

from dataclasses import replace

import pytest
import torch

from open_mythos.config import MythosConfig
from open_mythos.data import Batch
from open_mythos.distributed import rank, world_size
from open_mythos.errors import DataError
from open_mythos.seeding import seeded_generator
from open_mythos.train import (
    DepthConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

MODEL = MythosConfig(
    vocab_size=13, dim=16, n_heads=2, n_kv_heads=1, max_seq_len=16, max_loop_iters=4,
    prelude_layers=1, coda_layers=1, attn_type="gqa", n_experts=4, n_shared_experts=1,
    n_experts_per_tok=2, expert_dim=8, lora_rank=2,
)  # fmt: skip


class CountingLoader:
    """Random tokens, a pure function of the step; some targets do not count."""

    def __init__(self, run: RunConfig, vocab: int = 13, fingerprint: str = "data") -> None:
        self.step, self.vocab, self.fingerprint = 0, vocab, fingerprint
        self.size, self.length = run.train.global_batch, run.train.seq_len
        self.mine = slice(
            rank() * self.size // world_size(), (rank() + 1) * self.size // world_size()
        )

    def next_batch(self, step: int) -> Batch:
        generator = seeded_generator(0, "test-data", step)
        ids = torch.randint(self.vocab, (self.size, self.length + 1), generator=generator)
        ids = ids.cummax(1).values  # something to learn
        targets = ids[:, 1:].clone()
        targets[0, : self.length // 2] = -100
        index = step * self.size + torch.arange(self.size)
        mine = self.mine
        return Batch(ids[mine, :-1].contiguous(), targets[mine], None, index[mine])

    def state_dict(self):
        return {"step": self.step, "fingerprint": self.fingerprint}

    def load_state_dict(self, state):
        if state["fingerprint"] != self.fingerprint:
            raise DataError("other data", where="fingerprint", value=state["fingerprint"])
        self.step = state["step"]


def tiny_run(
    model=None, depth=None, optim=None, train=None, parallel=None, architecture="looped"
) -> RunConfig:
    """Six steps of eight sequences; every section takes other values as a dict."""
    return RunConfig(
        architecture=architecture,
        model=replace(MODEL, **(model or {})),
        depth=DepthConfig(**({"mean": 2.5} | (depth or {}))),
        optim=OptimConfig(**(optim or {})),
        train=TrainConfig(
            **(
                {"steps": 6, "seq_len": 6, "global_batch": 8, "warmup_steps": 2, "log_every": 1,
                 "device": "cpu"} | (train or {})
            )
        ),
        parallel=ParallelConfig(**(parallel or {})),
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_run():
    """``make_run(model={...}, depth={...}, optim={...}, train={...}, architecture=...)``."""
    return tiny_run


@pytest.fixture(scope="session")
def make_loader():
    """``make_loader(run)``: batches of that run's shape."""
    return CountingLoader
