"""``open-mythos plan``: what a training needs and costs, before it is paid for."""

from __future__ import annotations

from json import dumps
from math import ceil

from rich.console import Console
from rich.table import Table

from open_mythos.cli.info import described_model
from open_mythos.plan import Job, Plan, Wish, make_plan, parse_count
from open_mythos.plan import gpu as gpu_named
from open_mythos.plan.hardware import LINK_EFFICIENCY, MFU, NODE, USABLE
from open_mythos.plan.tracker import Part

LONGEST_CONTEXT = 8192
"""Tokens of a training sequence at most, unless asked for: long contexts are trained last."""
TOKENS_PER_PARAMETER = 20
"""Where no tokens are given (arXiv 2203.15556)."""
WIDTH = 100


def plan(
    model: str,
    gpus: int = 8,
    gpu: str = "h100",
    tokens: str = "",
    context: int | None = None,
    n_loops: float | None = None,
    max_loops: int | None = None,
    grad_loops: int | None = None,
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    ema: bool = False,
    global_batch_tokens: str = "",
    mfu: float | None = None,
    price: float | None = None,
    kind: str = "",
    shard: int | None = None,
    experts: int | None = None,
    micro_batch: int | None = None,
    checkpoint_loops: bool | None = None,
    json: bool = False,
) -> int:
    """Estimate memory, communication, layout, time and cost of a training run.

    Args:
        model: A variant (3b), a YAML or JSON file with a model's configuration, or a folder with a
            model, a checkpoint or a run.
        gpus: How many there are, in nodes of eight.
        gpu: "h100", "h200" or "b200".
        tokens: To train on: 30B, 1.5T, 3e10; by default 20 for each parameter.
        context: Tokens of a sequence; by default the model's context, at most 8192.
        n_loops: Mean loops of a sequence; by default the model's max_loop_iters.
        max_loops: Most loops of a sequence, which memory has to hold; by default the mean.
        grad_loops: Truncated back-propagation through so many loops; by default all.
        dtype: Of the matmuls: "bfloat16", "float16" or "float32".
        optimizer: "adamw" or "muon".
        ema: Keep a running mean of the weights.
        global_batch_tokens: Of a step: 4M; by default 4 Mi, or a sequence for each GPU.
        mfu: Share of the peak rate while computing; by default 0.3.
        price: US dollars of a GPU for an hour; by default that of a table.
        kind: "none", "ddp" or "fsdp"; by default the plan chooses, as of the next four.
        shard: GPUs that share one copy of the weights.
        experts: Size of the expert-parallel group.
        micro_batch: Sequences that a GPU computes at a time.
        checkpoint_loops: Whether loops are recomputed in the backward pass.
        json: Print JSON instead of tables.

    Raises:
        DoesNotFitError: No layout of the GPUs holds the training.
        ConfigError: An argument is out of range.
        DataError: The model's file is not a configuration.
    """
    cfg, n_layers = described_model(model)
    loops = 1 if n_layers is not None else n_loops or max_loops or cfg.max_loop_iters
    job = Job(
        cfg, n_layers, context=context or min(cfg.max_seq_len, LONGEST_CONTEXT), n_loops=loops,
        max_loops=max_loops or ceil(loops), grad_loops=grad_loops, dtype=dtype,
        optimizer=optimizer, ema=ema,
    )  # fmt: skip
    given = tokens not in ("", 0)
    wanted = parse_count(tokens, "tokens") if given else float(
        TOKENS_PER_PARAMETER * job.counts.parameters
    )  # fmt: skip
    batch = parse_count(global_batch_tokens, "global_batch_tokens") if global_batch_tokens else 0
    made = make_plan(
        job, gpu_named(gpu), gpus, wanted,
        batch_tokens=batch, mfu=MFU if mfu is None else mfu, price=price,
        wish=Wish(kind or None, shard, experts, micro_batch, checkpoint_loops),
    )  # fmt: skip
    if json:
        print(dumps({"name": model} | made.to_dict()))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for part in (_summary(model, made, given), _depths(made), _memory(made), _kept(made),
                 _traffic(made), _training(made), _inference(made)):  # fmt: skip
        if part is not None:
            console.print(part)
            console.print()
    console.print(_assumptions(made), style="dim", highlight=False)
    return 0


