"""Choose the layout with the shortest steps among those that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd, isqrt

from open_mythos.checks import check_fields, checked
from open_mythos.errors import ConfigError
from open_mythos.plan.communication import communication
from open_mythos.plan.hardware import GPU, NODE
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.memory import Memory, counted_bytes, likely_bytes, memory
from open_mythos.plan.tracker import Part

MOST_GPUS, LEAST_CONTEXT = 65_536, 512
"""Most GPUs of a plan, and the shortest sequences that an error message suggests."""
NEARLY = 1.02
"""Layouts with steps up to this factor of the shortest count as equally fast."""
DOUBT = 0.9
"""A layout is not traced if this share of its quick estimate exceeds the memory."""
TRIED = 3
"""Layouts traced to decide whether any fits: those with the smallest quick estimates."""
MOST_TOKENS = 131_072
"""Largest micro-batch considered, in tokens."""


class DoesNotFitError(ConfigError):
    """No layout over the given GPUs fits in memory.

    Attributes:
        layout: The layout found with the smallest memory.
        least: Its memory per GPU.
        gpus_needed: Number of GPUs that suffices, found by doubling; None if none does. Equal to
            the given number if a layout other than the requested one fits.
        context_that_fits: Sequence length that fits, found by halving; None if none does.
    """

    def __init__(
        self, job: Job, gpu: GPU, layout: Layout, least: Memory, gpus_needed: int | None,
        context_that_fits: int | None,
    ) -> None:  # fmt: skip
        self.layout, self.least = layout, least
        self.gpus_needed, self.context_that_fits = gpus_needed, context_that_fits
        worst = max(least.parts, key=lambda name: least.parts[name])
        most = f"{_gb(least.parts[worst])} of it {worst}"
        if worst == Part.GATHERED.value:
            whole = [each for each in job.parameters if not each.regathered
                     and not (each.expert and layout.experts > 1)]  # fmt: skip
            largest = max(whole, key=lambda each: each.n)
            most += f" (the largest {largest.name}, {largest.n / 1e9:.3g} B elements)"
        ways = []
        if gpus_needed == layout.gpus:
            ways.append("leave more of the layout to the plan: another layout fits")
        elif gpus_needed is not None:
            ways.append(f"use {gpus_needed:,} of these GPUs")
        if context_that_fits not in (None, job.context):
            ways.append(f"train on sequences of {context_that_fits:,} tokens")
        fix = ", or ".join([*ways, "use GPUs with more memory"])
        if gpus_needed is None:
            fix += f"; no number of these up to {MOST_GPUS:,} suffices"
        super().__init__(
            "the training does not fit", where="plan",
            value=f"at least {_gb(least.total)} per {gpu.name}, {most}: {layout.name}",
            allowed=f"{_gb(gpu.usable)} of {_gb(gpu.memory)} on each of {layout.gpus:,}",
            fix=fix,
        )  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """Fixed fields of the :class:`Layout`; None leaves the choice to the plan."""

    kind: str | None = None
    shard: int | None = None
    experts: int | None = None
    micro_batch: int | None = None
    checkpoint_loops: bool | None = None

    def __post_init__(self) -> None:
        check_fields("", self)

    def allows(self, layout: Layout) -> bool:
        """Return whether ``layout`` has all fixed fields."""
        return all(
            wanted is None or getattr(layout, name) == wanted for name, wanted in vars(self).items()
        )


def choose(
    job: Job, gpu: GPU, gpus: int, local_batch: int, mfu: float, wish: Wish | None = None
) -> Layout:
    """Return the fastest layout that fits; among nearly as fast ones, the simplest.

    ``local_batch`` counts sequences per GPU and optimizer step; the other arguments are those of
    :func:`open_mythos.plan.make_plan`.

    Raises:
        DoesNotFitError: No layout fits.
        ConfigError: No layout over this number of GPUs has the fixed fields.
    """
    wish = wish or Wish()
    sizes = _divisors(local_batch)
    if wish.micro_batch is None:
        sizes = [n for n in sizes if n == 1 or n * job.context <= MOST_TOKENS]
    found = [
        each
        for way in layouts(job, gpus)
        # a copy of the weights in less than a node saves too little communication
        if wish.shard is not None or way.kind != "fsdp" or way.shard >= min(NODE, gpus)
        for each in (replace(way, micro_batch=n, micro_batches=local_batch // n) for n in sizes)
        if wish.allows(each)
    ]
    if not found:
        raise ConfigError(
            "no such layout", where="plan", value=wish,
            allowed=f"kinds, and divisors of {gpus} GPUs, of {job.cfg.n_experts} experts and of "
            f"{local_batch} sequences per GPU",
            fix="leave some of it to the plan",
        )  # fmt: skip
    fastest = _fastest(job, gpu, found, mfu)
    if fastest is not None:
        return fastest
    smallest = found[0].micro_batch
    layout = _frugal(job, [each for each in found if each.micro_batch == smallest])[0]
    needed: int | None = gpus
    context: int | None = job.context
    if wish == Wish() or not _any_fits(job, gpu, gpus, local_batch):
        more = (gpus << k for k in range(1, (MOST_GPUS // gpus).bit_length()))
        batches = ((n, max(1, round(local_batch * gpus / n))) for n in more)
        needed = next((n for n, batch in batches if _any_fits(job, gpu, n, batch)), None)
        context = context_that_fits(job, gpu, gpus, local_batch)
    raise DoesNotFitError(job, gpu, layout, memory(job, layout), needed, context)


def context_that_fits(job: Job, gpu: GPU, gpus: int, local_batch: int) -> int | None:
    """Return the sequence length that fits, by halving; the tokens of a step stay the same."""
    for k in range(1, (job.context // LEAST_CONTEXT).bit_length()):
        shorter = replace(job, context=job.context >> k)
        if _any_fits(shorter, gpu, gpus, local_batch * job.context // shorter.context):
            return shorter.context
    return None


def step_seconds(job: Job, gpu: GPU, layout: Layout, mfu: float) -> tuple[float, float]:
    """Return the compute and the communication seconds of a step, without overlap."""
    tokens = layout.micro_batch * layout.micro_batches * job.context
    flops = job.training_flops() + (job.recomputed_flops() if layout.checkpoint_loops else 0.0)
    sent = sum(each.seconds for each in communication(job, layout, gpu))
    return tokens * flops / (mfu * gpu.rate(job.dtype)), sent


def fits(job: Job, gpu: GPU, layout: Layout) -> bool:
    """Return whether ``layout`` fits in memory, from the cheapest estimate to the full trace."""
    return (
        counted_bytes(job, layout) <= gpu.usable
        and DOUBT * likely_bytes(job, layout) <= gpu.usable
        and memory(job, layout, exact=False).total <= gpu.usable
        and memory(job, layout).total <= gpu.usable
    )


@checked
def layouts(job: Job, gpus: int) -> Iterator[Layout]:
    """Yield all layouts of ``job`` over ``gpus``, with micro-batches of one sequence."""
    for checkpoint in (False, True) if job.looped else (False,):
        if gpus == 1:
            yield Layout(1, "none", checkpoint_loops=checkpoint)
            continue
        yield Layout(gpus, "ddp", checkpoint_loops=checkpoint)
        # training rejects truncated backpropagation with expert parallelism
        divides = job.looped and job.cfg.n_experts > 0 and job.grad_loops is None
        for experts in _divisors(gcd(gpus, job.cfg.n_experts)) if divides else [1]:
            for shard in _divisors(gpus)[1:]:
                yield Layout(gpus, "fsdp", shard, experts, checkpoint)


def _fastest(job: Job, gpu: GPU, candidates: list[Layout], mfu: float) -> Layout | None:
    """Return the simplest of the layouts that fit and are nearly as fast as the fastest of them."""
    hopeful = (each for each in candidates if counted_bytes(job, each) <= gpu.usable)
    seconds = {each: sum(step_seconds(job, gpu, each, mfu)) for each in hopeful}
    # at equal times, larger micro-batches first: their matmuls are larger
    ordered = sorted(seconds, key=lambda each: (seconds[each], -each.micro_batch))
    too_large: dict[Layout, int] = {}
    for layout in ordered:
        way = replace(layout, micro_batch=1, micro_batches=1)
        if layout.micro_batch >= too_large.get(way, layout.micro_batch + 1):
            continue
        if fits(job, gpu, layout):
            limit = NEARLY * seconds[layout]
            near = [each for each in ordered[ordered.index(layout) :] if seconds[each] <= limit]
            return next(each for each in sorted(near, key=_complexity) if fits(job, gpu, each))
        too_large[way] = layout.micro_batch
    return None


def _complexity(layout: Layout) -> tuple[float, ...]:
    """Return a sort key, smallest for the simplest layout."""
    shape = 0 if layout.kind != "fsdp" else 1 if layout.shard == layout.gpus else 2
    odd = layout.kind == "fsdp" and layout.shard != layout.gpus and layout.shard != NODE
    return (layout.checkpoint_loops, layout.experts > 1, shape + odd, -layout.micro_batch)


def _frugal(job: Job, candidates: list[Layout]) -> list[Layout]:
    """Return the layouts with checkpointing, if any, sorted by their lower bound of memory."""
    recompute = [each for each in candidates if each.checkpoint_loops] or candidates
    return sorted(recompute, key=lambda each: counted_bytes(job, each))


def _any_fits(job: Job, gpu: GPU, gpus: int, local_batch: int) -> bool:
    """Return whether ``gpus`` suffice with micro-batches of one sequence and checkpointing."""
    ways = [replace(way, micro_batches=local_batch) for way in layouts(job, gpus)]
    ways = [way for way in _frugal(job, ways) if counted_bytes(job, way) <= gpu.usable]
    ways.sort(key=lambda way: likely_bytes(job, way))
    return any(fits(job, gpu, way) for way in ways[:TRIED])


def _divisors(n: int) -> list[int]:
    small = [k for k in range(1, isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})


def _gb(count: float) -> str:
    return f"{count / 1e9:,.0f} GB"
