"""``open-mythos evaluate``: loss, answers or benchmark tasks by depth, or an early-exit rule."""

from typing import Any

from open_mythos.errors import ConfigError, EnvironmentError_

_BEGIN = '{\n  "checkpoint": '
"""Of a file of rows."""


def evaluate(
    checkpoint: str,
    data: str = "",
    depths: list[int] | None = None,
    exit: str = "",
    questions: str = "",
    tasks: str = "",
    include: str = "",
    fewshot: int | None = None,
    limit: int | None = None,
    plot: str = "",
    n_loops: int | None = None,
    repeats: int = 0,
    split: str = "val",
    seq_len: int | None = None,
    windows: int | None = None,
    batch: int | None = None,
    dtype: str = "",
    weights: str = "",
    quantize: str = "",
    device: str = "auto",
    out: str = "",
    quiet: bool = False,
) -> int:
    """Measure loss and bits per byte at several depths, or with an early-exit rule.

    ``--questions`` measures how often the right answer is generated instead, ``--tasks`` the
    metrics of benchmark tasks (lm-evaluation-harness). ``--exit`` compares
    the rule with the same exits assigned to random positions, with its mean depth at every
    position, and with full depth.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        data: Folder of prepared token shards; by default the run's validation text.
        depths: Loop counts, as a list: [1,2,4,8]; by default powers of two up to four times the
            model's max_loop_iters.
        exit: Early-exit rule: gate, kl, change, acceleration, stable, with optional parameters
            such as gate:0.9 or kl:0.01,1.0.
        questions: File of questions to answer, a line of JSON each: {"prompt": ..., "answer": ...}.
        tasks: Tasks of the package lm-eval, by name or YAML file: arc_easy,my_task.yaml.
        include: With tasks: a folder of further tasks.
        fewshot: With tasks: examples in front of each question; by default those of the task.
        limit: With tasks: documents of each task at most.
        plot: With tasks: also draw every metric against depth into this file (.png, .svg, .pdf).
        n_loops: With exit: maximum loops; by default the model's max_loop_iters.
        repeats: With exit: interleaved passes that time each depth; 0 for no timing.
        split: "val" or "train".
        seq_len: Tokens per sequence; by default those of the run, else 256.
        windows: Maximum number of sequences; by default that of the run, else 64.
        batch: Sequences per forward pass; by default that of the run, else 16.
        dtype: "float32", or "bfloat16" by autocast; by default that of the run.
        weights: "averaged" or "raw"; by default the run's averages, if it keeps them.
        quantize: Quantize the weights of all blocks: int8 or int4, with an optional group size
            such as int4:64; the model then computes in bfloat16, regardless of dtype.
        device: "auto", "cpu", "cuda".
        out: Also write the rows to this file, as JSON.
        quiet: Show no progress bar.
    """
    from dataclasses import asdict
    from pathlib import Path

    from rich.progress import track

    from open_mythos.cli.says import say_untrained_gate, say_unvalidated, say_weights
    from open_mythos.cli.tables import bar_mark, depth_table, exit_tables, new_console
    from open_mythos.console import show
    from open_mythos.evaluation import evaluate_depths, evaluate_exits
    from open_mythos.files import check_writable
    from open_mythos.inference.loading import load_model
    from open_mythos.model.depth import Depth
    from open_mythos.model.exit_rules import exit_rule
    from open_mythos.model.mythos import OpenMythos
    from open_mythos.train.setting import setting_of

    _reject_ignored(depths, exit, n_loops, repeats)
    if out:
        check_writable(
            Path(out), "the rows cannot be written", "choose another file with --out", _BEGIN
        )  # before the evaluation, not after it
    _reject_without_tasks(tasks, include, fewshot, limit, plot)
    of_texts = {
        "--data": data, "--split": "" if split == "val" else split, "--seq_len": seq_len,
        "--windows": windows, "--dtype": "" if dtype == "float32" else dtype,
    }  # fmt: skip
    if tasks:
        _reject_beside("tasks", {**of_texts, "--exit": exit, "--questions": questions})
    elif questions:
        _reject_beside("questions", {**of_texts, "--batch": batch, "--repeats": repeats or None})
    model, weights = load_model(checkpoint, device, quantize, weights)
    say_weights(weights)
    say_untrained_gate(checkpoint, exit)
    option = "--exit" if exit else "--depths"
    if (exit or depths is not None) and not isinstance(model, OpenMythos):
        raise ConfigError(
            "a dense model has no loops", where=option, value=exit or depths,
            allowed="looped models", fix=f"leave out {option}",
        )  # fmt: skip
    trained = model.cfg.max_loop_iters
    rule = exit_rule(exit, model) if exit else None
    most = Depth(n_loops, rule).most(trained)
    if exit or depths:
        say_unvalidated(checkpoint, depths or [most], trained)
    named = {"checkpoint": checkpoint, "weights": weights}
    if tasks:
        _tasks(
            model,
            named,
            tasks,
            depths,
            include,
            fewshot,
            limit,
            16 if batch is None else batch,
            plot,
            out,
        )
        return 0
    if questions:
        if depths is None:
            depths = [most] if exit else [2**k for k in range(most.bit_length())]
        _answers(model, named, questions, depths, exit, quiet, out)
        return 0
    setting = setting_of(
        checkpoint, data, seq_len=seq_len, windows=windows, batch=batch, dtype=dtype
    )
    source = setting.source(split)
    batches = track(
        source.batches,
        "evaluating",
        console=new_console(stderr=True),
        disable=quiet,
        transient=True,
    )
    options = setting.options(source, model)
    content: dict[str, Any] = {**named, "split": source.name, **setting.described()}
    content |= {"quantize": quantize} if quantize else {}
    if rule is not None:
        report = evaluate_exits(model, batches, rule, n_loops, repeats=repeats, **options)
        console, title = new_console(), f"{checkpoint}, {source.name}"
        tables = [*exit_tables(report, title, exit, mark=bar_mark(console))]
        content |= {"exit": exit, "report": asdict(report)}
    else:
        if depths is None:
            depths = [2**k for k in range((4 * trained).bit_length())]
        rows = evaluate_depths(model, batches, depths, **options)
        console, tables = new_console(), [depth_table(rows, checkpoint, source.name)]
        content["depths"] = [asdict(row) for row in rows]
    _write(out, content)  # first: a console may fail
    for table in tables:
        show(console, table)
    return 0


