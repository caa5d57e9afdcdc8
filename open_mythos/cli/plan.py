"""``open-mythos plan``: memory, layout, time and cost of a training run."""

from __future__ import annotations

from json import dumps
from math import ceil

from rich.table import Table

from open_mythos.cli.info import described_model
from open_mythos.cli.tables import new_console, new_table, scaled
from open_mythos.console import show
from open_mythos.errors import ConfigError
from open_mythos.plan import Job, Plan, Wish, make_plan, parse_count
from open_mythos.plan import gpu as gpu_named
from open_mythos.plan.hardware import LINK_EFFICIENCY, MFU, NODE, USABLE
from open_mythos.plan.tracker import Part

LONGEST_CONTEXT = 8192
"""Default upper limit of a training sequence in tokens: long contexts are trained last."""
TOKENS_PER_PARAMETER = 20
"""Default length of a run (Chinchilla, arXiv 2203.15556)."""
WIDTH = 100
"""Of the tables in a file or pipe."""
UNKNOWN_WIDTH = 80
"""What rich takes where neither a terminal nor COLUMNS names a width."""


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
        gpus: Number of GPUs, in nodes of eight.
        gpu: "h100", "h200" or "b200".
        tokens: Training tokens: 30B, 1.5T, 3e10; by default 20 per parameter.
        context: Tokens of a sequence; by default the model's context, at most 8192.
        n_loops: Mean loops of a sequence; by default the model's max_loop_iters.
        max_loops: Most loops of a sequence, which memory has to hold; by default the mean.
        grad_loops: Truncated backpropagation: loops that carry gradient; by default all.
        dtype: Dtype of the matmuls: "bfloat16", "float16" or "float32".
        optimizer: "adamw" or "muon".
        ema: Keep an exponential moving average of the weights.
        global_batch_tokens: Tokens per step: 4M; by default 4 Mi, or one sequence per GPU.
        mfu: Model FLOPs utilization while computing; by default 0.3.
        price: US dollars per GPU hour; by default a typical rental price.
        kind: "none", "ddp" or "fsdp"; like the next four, chosen by the plan if not given.
        shard: GPUs that share one copy of the weights.
        experts: Size of the expert-parallel group.
        micro_batch: Sequences that a GPU computes at a time.
        checkpoint_loops: Recompute loops in the backward pass.
        json: Print JSON instead of tables.
    """
    cfg, n_layers = described_model(model)
    asked = {"--n_loops": n_loops, "--max_loops": max_loops, "--grad_loops": grad_loops}
    loops: float = 1
    if n_layers is None:
        given = (each for each in (n_loops, max_loops) if each is not None)
        loops = next(given, cfg.max_loop_iters)
    else:
        for option, value in asked.items():
            if value is not None:
                raise ConfigError(
                    "a dense model has no loops", where=option, value=value, allowed="looped models"
                )
    job = Job(
        cfg, n_layers, n_loops=loops, grad_loops=grad_loops, dtype=dtype, optimizer=optimizer,
        ema=ema, max_loops=max(1, ceil(loops)) if max_loops is None else max_loops,
        context=min(cfg.max_seq_len, LONGEST_CONTEXT) if context is None else context,
    )  # fmt: skip
    default = float(TOKENS_PER_PARAMETER * job.counts.parameters)
    batch = parse_count(global_batch_tokens, "global_batch_tokens") if global_batch_tokens else 0
    made = make_plan(
        job, gpu_named(gpu), gpus, parse_count(tokens, "tokens") if tokens else default,
        batch_tokens=batch, mfu=MFU if mfu is None else mfu, price=price,
        wish=Wish(kind or None, shard, experts, micro_batch, checkpoint_loops),
    )  # fmt: skip
    if json:
        print(dumps({"name": model} | made.to_dict()))
        return 0
    console = new_console()
    if not console.is_terminal and console.width == UNKNOWN_WIDTH:
        console = new_console(width=WIDTH)
    tables = [_summary(model, made, given=bool(tokens)), _depths(made), _memory(made)]
    tables += [_activations(made)] if made.activations else []
    tables += [_traffic(made)] if made.traffic else []
    for table in (*tables, _training(made), _inference(made)):
        show(console, table)
        console.print()
    console.print(_assumptions(made), style="dim", highlight=False)
    return 0


def _summary(name: str, plan: Plan, given: bool) -> Table:
    job, layout, counts = plan.job, plan.layout, plan.job.counts
    table = new_table(f"{name} on {layout.gpus:,} x {plan.gpu.name}", ())
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    total, active = _count(counts.parameters), _count(counts.active_parameters)
    table.add_row("parameters", f"{total}, {active} active per token")
    if job.looped:
        depth = f"{job.n_loops:g} loops"
        if job.n_loops != job.max_loops:
            depth += f" on average, {job.max_loops} at most"
        if job.grad_loops is not None:
            depth += f", gradient through the last {job.last_loops}"
        table.add_row("depth", depth)
    table.add_row("tokens", _count(plan.tokens) + ("" if given else " (20 per parameter)"))
    size = f"{layout.global_batch:,} sequences of {job.context:,} tokens"
    table.add_row("step", f"{size}: {_count(plan.step_tokens)} tokens")
    table.add_section()
    table.add_row("layout", layout.name)
    each = f"{layout.micro_batches} x {layout.micro_batch} sequences"
    if job.looped:
        kept = "recomputed in the backward pass" if layout.checkpoint_loops else "kept"
        each += f", loops {kept}"
    table.add_row("each GPU", each)
    table.add_row("options", layout.options(job))
    return table


def _depths(plan: Plan) -> Table:
    table = new_table(
        "FLOPs per token by depth", ("loops", "forward", "training", "decoding"),
        f"forward and training: mean over {plan.job.context:,} tokens; decoding: at their end",
        first="right",
    )  # fmt: skip
    for each in plan.depths():
        training = each.training_flops(grad_loops=plan.job.grad_loops)
        flops = (each.forward_flops(), training, each.decode_flops())
        table.add_row(str(each.n_loops), *(scaled(n, "FLOP") for n in flops))
    return table


def _memory(plan: Plan) -> Table:
    columns = {"planned": plan.memory}
    if plan.other_memory is not None:
        other = "loops kept" if plan.layout.checkpoint_loops else "loops recomputed"
        columns[other] = plan.other_memory
    table = new_table(
        "peak memory of a GPU during a step", ("", *columns),
        f"usable: {_bytes(plan.gpu.usable)} of {_bytes(plan.gpu.memory)}",
    )  # fmt: skip
    both = columns.values()
    for part in Part:
        row = [each.parts.get(part.value, 0) for each in both]
        if any(row):
            table.add_row(part.value, *(_bytes(n) if n else "-" for n in row))
    table.add_section()
    table.add_row("all", *(_bytes(each.total) for each in both))
    table.add_row("of the usable", *(f"{each.total / plan.gpu.usable:.0%}" for each in both))
    phases = {"backward": "forward, backward", "optimizer": "optimizer step"}
    table.add_row("peak phase", *(phases[each.phase] for each in both))
    return table


def _activations(plan: Plan) -> Table:
    names = plan.activations
    table = new_table("activations stored per token and loop", names, first="right")
    table.add_row(*(_bytes(n) for n in names.values()))
    return table


def _traffic(plan: Plan) -> Table:
    table = new_table(
        "communication of a GPU per step (received)", ("", "NVLink", "network", "time")
    )
    for each in plan.traffic:
        table.add_row(each.what, _bytes(each.nvlink), _bytes(each.network), _time(each.seconds))
    if len(plan.traffic) > 1:
        sums = (sum(each.nvlink for each in plan.traffic), sum(x.network for x in plan.traffic))
        table.add_section()
        table.add_row("all", *map(_bytes, sums), _time(plan.traffic_seconds))
    return table


def _training(plan: Plan) -> Table:
    table = new_table(
        f"training: {plan.steps:,} steps, {plan.flops:.3g} model FLOPs", ("", "best", "worst"),
        "best: communication overlaps with compute; worst: no overlap",
    )  # fmt: skip
    seconds = plan.step_seconds
    table.add_row("step", *map(_time, seconds))
    table.add_row("tokens/s", *(_count(plan.step_tokens / s) for s in seconds))
    table.add_row("MFU", *(f"{share:.0%}" for share in plan.utilization))
    table.add_row("days", *(f"{days:,.1f}" for days in plan.days))
    table.add_row("GPU hours", *(f"{hours:,.0f}" for hours in plan.gpu_hours))
    table.add_row("cost", *(f"${cost:,.0f}" for cost in plan.cost))
    return table


def _inference(plan: Plan) -> Table:
    counts, positions = plan.job.counts, plan.job.cfg.max_seq_len
    table = new_table(
        f"inference in bfloat16: weights {_bytes(2 * counts.parameters)}",
        ("cache", "per token", f"{positions:,} tokens"),
    )
    slots = f"a slot for each of {plan.job.max_loops} loops" if plan.job.looped else "exact"
    rows = {slots: plan.cache_bytes()}
    if plan.job.looped:
        rows["one slot for all loops"] = plan.cache_bytes(share_loops=True)
    for name, n in rows.items():
        table.add_row(name, _bytes(n / positions), _bytes(n))
    return table


def _assumptions(plan: Plan) -> str:
    gpu_ = plan.gpu
    return (
        f"Assumed: matmuls at {plan.mfu:.0%} of {gpu_.rate(plan.job.dtype) / 1e12:,.0f} TFLOP/s "
        f"(--mfu), ${plan.price:,.2f} per GPU hour (--price), nodes of {NODE} GPUs, NVLink "
        f"{gpu_.nvlink / 1e9:,.0f} GB/s and network {gpu_.network / 1e9:,.0f} GB/s each way at "
        f"{LINK_EFFICIENCY:.0%}, {1 - USABLE:.0%} of the memory kept free, experts evenly loaded. "
        f"Sources: {gpu_.source}. GB are 10^9 bytes. docs/plan.md has the formulas."
    )


def _count(value: float) -> str:
    return scaled(value, "", prefixes=("", "k", "M", "B", "T")).strip()


def _bytes(value: float) -> str:
    return scaled(value, "B")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
