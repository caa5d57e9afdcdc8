"""``open-mythos trace`` and ``open-mythos report``: HTML pages of a prompt or a run."""


def trace(
    checkpoint: str,
    prompt: str,
    n_loops: int | None = None,
    exit: str = "",
    out: str = "trace.html",
    device: str = "auto",
    weights: str = "",
) -> int:
    """Write an HTML page of a model's predictions for PROMPT after each loop.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        prompt: The text; the stored tokenizer must cover it.
        n_loops: Number of loops; by default the model's max_loop_iters.
        exit: Early-exit rule to mark: gate, kl, change, acceleration, stable, with optional
            parameters such as gate:0.9 or kl:0.01,1.0; by default the gate, if trained.
        out: The HTML file to write.
        device: "auto", "cpu", "cuda".
        weights: "averaged" or "raw"; by default the run's averages, if it keeps them.
    """
    from pathlib import Path

    from open_mythos.cli.run_data import text_argument
    from open_mythos.cli.says import say_untrained_gate, say_unvalidated, say_weights
    from open_mythos.inference.loading import load_model
    from open_mythos.reports.html import check_page, write_html
    from open_mythos.reports.trace_page import page
    from open_mythos.reports.trace_record import trace_of

    check_page(Path(out))
    prompt = text_argument(prompt, "PROMPT")
    model, weights = load_model(checkpoint, device, weights=weights)
    say_weights(weights)
    say_untrained_gate(checkpoint, exit)
    traced = trace_of(checkpoint, prompt, n_loops=n_loops, exit=exit, model=model)
    say_unvalidated(checkpoint, [traced.n_loops], traced.trained_loops)
    write_html(page(traced), Path(out))
    print(f"page: {out}")
    return 0


def report(run: str, out: str = "") -> int:
    """Write an HTML page of a run: curves, depths, loops, alarms.

    Args:
        run: Folder of a finished or active run.
        out: The HTML file to write; by default report.html in the run's folder.
    """
    from pathlib import Path

    from open_mythos.reports.html import check_page, write_html
    from open_mythos.reports.run_page import page
    from open_mythos.reports.run_record import read_run
    from open_mythos.run_folder import REPORT_FILE

    path = Path(out) if out else Path(run) / REPORT_FILE
    record = read_run(run)  # first: a run that is not there gets no folder
    check_page(path)
    write_html(page(record), path)
    print(f"report: {path}")
    return 0