def _summary(name: str, plan: Plan, given: bool) -> Table:
    job, layout, counts = plan.job, plan.layout, plan.job.counts
    table = _table(f"{name} on {layout.gpus:,} x {plan.gpu.name}", header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("figure", overflow="fold")
    table.add_row(
        "parameters", f"{_count(counts.parameters)}, {_count(counts.active_parameters)} of them "
        "active in a token",
    )  # fmt: skip
    if job.looped:
        depth = f"{job.n_loops:g} loops" if job.n_loops == job.max_loops else (
            f"{job.n_loops:g} loops on average, {job.max_loops} at most"
        )  # fmt: skip
        if job.grad_loops is not None:
            depth += f", gradient through the last {job.grad_loops}"
        table.add_row("depth", depth)
    table.add_row(
        "tokens", f"{_count(plan.tokens)}" + ("" if given else " (20 for each parameter)")
    )
    table.add_row(
        "step", f"{layout.global_batch:,} sequences of {job.context:,} tokens: "
        f"{_count(plan.step_tokens)} tokens",
    )  # fmt: skip
    table.add_section()
    table.add_row("layout", layout.name)
    table.add_row(
        "each GPU", f"{layout.micro_batches} x {layout.micro_batch} sequences, loops "
        + ("recomputed in the backward pass" if layout.checkpoint_loops else "kept"),
    )  # fmt: skip
    table.add_row("options", layout.options(job))
    return table


def _depths(plan: Plan) -> Table:
    length = f"{plan.job.context:,} tokens"
    table = _table(
        "FLOPs of a token by depth",
        caption=f"forward and training: mean over {length}; decoding: at their end",
    )
    for heading in ("loops", "forward", "training", "decoding"):
        table.add_column(heading, justify="right")
    for each in plan.depths():
        table.add_row(
            str(each.n_loops), _flop(each.forward_flops()),
            _flop(each.training_flops(grad_loops=plan.job.grad_loops)), _flop(each.decode_flops()),
        )  # fmt: skip
    return table


def _memory(plan: Plan) -> Table:
    here, other = plan.memory, plan.other_memory
    table = _table(
        "peak memory of a GPU during a step",
        caption=f"usable: {_bytes(plan.gpu.usable)} of {_bytes(plan.gpu.memory)}",
    )
    table.add_column("", no_wrap=True)
    table.add_column("planned", justify="right")
    if other is not None:
        recomputed = plan.layout.checkpoint_loops
        table.add_column("loops kept" if recomputed else "loops recomputed", justify="right")
    both = [each for each in (here, other) if each is not None]
    for part in Part:
        row = [each.parts.get(part.value, 0) for each in both]
        if any(row):
            table.add_row(part.value, *(_bytes(n) if n else "-" for n in row))
    table.add_section()
    table.add_row("all", *(_bytes(each.total) for each in both))
    table.add_row("of the usable", *(f"{each.total / plan.gpu.usable:.0%}" for each in both))
    table.add_row("peak phase", *(_PHASES[each.phase] for each in both))
    return table


_PHASES = {"backward": "forward, backward", "optimizer": "optimizer step"}


def _kept(plan: Plan) -> Table | None:
    if not plan.activations:
        return None
    table = _table("activations that one loop keeps for each token")
    for name in plan.activations:
        table.add_column(name, justify="right")
    table.add_row(*(_bytes(n) for n in plan.activations.values()))
    return table


def _traffic(plan: Plan) -> Table | None:
    if not plan.traffic:
        return None
    table = _table("communication of a GPU in a step (received)")
    table.add_column("", no_wrap=True)
    for heading in ("NVLink", "network", "time"):
        table.add_column(heading, justify="right")
    for each in plan.traffic:
        table.add_row(each.what, _bytes(each.nvlink), _bytes(each.network), _time(each.seconds))
    if len(plan.traffic) > 1:
        table.add_section()
        table.add_row(
            "all", _bytes(sum(each.nvlink for each in plan.traffic)),
            _bytes(sum(each.network for each in plan.traffic)), _time(plan.traffic_seconds),
        )  # fmt: skip
    return table


def _training(plan: Plan) -> Table:
    table = _table(
        f"training: {plan.steps:,} steps, {plan.flops:.3g} useful FLOPs",
        caption="best: communication overlaps with computing; worst: none of it does",
    )
    table.add_column("", no_wrap=True)
    for heading in ("best", "worst"):
        table.add_column(heading, justify="right")
    seconds = plan.step_seconds
    table.add_row("a step", *(_time(s) for s in seconds))
    table.add_row("tokens a second", *(_count(plan.step_tokens / s) for s in seconds))
    table.add_row("MFU", *(f"{share:.0%}" for share in plan.utilisation))
    table.add_row("days", *(f"{days:,.1f}" for days in plan.days))
    table.add_row("GPU hours", *(f"{hours:,.0f}" for hours in plan.gpu_hours))
    table.add_row("cost", *(f"${cost:,.0f}" for cost in plan.cost))
    return table


def _inference(plan: Plan) -> Table:
    counts, positions = plan.job.counts, plan.job.cfg.max_seq_len
    table = _table(f"inference in bfloat16: weights {_bytes(2 * counts.parameters)}")
    table.add_column("cache", no_wrap=True)
    for heading in ("a token", f"{positions:,} tokens"):
        table.add_column(heading, justify="right")
    rows = {"exact": plan.cache_bytes()}
    if plan.job.looped:
        rows = {
            f"a slot for each of {plan.job.max_loops} loops": plan.cache_bytes(),
            "one slot for all loops": plan.cache_bytes(share_loops=True),
        }
    for name, n in rows.items():
        table.add_row(name, _bytes(n / positions), _bytes(n))
    return table


def _assumptions(plan: Plan) -> str:
    gpu_ = plan.gpu
    return (
        f"Assumed: matmuls at {plan.mfu:.0%} of {gpu_.rate(plan.job.dtype) / 1e12:,.0f} TFLOP/s "
        f"(--mfu), ${plan.price:,.2f} for a GPU hour (--price), nodes of {NODE} GPUs, NVLink "
        f"{gpu_.nvlink / 1e9:,.0f} GB/s and network {gpu_.network / 1e9:,.0f} GB/s each way at "
        f"{LINK_EFFICIENCY:.0%}, {1 - USABLE:.0%} of the memory kept free, experts evenly loaded. "
        f"Sources: {gpu_.source}. GB are 10^9 bytes. docs/plan.md has the formulas."
    )


def _table(title: str, caption: str | None = None, header: bool = True) -> Table:
    return Table(
        title=title, title_justify="left", caption=caption, caption_justify="left",
        show_header=header, title_style="bold", min_width=min(WIDTH, len(title) + 2),
    )  # fmt: skip


def _count(value: float) -> str:
    """ "2.98 B"."""
    return _scaled(value, ("", " k", " M", " B", " T")).strip()


def _flop(value: float) -> str:
    return _scaled(value, (" ", " k", " M", " G", " T", " P")) + "FLOP"


def _bytes(value: float) -> str:
    return _scaled(value, (" ", " k", " M", " G", " T")) + "B"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.5 and power + 1 < len(units):
        value, power = value / 1000, power + 1
    return f"{value:.3g}{units[power]}" if value < 999.5 else f"{value:,.0f}{units[power]}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
