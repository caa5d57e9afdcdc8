"""Choose the layout with the shortest steps among those that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from open_mythos.errors import ConfigError
from open_mythos.plan.communication import communication
from open_mythos.plan.hardware import GPU, NODE
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.memory import Memory, counted_bytes, estimate, likely_bytes, memory
from open_mythos.plan.tracker import Part

MOST_GPUS, LEAST_CONTEXT = 65_536, 512
"""Most GPUs and shortest sequences that an error message suggests."""
NEARLY = 1.02
"""Of layouts whose steps take at most this many times the shortest, the simplest is taken."""
DOUBT = 0.9
"""A layout is not traced if this share of its quick estimate exceeds the memory."""
TRIED = 3
"""Layouts traced to answer whether any fits: those with the smallest quick estimates."""
MOST_TOKENS = 131_072
"""Largest micro-batch considered."""


class DoesNotFitError(ConfigError):
    """No layout of these GPUs holds the model.

    Attributes:
        layout: The most frugal layout that was found.
        least: What it needs on each GPU.
        gpus_needed: The fewest GPUs that suffice, by doubling; None if no number does. Equal to the
            given number if another layout than the requested one fits.
        context_that_fits: The longest sequences that fit, by halving; None if none do.
    """

    def __init__(
        self,
        job: Job,
        gpu: GPU,
        layout: Layout,
        least: Memory,
        gpus_needed: int | None,
        context_that_fits: int | None,
    ) -> None:
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
            ways.append("leave more of the layout to the plan: there is one that fits")
        elif gpus_needed is not None:
            ways.append(f"take {gpus_needed:,} of these GPUs")
        if context_that_fits not in (None, job.context):
            ways.append(f"train on sequences of {context_that_fits:,} tokens")
        fix = ", or ".join([*ways, "take GPUs with more memory"])
        if gpus_needed is None:
            fix += f"; no number of these up to {MOST_GPUS:,} does"
        super().__init__(
            "the training does not fit", where="plan",
            value=f"{_gb(least.total)} on each {gpu.name} at the least, {most}: {layout.name}",
            allowed=f"{_gb(gpu.usable)} of {_gb(gpu.memory)} on each of {layout.gpus:,}",
            fix=fix,
        )  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """The parts of a layout that the user fixes; None leaves the choice to the plan.

    Attributes:
        kind: "none", "ddp" or "fsdp".
        shard: GPUs that share one copy of the weights.
        experts: Size of the expert-parallel group.
        micro_batch: Sequences that a GPU computes at a time.
        checkpoint_loops: Whether loops are recomputed in the backward pass.
    """

    kind: str | None = None
    shard: int | None = None
    experts: int | None = None
    micro_batch: int | None = None
    checkpoint_loops: bool | None = None

    def allows(self, layout: Layout) -> bool:
        """Return whether ``layout`` has every fixed part."""
        return all(
            wanted is None or getattr(layout, name) == wanted for name, wanted in vars(self).items()
        )


def choose(
    job: Job, gpu: GPU, gpus: int, local_batch: int, mfu: float, wish: Wish | None = None
) -> Layout:
    """Return the fastest layout that fits; of several nearly as fast, the simplest.

    Args:
        job: What is trained.
        gpu: On what.
        gpus: On how many.
        local_batch: Sequences of a step for each of them.
        mfu: Share of the peak rate while computing.
        wish: The parts that are fixed.

    Raises:
        DoesNotFitError: None fits.
        ConfigError: No layout on this number of GPUs has the fixed parts.
    """
    wish = wish or Wish()
    ways = [way for way in layouts(job, gpus) if replace(wish, micro_batch=None).allows(way)]
    if wish.shard is None:  # less than a node is not worth its weights
        ways = [way for way in ways if way.kind != "fsdp" or way.shard >= min(NODE, gpus)]
    sizes = _sizes(job, local_batch)
    if wish.micro_batch is not None:
        sizes = [n for n in _divisors(local_batch) if n == wish.micro_batch]
    if not ways or not sizes:
        raise ConfigError(
            "there is no such layout", where="plan", value=wish,
            allowed=f"kinds, and divisors of {gpus} GPUs, of {job.cfg.n_experts} experts and of "
            f"{local_batch} sequences for each GPU",
            fix="leave some of it to the plan",
        )  # fmt: skip
    found = [
        replace(way, micro_batch=n, micro_batches=local_batch // n) for way in ways for n in sizes
    ]
    fastest = _fastest(job, gpu, found, mfu)
    if fastest is not None:
        return fastest
    layout = _frugal(job, [each for each in found if each.micro_batch == sizes[0]])[0]
    least = memory(job, layout)
    if wish != Wish() and _any_fits(job, gpu, gpus, local_batch):
        raise DoesNotFitError(job, gpu, layout, least, gpus, job.context)
    raise DoesNotFitError(
        job, gpu, layout, least, _gpus_needed(job, gpu, gpus, local_batch),
        _context_that_fits(job, gpu, gpus, local_batch),
    )  # fmt: skip


def step_seconds(job: Job, gpu: GPU, layout: Layout, mfu: float) -> tuple[float, float]:
    """Return the seconds of a step that are computing, and that are communication.

    Recomputation takes time too. No communication is assumed to overlap with computing.
    """
    tokens = layout.micro_batch * layout.micro_batches * job.context
    flops = job.training_flops() + (job.recomputed_flops() if layout.checkpoint_loops else 0.0)
    sent = sum(each.seconds for each in communication(job, layout, gpu))
    return tokens * flops / (mfu * gpu.rate(job.dtype)), sent


def fits(job: Job, gpu: GPU, layout: Layout) -> bool:
    """Return whether a GPU can hold its part."""
    return (
        _may_fit(job, gpu, layout)
        and estimate(job, layout).total <= gpu.usable
        and memory(job, layout).total <= gpu.usable
    )


def _may_fit(job: Job, gpu: GPU, layout: Layout) -> bool:
    """Return whether the quick estimates leave it open that ``layout`` fits."""
    if counted_bytes(job, layout) > gpu.usable:
        return False
    return DOUBT * likely_bytes(job, layout) <= gpu.usable


def _fastest(job: Job, gpu: GPU, all_of: list[Layout], mfu: float) -> Layout | None:
    """Return the simplest of those that fit and are nearly as fast as the fastest of them."""
    hopeful = [each for each in all_of if counted_bytes(job, each) <= gpu.usable]
    seconds = {each: sum(step_seconds(job, gpu, each, mfu)) for each in hopeful}
    # of equal times that with the larger micro-batch, whose matmuls are larger
    ordered = sorted(hopeful, key=lambda each: (seconds[each], -each.micro_batch))
    fastest: float | None = None
    too_large: dict[Layout, int] = {}
    near: list[Layout] = []
    for layout in ordered:
        if fastest is not None:
            if seconds[layout] > NEARLY * fastest:
                break
            near.append(layout)
        elif layout.micro_batch < too_large.get(_way(layout), layout.micro_batch + 1):
            if fits(job, gpu, layout):
                fastest, near = seconds[layout], [layout]
            else:
                too_large[_way(layout)] = layout.micro_batch
    return next((each for each in sorted(near, key=_complexity) if fits(job, gpu, each)), None)


def _way(layout: Layout) -> Layout:
    """All but the batch."""
    return replace(layout, micro_batch=1, micro_batches=1)


def _complexity(layout: Layout) -> tuple[float, ...]:
    """Sort key: the simpler, the smaller."""
    shape = 0 if layout.kind != "fsdp" else 1 if layout.shard == layout.gpus else 2
    odd = layout.kind == "fsdp" and layout.shard != layout.gpus and layout.shard != NODE
    return (layout.checkpoint_loops, layout.experts > 1, shape + odd, -layout.micro_batch)


def _frugal(job: Job, all_of: list[Layout]) -> list[Layout]:
    """Those that recompute loops, if there are any, by what they need at least."""
    recompute = [each for each in all_of if each.checkpoint_loops] or all_of
    return sorted(recompute, key=lambda each: counted_bytes(job, each))


def _any_fits(job: Job, gpu: GPU, gpus: int, local_batch: int) -> bool:
    """Return whether ``gpus`` suffice at one sequence at a time with recomputed loops."""
    ways = [replace(way, micro_batches=local_batch) for way in layouts(job, gpus)]
    ways = [way for way in _frugal(job, ways) if counted_bytes(job, way) <= gpu.usable]
    ways.sort(key=lambda way: likely_bytes(job, way))
    return any(fits(job, gpu, way) for way in ways[:TRIED])


def _gpus_needed(job: Job, gpu: GPU, gpus: int, local_batch: int) -> int | None:
    """Return the fewest GPUs, by doubling ``gpus``, that suffice."""
    more = gpus
    while (more := 2 * more) <= MOST_GPUS:
        if _any_fits(job, gpu, more, max(1, round(local_batch * gpus / more))):
            return more
    return None


def _context_that_fits(job: Job, gpu: GPU, gpus: int, local_batch: int) -> int | None:
    """Return the longest sequences, by halving, that ``gpus`` can train on."""
    shorter = job.context
    while (shorter := shorter // 2) >= LEAST_CONTEXT:
        if _any_fits(
            replace(job, context=shorter), gpu, gpus, local_batch * job.context // shorter
        ):
            return shorter
    return None


def layouts(job: Job, gpus: int) -> Iterator[Layout]:
    """Yield all ways to share ``job`` among ``gpus``, with micro-batches of one sequence."""
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


def _sizes(job: Job, local_batch: int) -> list[int]:
    """Micro-batches that divide the local batch, smallest first."""
    found = _divisors(local_batch)
    return [n for n in found if n == 1 or n * job.context <= MOST_TOKENS]


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _gb(count: float) -> str:
    return f"{count / 1e9:,.0f} GB"
