"""From a checkpoint and a prompt to the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from open_mythos.checks import check_count
from open_mythos.cli.gate import GATE_FILE
from open_mythos.cli.inference import stored_tokenizer
from open_mythos.cli.run_data import beside
from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.reports.trace_page import write_page
from open_mythos.reports.trace_record import Goal, PromptTrace, collect
from open_mythos.tokenizer import Tokenizer


def trace_prompt(
    checkpoint: str, prompt: str, n_loops: int | None, exit: str, out: str, device: str
) -> int:
    """Write the page of one prompt."""
    trace = trace_of(checkpoint, prompt, n_loops=n_loops, exit=exit, device=device)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(trace, path)
    print(f"page: {path}")
    return 0


def trace_of(
    checkpoint: str,
    prompt: str,
    *,
    n_loops: int | None = None,
    exit: str = "",
    device: str = "auto",
    goals: Callable[[list[int]], list[Goal | None]] | None = None,
    task: str = "text",
) -> PromptTrace:
    """Follow ``prompt`` through the loops of the model in ``checkpoint``.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run.
        prompt: The text.
        n_loops: Loops; by default the model's max_loop_iters.
        exit: Exit rule whose exits are marked; by default the gate, if one was trained.
        device: "auto", "cpu", "cuda".
        goals: Maps the ids of the prompt to what should be predicted after each; by default the
            prompt's own next token.
        task: What the goals are: "text" or "chains".

    Raises:
        ConfigError: The model has no loops, or the prompt or the exit rule is not understood.
        DataError: There is no model or no tokenizer, or the prompt is not in its vocabulary.
    """
    model = from_pretrained(checkpoint, resolve_device(device))
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "a dense model has no loops", where="trace", value=checkpoint, allowed="a looped model"
        )
    depth = model.cfg.max_loop_iters if n_loops is None else check_count("--n-loops", n_loops)
    if not exit and beside(checkpoint, GATE_FILE):
        exit = "gate"
    rule = exit_rule(exit, model) if exit else None
    about = {"checkpoint": checkpoint, "prompt": prompt, "exit_rule": exit}
    tokenizer = stored_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt) or [tokenizer.bos_id]
    wanted = goals(ids) if goals else [*(Goal(token) for token in ids[1:]), None]
    return collect(
        model, ids, lambda token: _named(token, tokenizer), wanted, depth, rule, task=task, **about
    )


def _named(token: int, tokenizer: Tokenizer) -> str:
    """The text of one token; its number where it has none of its own."""
    text = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
    return f"<{token}>" if not text or "�" in text else text