def _answers(
    model: Any, named: dict[str, str], questions: str, depths: list[int], exit: str, quiet: bool,
    out: str,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from open_mythos.cli.tables import answer_table, new_console
    from open_mythos.console import show
    from open_mythos.evaluation import evaluate_answers, read_questions
    from open_mythos.hub.places import stored_tokenizer
    from open_mythos.model.exit_rules import exit_rule

    checkpoint = named["checkpoint"]
    rows = evaluate_answers(
        model, read_questions(questions), stored_tokenizer(checkpoint), depths,
        exit_rule=exit_rule(exit, model) if exit else None, progress=not quiet,
    )  # fmt: skip
    _write(out, {
        **named, "questions": questions, "exit": exit,
        "depths": [asdict(row) for row in rows],
    })  # fmt: skip
    show(new_console(), answer_table(rows, checkpoint, questions))


def _tasks(
    model: Any, named: dict[str, str], tasks: str, depths: list[int] | None, include: str,
    fewshot: int | None, limit: int | None, batch: int, plot: str, out: str,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from open_mythos.cli.tables import new_console, task_table
    from open_mythos.console import show
    from open_mythos.hub.places import first_id, stored_tokenizer

    try:
        from open_mythos.evaluation.harness import evaluate_tasks
    except ImportError as error:
        raise EnvironmentError_(
            "benchmark tasks need a package", where="--tasks", value=str(error),
            allowed="an installation with lm-eval",
            fix="pip install 'open-mythos[eval]'",
        ) from error  # fmt: skip
    if plot:
        from open_mythos.reports.task_plot import check_plot, plot_tasks

        check_plot(plot)
    checkpoint = named["checkpoint"]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if depths is None:
        depths = [2**k for k in range(model.cfg.max_loop_iters.bit_length())]
    tokenizer = stored_tokenizer(checkpoint)
    rows = evaluate_tasks(
        model, tokenizer, names, depths,
        include=include, fewshot=fewshot, limit=limit, batch=batch,
        prefix=first_id(tokenizer, checkpoint),
    )  # fmt: skip
    _write(out, {
        **named, "tasks": names, "fewshot": fewshot, "limit": limit,
        "rows": [asdict(row) for row in rows],
    })  # fmt: skip
    show(new_console(), task_table(rows, checkpoint))
    if plot:
        plot_tasks(rows, plot)


def _write(out: str, content: dict[str, Any]) -> None:
    """Write the rows to ``--out``, if it is given."""
    import json
    from pathlib import Path

    from open_mythos.files import write_text

    if out:
        text = json.dumps(content, indent=2) + "\n"
        write_text(Path(out), text, "the rows cannot be written", "choose another file with --out")


def _reject_ignored(depths: list[int] | None, exit: str, n_loops: int | None, repeats: int) -> None:
    if exit and depths is not None:
        raise ConfigError(
            "an exit rule chooses the depths", where="--depths", value=depths,
            allowed="--n_loops: the most loops", fix="leave out --depths or --exit",
        )  # fmt: skip
    for option, value in (("--n_loops", n_loops), ("--repeats", repeats or None)):
        if not exit and value is not None:
            raise ConfigError(
                "only an exit rule reads this", where=option, value=value,
                allowed="together with --exit", fix="name fixed depths with --depths",
            )  # fmt: skip


def _reject_without_tasks(tasks: str, *values: Any) -> None:
    for option, value in zip(("--include", "--fewshot", "--limit", "--plot"), values, strict=True):
        if not tasks and value not in (None, ""):
            raise ConfigError(
                "only tasks read this", where=option, value=value, allowed="together with --tasks",
                fix="name tasks of lm-eval with --tasks",
            )  # fmt: skip


def _reject_beside(kind: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value not in (None, ""):
            raise ConfigError(
                f"{kind} do not read this", where=option, value=value, allowed=f"without --{kind}",
                fix="leave out one of the two",
            )  # fmt: skip
