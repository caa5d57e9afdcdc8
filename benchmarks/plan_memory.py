"""``python -m benchmarks.plan_memory``: planned memory against measured training steps.

Small models train on a CPU, in one process and in two. The peak of a step comes from allocations
recorded by PyTorch's profiler, plus weights and optimizer state, which were allocated before. The
prediction is that of ``open-mythos plan`` for CPU code paths.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from open_mythos.config import MythosConfig
from open_mythos.data import Batch
from open_mythos.plan import Job, Layout, memory
from open_mythos.plan.memory import held_bytes
from open_mythos.train import (
    DepthConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    build_model,
)
from open_mythos.train.optimizers.muon import local

OUT = Path(__file__).resolve().parent / "results" / "plan_memory.json"
PROCESSES = 2
SLACK = 2048
"""Bytes that a step may leave allocated besides its batch; more means the profiler missed some."""
ATTEMPTS = 8
"""Measured steps with several processes."""


@dataclass(frozen=True)
class Case:
    """A training run to predict and measure."""

    name: str
    dim: int = 64
    model: tuple[tuple[str, Any], ...] = ()
    """Fields of the configuration that differ from :func:`model_of`'s."""
    batch: int = 4
    tokens: int = 64
    loops: int = 4
    micro_batch: int | None = None
    grad_loops: int | None = None
    checkpoint: bool = False
    dtype: str = "float32"
    optimizer: str = "adamw"
    kind: str = "none"
    experts: int = 1


@dataclass(frozen=True)
class Row:
    """Predicted and measured bytes of one process."""

    name: str
    held_planned: int
    """Weights and optimizer state."""
    held: int
    planned: int
    """Total at the peak."""
    measured: int

    @property
    def error(self) -> float:
        """Relative error of the predicted peak."""
        return self.planned / self.measured - 1

    @property
    def step_error(self) -> float:
        """Relative error without the bytes held between steps."""
        return (self.planned - self.held_planned) / (self.measured - self.held) - 1


def model_of(case: Case) -> MythosConfig:
    """Return a small model with all features enabled."""
    dim = case.dim
    fields: dict[str, Any] = {
        "vocab_size": 320, "dim": dim, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 1024,
        "max_loop_iters": 8, "prelude_layers": 1, "coda_layers": 1, "kv_lora_rank": dim // 2,
        "q_lora_rank": dim // 2, "qk_rope_head_dim": dim // 8, "qk_nope_head_dim": dim // 4,
        "v_head_dim": dim // 4, "n_experts": 8, "n_shared_experts": 1, "n_experts_per_tok": 2,
        "expert_dim": dim // 2, "lora_rank": 4,
    }  # fmt: skip
    return MythosConfig(**(fields | dict(case.model)))


def cases() -> list[Case]:
    """Return single-process cases: attention, FFN, dtype, checkpointing, loops, batches, widths."""
    found = [
        Case(
            f"{attention}, {feed}, {dtype}, {mode}",
            model=(("attn_type", attention), *(() if feed == "experts" else (("n_experts", 0),))),
            dtype=dtype,
            **how,
        )
        for attention in ("mla", "gqa")
        for feed in ("experts", "dense")
        for dtype in ("float32", "bfloat16")
        for mode, how in (
            ("kept", {}), ("checkpointed", {"checkpoint": True}),
            ("last 2 loops", {"grad_loops": 2}),
        )
    ]  # fmt: skip
    found += [
        Case(f"{loops} loops, {mode}", loops=loops, dtype="bfloat16", checkpoint=mode != "kept")
        for loops in (1, 8)
        for mode in ("kept", "checkpointed")
    ]
    found += [
        Case("1 sequence of 32", batch=1, tokens=32, dtype="bfloat16"),
        Case("8 sequences of 128", batch=8, tokens=128, loops=2),
        Case("micro-batches", batch=4, micro_batch=1, checkpoint=True, dtype="bfloat16"),
        Case("dim 128", dim=128, batch=2, loops=3, dtype="bfloat16", checkpoint=True),
        Case("dim 256", dim=256, batch=2, loops=2, dtype="bfloat16"),
        Case("many tokens for each expert", model=(("n_experts", 2),), batch=8, loops=2),
        Case("row sizes without grouped matmul", model=(("expert_dim", 21),), loops=2),
        Case("32 experts", dim=128, model=(("n_experts", 32),), batch=1, tokens=32, loops=2),
        Case("vocabulary of 4096", model=(("vocab_size", 4096),), batch=8, tokens=256, loops=1),
        Case("tied, 4096", model=(("vocab_size", 4096), ("tie_embeddings", True)), loops=1),
        Case("latent scores", model=(
            ("kv_lora_rank", 8), ("qk_rope_head_dim", 4), ("qk_nope_head_dim", 32),
            ("v_head_dim", 32),
        ), loops=2),
        Case("dropout, random start", model=(("dropout", 0.1), ("initial_state", "normal")),
             loops=2),
        Case("two blocks, no extras", model=(
            ("recurrent_layers", 2), ("loop_embedding", True), ("readout", False),
            ("lora_rank", 0), ("prelude_norm", False), ("injection_matrix", "diagonal"),
            ("q_lora_rank", 0), ("initial_state", "prelude"),
        ), loops=2),
        Case("Muon", dim=128, model=(("n_experts", 16),), batch=1, tokens=8, loops=1,
             optimizer="muon"),
        Case("Muon, GQA, dense", dim=128, model=(("n_experts", 0), ("attn_type", "gqa")), batch=1,
             tokens=8, loops=1, optimizer="muon"),
    ]  # fmt: skip
    return found


