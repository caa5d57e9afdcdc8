"""What each command does. Heavy imports stay inside, so that ``--help`` is quick."""

from __future__ import annotations

from open_mythos.errors import ConfigError
from open_mythos.train.config import RunConfig


def version() -> int:
    """Print the version."""
    import open_mythos

    print(open_mythos.__version__)
    return 0


def train(config: RunConfig, resume: str = "", quiet: bool = False) -> int:
    """Train a model as ``config`` says.

    Without ``--data.path`` the running Python's own standard library is the text, as bytes.

    Args:
        config: The run; ``--print_config`` shows it whole, as YAML for ``--config``.
        resume: "latest" goes on with the newest valid checkpoint of ``train.out_dir``, "strict"
            refuses if the newest is damaged, "auto" begins anew if there is none; a path goes on
            with that one.
        quiet: No progress bar.
    """
    from open_mythos.cli.training import train_run

    return train_run(config, resume=resume, quiet=quiet)


def train_gate(
    checkpoint: str,
    data: str = "",
    out: str = "",
    n_loops: int = 16,
    target: str = "remaining",
    margin: float = 0.005,
    positions: int = 8192,
    steps: int = 600,
    lr: float = 0.02,
    seed: int = 0,
    seq_len: int = 256,
    batch: int = 16,
    dtype: str = "float32",
    device: str = "auto",
    quiet: bool = False,
) -> int:
    """Train the halting gate of a trained model, and nothing else of it.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        data: Folder of prepared token shards; by default those the run was trained on, or the task
            that task.json beside the model names.
        out: Folder of the model with the trained gate; new or empty, by default runs/gate.
        n_loops: Loops that the model is followed through.
        target: "remaining" goes on while any later loop is better, "marginal" while the next one
            is.
        margin: Nats at which going on and stopping are equally good; more stops earlier.
        positions: Most positions to learn from.
        steps: Optimizer steps.
        lr: Learning rate.
        seed: Of the data's order.
        seq_len: Tokens of a sequence.
        batch: Sequences at a time.
        dtype: "float32", or "bfloat16" by autocast.
        device: "auto", "cpu", "cuda".
        quiet: No table.
    """
    from open_mythos.cli.gate import train_gate_of
    from open_mythos.train.gate import GateConfig

    config = GateConfig(
        n_loops=n_loops, target=target, margin=margin, positions=positions, steps=steps, lr=lr,
        seed=seed,
    )  # fmt: skip
    return train_gate_of(
        checkpoint, config, data=data, out=out, seq_len=seq_len, batch=batch, dtype=dtype,
        device=device, quiet=quiet,
    )  # fmt: skip


def generate(
    checkpoint: str,
    prompt: str,
    n_loops: int | None = None,
    exit: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
    quantize: str = "",
    tokenizer: str = "",
    device: str = "auto",
    quiet: bool = False,
) -> int:
    """Continue PROMPT; tokens appear as they are made.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        prompt: The text to continue.
        n_loops: Loops per token, or the most of them; by default the model's max_loop_iters.
        exit: Rule by which a token stops early: gate, kl, change, acceleration, stable, each with
            its numbers if wanted, such as gate:0.9 or kl:0.01,1.0; by default none does.
        max_new_tokens: Most tokens to add.
        temperature: Divides the logits; 0 is greedy.
        top_k: Draw from the k most likely tokens; 0: from all.
        top_p: Draw from the smallest set with this probability.
        min_p: Drop tokens less likely than this share of the most likely one.
        repetition_penalty: Above 1 makes tokens that have occurred less likely.
        seed: Of the draws; the same seed gives the same text.
        stop: Strings that end the text, as a list: '["\\n\\n"]'.
        quantize: Round the weights of all blocks: int8, or int4, with the size of its groups if
            wanted, such as int4:64; the model then computes in bfloat16.
        tokenizer: "byte" or a path; by default the one stored with the model.
        device: "auto", "cpu", "cuda".
        quiet: Print the new text only, at the end.
    """
    from open_mythos.cli.inference import generate_text

    sampling = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
        "stop": stop or [],
    }  # fmt: skip
    return generate_text(
        checkpoint, prompt, n_loops, sampling, exit=exit, quantize=quantize, tokenizer=tokenizer,
        device=device, quiet=quiet,
    )  # fmt: skip


def evaluate(
    checkpoint: str,
    data: str = "",
    depths: list[int] | None = None,
    exit: str = "",
    n_loops: int | None = None,
    repeats: int = 0,
    split: str = "val",
    seq_len: int = 256,
    windows: int = 64,
    batch: int = 16,
    dtype: str = "float32",
    quantize: str = "",
    device: str = "auto",
    out: str = "",
    quiet: bool = False,
) -> int:
    """Loss and bits per byte at several numbers of loops, or under an exit rule.

    With ``--exit`` the rule stands beside the same exits dealt to random positions, its mean depth
    for everybody, and full depth.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        data: Folder of prepared token shards; by default the one the run was trained on, or the
            task that task.json beside the model names.
        depths: Loops to measure at, as a list: [1,2,4,8]; by default powers of two up to four times
            the model's max_loop_iters.
        exit: Rule by which a position stops early: gate, kl, change, acceleration, stable, each
            with its numbers if wanted, such as gate:0.9 or kl:0.01,1.0.
        n_loops: With exit: the most loops; by default the model's max_loop_iters.
        repeats: With exit: passes by which each depth is timed, in turns; 0 times nothing.
        split: "val" or "train".
        seq_len: Tokens of a sequence.
        windows: Sequences to read at most.
        batch: Sequences at a time.
        dtype: "float32", or "bfloat16" by autocast.
        quantize: Round the weights of all blocks: int8, or int4, with the size of its groups if
            wanted, such as int4:64; the model then computes in bfloat16, whatever the dtype.
        device: "auto", "cpu", "cuda".
        out: Also write the rows to this file, as JSON.
        quiet: No progress bar.
    """
    from open_mythos.cli.inference import evaluate_checkpoint

    return evaluate_checkpoint(
        checkpoint, data, depths, exit=exit, n_loops=n_loops, repeats=repeats, split=split,
        seq_len=seq_len, windows=windows, batch=batch, dtype=dtype, quantize=quantize,
        device=device, out=out, quiet=quiet,
    )  # fmt: skip


