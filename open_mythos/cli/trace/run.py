"""From a checkpoint and a prompt to the page."""

from __future__ import annotations

from pathlib import Path

from open_mythos.cli.gate import GATE_FILE
from open_mythos.cli.inference import stored_tokenizer
from open_mythos.cli.task import beside
from open_mythos.cli.trace.chain import read_chains
from open_mythos.config import check_count
from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.reports.trace_page import write_page
from open_mythos.reports.trace_record import Goal, PromptTrace, collect
from open_mythos.run_folder import TASK_FILE
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
) -> PromptTrace:
    """What the model in ``checkpoint`` makes of ``prompt``.

    Raises:
        ConfigError: The model has no loops, or the prompt or the exit rule is not understood.
        DataError: There is no model, no tokenizer, or no proper ``task.json``.
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
    task_file = beside(checkpoint, TASK_FILE)
    if task_file is None:
        tokenizer = stored_tokenizer(checkpoint)
        ids = tokenizer.encode(prompt) or [tokenizer.bos_id]
        goals: list[Goal | None] = [*(Goal(token) for token in ids[1:]), None]
        return collect(
            model, ids, lambda token: _named(token, tokenizer), goals, depth, rule,
            task="text", **about,
        )  # fmt: skip
    chains = read_chains(task_file)
    ids = chains.encode(prompt)
    goals = [None if entity is None else Goal(entity, hops) for hops, entity in chains.reached(ids)]
    return collect(model, ids, chains.name, goals, depth, rule, task="chains", **about)


def _named(token: int, tokenizer: Tokenizer) -> str:
    """The text of one token; its number where it has none of its own."""
    text = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
    return f"<{token}>" if not text or "�" in text else text
