"""Does weight-quantization error grow with the number of loops, and what does it cost?

``python -m experiments.studies.quantized_quality`` trains two small looped models (six minutes on
one core), quantizes them in several ways and compares each with its float32 original over 1 to 32
loops. One models the bytes of Python's standard library and converges within a few loops; the other
follows chains of ten relations, one per loop, so its state must keep changing without loss. Writes
a JSON file, a plot and the tables of docs/quantization.md.

Expected before the first run: every loop adds the error of one quantized step. The linear part of a
loop shrinks earlier errors by rho(A) < 1; the residual branches have no such bound, but a model
trained at random depths converges, so earlier errors should decay. The relative error of the state
should rise over the first loops to a small multiple of the error of one step and stay there up to
32 loops, eight times the mean trained depth. int8 should be within the rounding of bfloat16; int4
should cost about 0.01 bits per byte, less with smaller groups.

Expected before the first run on chains: the same while the chain is followed, since the state of a
hop does not depend on how it was reached; an int4 error in a hop loses the answer, so accuracy
falls with the number of hops, not with the loops after them.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import machine
from experiments.c1_depth.chain_recipe import ASKED_HOPS, TASK, chains, recipe
from experiments.figure import COLOURS, MUTED, log2_ticks, panels
from experiments.listing import markdown_table
from experiments.studies.common import ROOT, Study
from experiments.tasks.accuracy import answered
from experiments.text import VOCABULARY, standard_library, validation
from open_mythos import MythosConfig, OpenMythos
from open_mythos.data import Loader, TokenShards
from open_mythos.evaluation import evaluate_depths
from open_mythos.inference.quantization import quantize, weight_bytes
from open_mythos.model.context import Context
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig, Trainer, build_model

STUDY = Study(
    "quantized_quality",
    ROOT / "docs" / "quantization" / "error_against_loops.png",
    "Cost of quantized weights against the number of loops (6 minutes on one core).",
)
KINDS: dict[str, tuple[str, int | None] | None] = {
    "bfloat16": None,
    "int8": ("int8", None),
    "int4, groups of 32": ("int4", 32),
    "int4, groups of 64": ("int4", 64),
    "int4, groups of 128": ("int4", 128),
}
TABLE_LOOPS = (1, 4, 8, 16, 32)
PARTS = ("text", "chains")
HOPS = ASKED_HOPS
"""Length of the evaluated chains, twice the longest in training."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the measurement."""

    width: int
    steps: int
    batch: int
    seq_len: int
    mean_loops: int
    most_loops: int
    """Largest depth measured."""
    windows: int
    """Validation sequences for the loss."""
    state_rows: int
    """Sequences for the state errors."""
    programs: int
    """Chains drawn; the held-out tenth is evaluated."""
    seed: int


FULL = Scale(128, 300, 16, 128, 4, 32, 64, 8, 8192, seed=0)
QUICK = Scale(128, 3, 2, 16, 2, 3, 2, 1, 128, seed=0)


@dataclass(frozen=True)
class Subject:
    """A trained model with its evaluation."""

    model: OpenMythos
    ids: Tensor
    """Inputs for the state errors."""
    score: Callable[[OpenMythos, list[int]], list[float]]
    """Metric at each depth; lower is better."""
    trained_loops: int
    """Maximum loops in training."""