def info(
    model: str, loops: list[int] | None = None, context: int | None = None, json: bool = False
) -> int:
    """Count parameters, FLOPs and cache of a model against depth.

    Args:
        model: A variant (1b), a YAML or JSON file with a model's configuration, or a folder with a
            model, a checkpoint or a run.
        loops: Depths to show, as a list: [1,4,16]; by default powers of two up to max_loop_iters.
        context: Positions; by default the model's max_seq_len.
        json: Print JSON instead of tables.
    """
    from open_mythos.cli.info import show_info

    return show_info(model, loops, context, as_json=json)


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
    """Memory, communication, layout, time and cost of a training, before it is paid for.

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
        dtype: Of the products: "bfloat16", "float16" or "float32".
        optimizer: "adamw" or "muon".
        ema: Keep a running mean of the weights.
        global_batch_tokens: Of a step: 4M; by default 4 Mi, or a sequence for each GPU.
        mfu: Share of the peak rate while computing; by default 0.3.
        price: US dollars of a GPU for an hour; by default that of a table.
        kind: "none", "ddp" or "fsdp"; by default the plan chooses, as of the next four.
        shard: GPUs that share one copy of the weights.
        experts: GPUs over which the routed experts are divided.
        micro_batch: Sequences that a GPU computes at a time.
        checkpoint_loops: Whether loops are computed again in the backward pass.
        json: Print JSON instead of tables.
    """
    from open_mythos.cli.plan import show_plan
    from open_mythos.plan import Wish

    wish = Wish(kind or None, shard, experts, micro_batch, checkpoint_loops)
    return show_plan(
        model, gpus=gpus, gpu_name=gpu, tokens=tokens, context=context, n_loops=n_loops,
        max_loops=max_loops, grad_loops=grad_loops, dtype=dtype, optimizer=optimizer, ema=ema,
        global_batch_tokens=global_batch_tokens, mfu=mfu, price=price, wish=wish, as_json=json,
    )  # fmt: skip


def data_prepare(
    source: str,
    out: str,
    tokenizer: str = "byte",
    val_fraction: float = 0.01,
    shard_tokens: int = 1 << 27,
    text_field: str = "text",
    overwrite: bool = False,
    quiet: bool = False,
) -> int:
    """Tokenize SOURCE into the folder OUT.

    Args:
        source: A text, JSONL or Parquet file, a folder of such, or "stdlib": the source of the
            running Python's standard library.
        out: The folder to make.
        tokenizer: "byte"; "bpe:N" trains a byte-level BPE of N tokens on the source; a path; or a
            Hugging Face model such as openai/gpt-oss-20b.
        val_fraction: Share of the documents kept for validation.
        shard_tokens: Tokens of a shard.
        text_field: JSON key or Parquet column that holds the text.
        overwrite: Replace an earlier folder.
        quiet: No progress.
    """
    from open_mythos.cli.data import prepare_shards

    if not 0 <= val_fraction < 1:
        raise ConfigError(
            "not a share", where="--val-fraction", value=val_fraction, allowed="[0, 1)"
        )
    return prepare_shards(
        source, out, tokenizer, val_fraction=val_fraction, shard_tokens=shard_tokens,
        text_field=text_field, overwrite=overwrite, quiet=quiet,
    )  # fmt: skip


def trace(
    checkpoint: str,
    prompt: str,
    n_loops: int | None = None,
    exit: str = "",
    out: str = "trace.html",
    device: str = "auto",
) -> int:
    """Write a page that shows what the model makes of PROMPT, loop by loop.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        prompt: The text.
        n_loops: Loops; by default the model's max_loop_iters.
        exit: Rule whose stops are marked: gate, kl, change, acceleration, stable, each with its
            numbers if wanted, such as gate:0.9 or kl:0.01,1.0; by default the gate, if trained.
        out: The HTML file to write.
        device: "auto", "cpu", "cuda".
    """
    from open_mythos.reports.trace_page import trace_prompt

    return trace_prompt(checkpoint, prompt, n_loops, exit, out, device)


def report(run: str, out: str = "") -> int:
    """Write a page of a run: curves, depths, loops, alarms.

    Args:
        run: Folder of a run; it may still be going on.
        out: The HTML file to write; by default report.html in the run's folder.
    """
    from open_mythos.reports.run_page import report_run

    return report_run(run, out)