def distributed_cases() -> list[Case]:
    """Return cases with two processes."""
    half = {"dtype": "bfloat16", "tokens": 32, "loops": 3}
    return [
        Case("DDP", kind="ddp", tokens=32, loops=3),
        Case("DDP, bfloat16, micro-batches", kind="ddp", micro_batch=1, **half),
        Case("FSDP", kind="fsdp", tokens=32, loops=3),
        Case("FSDP, bfloat16", kind="fsdp", **half),
        Case("FSDP, bfloat16, micro-batches, checkpointed", kind="fsdp", micro_batch=1,
             checkpoint=True, **half),
        Case("experts divided", kind="fsdp", experts=2, tokens=32, loops=3),
        Case("experts divided, bfloat16", kind="fsdp", experts=2, **half),
        Case("experts divided, bfloat16, checkpointed", kind="fsdp", experts=2, checkpoint=True,
             **half),
    ]  # fmt: skip


def planned(case: Case) -> tuple[int, int]:
    """Return the planned bytes held between steps and at the peak."""
    processes = 1 if case.kind == "none" else PROCESSES
    share = case.batch // processes
    micro = min(case.micro_batch or share, share)
    layout = Layout(
        processes, case.kind, processes if case.kind == "fsdp" else 1, case.experts,
        case.checkpoint, micro, share // micro,
    )  # fmt: skip
    job = Job(
        model_of(case), context=case.tokens, n_loops=case.loops, max_loops=case.loops,
        grad_loops=case.grad_loops, dtype=case.dtype, optimizer=case.optimizer,
    )  # fmt: skip
    return held_bytes(job, layout), memory(job, layout, kernels="cpu").total


def measured(case: Case, rank: int = 0, processes: int = 1) -> tuple[int, int] | None:
    """Return the measured bytes held between steps and at the peak.

    None if no step freed all it allocated, because the profiler missed another thread.
    """
    run = RunConfig(
        model=model_of(case),
        depth=DepthConfig(plan="fixed", mean=float(case.loops)),
        optim=OptimConfig(name=case.optimizer),
        train=TrainConfig(
            steps=100, seq_len=case.tokens, global_batch=case.batch, micro_batch=case.micro_batch,
            dtype=case.dtype, checkpoint_loops=case.checkpoint, grad_loops=case.grad_loops,
            device="cpu", log_every=1,
        ),
        parallel=ParallelConfig(kind=case.kind, experts=case.experts),
    )  # fmt: skip
    trainer = Trainer(build_model(run), _Loader(case, rank, processes), run)
    for step in range(2):
        trainer.train_step(step)
    held = _held(trainer)
    # DDP's buckets, as large as all gradients, were allocated before
    buckets = 0
    if case.kind == "ddp":
        buckets = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    # every process runs the same number of steps: collectives have to match
    steps = range(2, 3 if processes == 1 else 2 + ATTEMPTS)
    found = [_peak(lambda step=step: trainer.train_step(step)) for step in steps]
    allowed = SLACK + 24 * case.batch * case.tokens
    peaks = [peak for peak, left in found if abs(left) <= allowed]
    return (held, held + buckets + min(peaks)) if peaks else None