def text_config(scale: Scale) -> RunConfig:
    """Configure MLA, experts and LoRA with widths divisible by groups of 128."""
    width = scale.width
    model = MythosConfig(
        vocab_size=VOCABULARY, dim=width, n_heads=4, max_seq_len=scale.seq_len,
        max_loop_iters=2 * scale.mean_loops, prelude_layers=1, coda_layers=1, attn_type="mla",
        kv_lora_rank=width // 4, q_lora_rank=width, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=width // 4, n_experts=8, n_shared_experts=1, n_experts_per_tok=2,
        expert_dim=width, ffn_dim=2 * width, lora_rank=4, max_output_tokens=scale.seq_len,
    )  # fmt: skip
    return RunConfig(
        model=model,
        depth=DepthConfig(
            plan="poisson", mean=float(scale.mean_loops), max_loops=2 * scale.mean_loops
        ),
        optim=OptimConfig(lr=6e-3),
        train=TrainConfig(
            seed=scale.seed, steps=scale.steps, seq_len=scale.seq_len, global_batch=scale.batch,
            warmup_steps=max(1, scale.steps // 10), min_lr_ratio=0.02, device="cpu",
        ),
    )  # fmt: skip


def text_subject(scale: Scale, work: Path) -> Subject:
    """Train a byte-level language model, scored in bits per byte."""
    text, run = standard_library(work), text_config(scale)
    loader = Loader(
        TokenShards(text), seq_len=scale.seq_len, global_batch=scale.batch, seed=scale.seed
    )
    model = _trained(Trainer(build_model(run), loader, run))
    batches = validation(text, seq_len=scale.seq_len, windows=scale.windows)
    ids = torch.cat([batch.input_ids for batch in batches])[: scale.state_rows]

    def score(model: OpenMythos, depths: list[int]) -> list[float]:
        rows = evaluate_depths(model, batches, depths, bytes_per_token=1.0)
        return [row.bits_per_byte for row in rows if row.bits_per_byte is not None]

    return Subject(model, ids, score, 2 * scale.mean_loops)


def chain_subject(scale: Scale, quick: bool) -> Subject:
    """Train a model on chains of relations, scored by the share of wrong answers."""
    run = recipe(scale.seed)
    if quick:  # the quick recipe is too narrow for the groups
        run.train.steps, run.train.warmup_steps, run.train.global_batch = 3, 1, 8
    model = _trained(Trainer(build_model(run), chains(run), run))
    ids, answers = TASK.questions(HOPS, scale.programs)

    def score(model: OpenMythos, depths: list[int]) -> list[float]:
        return [1 - right for right in answered(model, ids, answers, depths)]

    return Subject(model, ids[: 8 * scale.state_rows], score, run.model.max_loop_iters)


def _trained(trainer: Trainer) -> OpenMythos:
    trainer.fit()
    assert isinstance(trainer.model, OpenMythos)
    return trainer.model.eval()


def measure(subject: Subject, most_loops: int) -> dict[str, Any]:
    """Measure score, state errors and token agreement against loops for every quantization.

    "state_error" is that of the whole model, "loop_error" that of the loop given the exact input,
    "step_error" that of a single step from the exact state.
    """
    exact = copy.deepcopy(subject.model).float().eval()
    depths = [*range(1, most_loops + 1)]
    ctx = exact.context(subject.ids)
    with torch.no_grad():
        e_BTD = exact.embed(subject.ids, ctx)
    states = _states(exact, e_BTD, ctx, most_loops)
    tokens = [exact.logits(h_BTD, ctx).argmax(-1) for h_BTD in states]
    found: dict[str, Any] = {
        "loops": depths,
        "trained_loops": subject.trained_loops,
        "rho": float(exact.recurrent.injection.coefficients()[0].detach().max()),
        "float32": {"score": subject.score(exact, depths), "bytes": asdict(weight_bytes(exact))},
        "kinds": {},
    }
    for name, how in KINDS.items():
        rounded = copy.deepcopy(exact)
        if how is None:
            rounded.bfloat16()
        else:
            quantize(rounded, how[0], group_size=how[1])
        low = e_BTD.to(rounded.head.weight.dtype)
        with torch.no_grad():
            own = _states(rounded, rounded.embed(subject.ids, ctx), ctx, most_loops)
            own_tokens = [rounded.logits(h_BTD, ctx).argmax(-1) for h_BTD in own]
            starts = [exact.recurrent.initial_state(e_BTD, ctx), *states]
            steps = [rounded.step(h, low, t, ctx) for t, h in enumerate(starts[:-1])]
        found["kinds"][name] = {
            "score": subject.score(rounded, depths),
            "state_error": _distances(own, states),
            "loop_error": _distances(_states(rounded, low, ctx, most_loops), states),
            "step_error": _distances(steps, states),
            "agreement": [
                float((a == b).float().mean()) for a, b in zip(own_tokens, tokens, strict=True)
            ],
            "bytes": asdict(weight_bytes(rounded)),
        }
    return found


@torch.no_grad()
def _states(model: OpenMythos, e_BTD: Tensor, ctx: Context, loops: int) -> list[Tensor]:
    """Return h_1 .. h_L."""
    return [h_BTD for _, h_BTD in model.recurrent.unroll(e_BTD, ctx, loops)]


def _distances(states: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return the median over positions of ||a - b|| / ||b|| after each loop."""
    return [
        float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())
        for a, b in zip(states, exact, strict=True)
    ]


def markdown(found: dict[str, Any]) -> str:
    """Format the tables of docs/quantization.md: state error, then its cost."""
    text, tables = found["text"], list[str]()
    for name in PARTS:
        part = found[name]
        loops = [t for t in TABLE_LOOPS if t in part["loops"]]
        heads = [f"{t} loop{'s' if t > 1 else ''}" for t in loops]
        errors = [
            (kind, *(f"{each['state_error'][t - 1]:.2%}" for t in loops),
             f"{each['loop_error'][-1]:.2%}", f"{each['step_error'][-1]:.2%}")
            for kind, each in part["kinds"].items()
        ]  # fmt: skip
        head = (f"{name}: error of the state after", *heads, "loop alone, last", "a step, last")
        tables.append(markdown_table(head, errors))
        of = "bits per byte" if part is text else f"wrong answers to {HOPS} hops"
        form = "{:.4f}" if part is text else "{:.1%}"
        scores = [
            (kind, *(form.format(each["score"][t - 1]) for t in loops),
             f"{min(each['agreement']):.1%}" if "agreement" in each else "")
            for kind, each in [("float32", part["float32"]), *part["kinds"].items()]
        ]  # fmt: skip
        tables.append(markdown_table((f"{name}: {of}", *heads, "same token, least"), scores))
    sizes = [
        (kind, *(f"{each['bytes'][part] / 1e3:,.0f} kB" for part in ("stored", "per_loop")))
        for kind, each in [("float32", text["float32"]), *text["kinds"].items()]
    ]
    tables.append(markdown_table(("text: bytes", "stored", "read in a loop"), sizes))
    return "\n".join(tables).rstrip()


def verdict(found: dict[str, Any]) -> str:
    """Summarize whether the error stays bounded, one line per quantization."""
    lines = []
    for name in PARTS:
        part = found[name]
        last = part["loops"][-1]
        for kind, each in part["kinds"].items():
            error, loop, step = (each[f"{of}_error"] for of in ("state", "loop", "step"))
            lines.append(
                f"- **{name}, {kind}:** {error[0]:.2%} after one loop, {error[-1]:.2%} after {last}"
                f", {max(error):.2%} at most. With exact input {loop[0]:.2%} and {loop[-1]:.2%}, "
                f"at most {max(a / b for a, b in zip(loop, step, strict=True)):.1f} times what the "
                "same step adds alone."
            )
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot the errors of the state, the loop and a step, and their cost, against loops."""
    with panels(path, 3, rows=len(PARTS)) as axes:
        for i, name in enumerate(PARTS):
            part = found[name]
            loops, whole = part["loops"], part["float32"]["score"]
            state, inner, cost = axes[3 * i : 3 * i + 3]
            for (kind, each), colour in zip(part["kinds"].items(), (MUTED, *COLOURS), strict=False):
                state.plot(loops, each["state_error"], color=colour, label=kind)
                inner.plot(loops, each["loop_error"], color=colour)
                inner.plot(loops, each["step_error"], "--", color=colour, linewidth=1)
                more = [a - b for a, b in zip(each["score"], whole, strict=True)]
                cost.plot(loops, more, color=colour)
            unit = "bits per byte" if name == "text" else "share of wrong answers"
            state.set(title=f"{name}: error of the state", yscale="log", ylabel="relative error")
            inner.set(title="of the loop alone (dashed: a step)", yscale="log")
            cost.set(title=f"cost: {unit}", ylabel="more than float32")
            ticks = [2**k for k in range(loops[-1].bit_length())]
            for ax in (state, inner, cost):
                ax.axvline(part["trained_loops"], color=MUTED, linewidth=1, linestyle=":")
                ax.set(xlabel="loops (dotted: most in training)")
                log2_ticks(ax, ticks)
                ax.minorticks_off()
        axes[0].legend(loc="best")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, quantize and compare; save and print the results."""
    options = STUDY.parse(arguments)
    scale = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    start = time.process_time()
    found: dict[str, Any] = {"machine": machine.describe(), "scale": asdict(scale)}
    found["text"] = measure(text_subject(scale, options.work), scale.most_loops)
    found["chains"] = measure(chain_subject(scale, options.quick), scale.most_loops)
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, options.picture)
    for shown in (markdown(found), verdict(found)):
        Console().print(shown, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
