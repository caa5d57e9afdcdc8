"""What each command does. Heavy imports stay inside, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path

from open_mythos.errors import ConfigError
from open_mythos.train.config import RunConfig


def version() -> int:
    """Print the version."""
    import open_mythos

    print(open_mythos.__version__)
    return 0


def demo(out: str = "runs/demo", seed: int = 0, quick: bool = False, quiet: bool = False) -> int:
    """Train a looped model and a dense one of as many parameters on the standard library's source.

    Args:
        out: Folder of the picture, the report and the models; replaced.
        seed: Of weights, data order and depths.
        quick: Stop after a few steps: to see that everything works, not for the figures.
        quiet: Print the results only.
    """
    from open_mythos.cli.demo.run import run_demo

    run_demo(Path(out), seed=seed, quick=quick, quiet=quiet)
    return 0


def train(config: RunConfig, resume: str = "", quiet: bool = False) -> int:
    """Train a model as ``config`` says.

    Without ``--data.path`` the running Python's own standard library is the text, as bytes.

    Args:
        config: The run; ``--print_config`` shows it whole, as YAML for ``--config``.
        resume: "latest" goes on with the newest valid checkpoint of ``train.out_dir``, "strict"
            refuses if the newest is damaged; a path goes on with that one.
        quiet: No progress bar.
    """
    from open_mythos.cli.training import train_run

    return train_run(config, resume=resume, quiet=quiet)


def generate(
    checkpoint: str,
    prompt: str,
    n_loops: int | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
    tokenizer: str = "",
    device: str = "auto",
    quiet: bool = False,
) -> int:
    """Continue PROMPT; tokens appear as they are made.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        prompt: The text to continue.
        n_loops: Loops per token; by default the model's max_loop_iters.
        max_new_tokens: Most tokens to add.
        temperature: Divides the logits; 0 is greedy.
        top_k: Draw from the k most likely tokens; 0: from all.
        top_p: Draw from the smallest set with this probability.
        min_p: Drop tokens less likely than this share of the most likely one.
        repetition_penalty: Above 1 makes tokens that have occurred less likely.
        seed: Of the draws; the same seed gives the same text.
        stop: Strings that end the text, as a list: '["\\n\\n"]'.
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
        checkpoint, prompt, n_loops, sampling, tokenizer=tokenizer, device=device, quiet=quiet
    )


def evaluate(
    checkpoint: str,
    data: str = "",
    depths: list[int] | None = None,
    split: str = "val",
    seq_len: int = 256,
    windows: int = 64,
    batch: int = 16,
    dtype: str = "float32",
    device: str = "auto",
    out: str = "",
    quiet: bool = False,
) -> int:
    """Loss and bits per byte at several numbers of loops.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        data: Folder of prepared token shards; by default the one the run was trained on.
        depths: Loops to measure at, as a list: [1,2,4,8]; by default powers of two up to four times
            the model's max_loop_iters.
        split: "val" or "train".
        seq_len: Tokens of a sequence.
        windows: Sequences to read at most.
        batch: Sequences at a time.
        dtype: "float32", or "bfloat16" by autocast.
        device: "auto", "cpu", "cuda".
        out: Also write the rows to this file, as JSON.
        quiet: No progress bar.
    """
    from open_mythos.cli.inference import evaluate_checkpoint

    return evaluate_checkpoint(
        checkpoint, data, depths, split=split, seq_len=seq_len, windows=windows, batch=batch,
        dtype=dtype, device=device, out=out, quiet=quiet,
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