class _Loader:
    """Random tokens."""

    def __init__(self, case: Case, rank: int, processes: int) -> None:
        self.step, self._case = 0, case
        size = case.batch // processes
        self._mine = slice(rank * size, (rank + 1) * size)

    def next_batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        shape = self._case.batch, self._case.tokens + 1
        ids = torch.randint(model_of(self._case).vocab_size, shape, generator=generator)
        ids, index = ids[self._mine], torch.arange(self._case.batch)[self._mine]
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, index)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _held(trainer: Trainer) -> int:
    """Return the bytes of weights, buffers and optimizer state, counting each storage once."""
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    here = [local(tensor.detach()).untyped_storage() for tensor in tensors]
    storages = {storage.data_ptr(): storage for storage in here}
    return sum(storage.nbytes() for storage in storages.values())


def _peak(call: Callable[[], object]) -> tuple[int, int]:
    """Return the peak of bytes allocated by ``call``, and the bytes it left allocated."""
    with profile(
        acc_events=True, activities=[ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live


TRIES = 4
"""Attempts per case with several processes: background threads may disturb a measurement."""


class DisturbedError(RuntimeError):
    """No step freed all it allocated."""


def row(case: Case) -> Row:
    """Measure a single-process case."""
    return _row(case, [measured(case)])


def _row(case: Case, found: Sequence[tuple[int, int] | None]) -> Row:
    """Return the row of the least disturbed process."""
    seen = [pair for pair in found if pair is not None]
    if not seen:
        raise DisturbedError(f"{case.name}: no step freed all it allocated")
    held, peak = min(seen, key=lambda pair: pair[1])
    held_planned, peak_planned = planned(case)
    return Row(case.name, held_planned, held, peak_planned, peak)


def row_of_processes(case: Case) -> Row:
    """Measure a case in two processes; retry if background threads disturbed it."""
    for tries_left in reversed(range(TRIES)):
        try:
            (found,) = distributed_rows([case])
            return found
        except DisturbedError:
            if not tries_left:
                raise
    raise AssertionError


def distributed_rows(all_of: Sequence[Case]) -> Iterator[Row]:
    """Measure cases in two processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        workers = [
            context.Process(target=_work, args=(rank, folder, all_of, queue))
            for rank in range(PROCESSES)
        ]
        for worker in workers:
            worker.start()
        found = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
    for results in found:
        if isinstance(results, str):
            raise RuntimeError(results)
    for i, case in enumerate(all_of):
        yield _row(case, [results[i] for results in found])


def _work(rank: int, folder: str, all_of: Sequence[Case], queue: Any) -> None:
    """Measure all cases in one process, or report the error."""
    torch.set_num_threads(1)
    found = []
    try:
        for i, case in enumerate(all_of):
            store = dist.FileStore(str(Path(folder) / f"store{i}"), PROCESSES)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
            )
            found.append(measured(case, rank, PROCESSES))
            dist.destroy_process_group()
    except Exception as error:
        queue.put(f"process {rank}: {error!r}")
    else:
        queue.put(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="run one case and write nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    alone, together = cases(), distributed_cases()
    if options.quick:
        alone, together = alone[:1], []
    rows = [row(case) for case in alone]
    rows += [row_of_processes(case) for case in together]
    table = Table(title="peak of a training step, in kB of one process")
    for heading in ("", "planned", "measured", "error", "without weights and state"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in rows:
        table.add_row(
            each.name, f"{each.planned / 1e3:,.0f}", f"{each.measured / 1e3:,.0f}",
            f"{each.error:+.2%}", f"{each.step_error:+.2%}",
        )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    worst = {name: max(abs(getattr(each, name)) for each in rows) for name in
             ("error", "step_error")}  # fmt: skip
    console.print(", ".join(f"worst {name} {value:.2%}" for name, value in worst.items()))
    if not options.quick:
        content = {
            "machine": machine.describe(), "worst": worst,
            "rows": [asdict(each) | {"error": each.error, "step_error": each.step_error}
                     for each in rows],
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
