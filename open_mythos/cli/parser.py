"""Map a command line to a function call.

Each command is a function whose signature and docstring define its options and help. Its module
imports torch only inside the function, so help and usage errors appear immediately.
"""

from __future__ import annotations

import importlib
from typing import Any

from open_mythos.checks import nearest
from open_mythos.cli.options import Command, as_utf8, new_parser, parse_words
from open_mythos.cli.train import parse_train
from open_mythos.errors import ConfigError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("open_mythos.cli.train:train", "Train a model."),
    "train gate": ("open_mythos.cli.gate:train_gate", "Train the halting gate of a trained model."),
    "generate": ("open_mythos.cli.generate:generate", "Continue a text with a trained model."),
    "serve": ("open_mythos.cli.serve:serve", "Serve a trained model over HTTP (OpenAI API)."),
    "evaluate": ("open_mythos.cli.evaluate:evaluate", "Measure loss by depth, or with exits."),
    "trace": ("open_mythos.cli.pages:trace", "Write an HTML page of a prompt, loop by loop."),
    "plan": ("open_mythos.cli.plan:plan", "Estimate memory, layout, time and cost of training."),
    "report": ("open_mythos.cli.pages:report", "Write an HTML page of a run's metrics."),
    "info": ("open_mythos.cli.info:info", "Count parameters, FLOPs and cache bytes by depth."),
    "convert": ("open_mythos.cli.convert:convert", "Convert a public looped checkpoint."),
    "retrofit": ("open_mythos.cli.retrofit:retrofit", "Make a dense model a looped one."),
    "export": ("open_mythos.cli.export:export", "Write a model for transformers, or the hub."),
    "data prepare": ("open_mythos.cli.data:prepare_shards", "Tokenize text into shards."),
}
"""Command -> its function ("module:function") and a summary."""


def parse(argv: list[str]) -> tuple[Command, dict[str, Any]]:
    """Return the function to call and its arguments.

    Raises:
        ConfigError: The command or an option is unknown, or a value is not of its type.
    """
    name, words = _split([as_utf8(word) for word in argv])
    if name not in COMMANDS:
        return _about(name, words)
    place, summary = COMMANDS[name]
    module, _, function = place.partition(":")
    command: Command = getattr(importlib.import_module(module), function)
    if name == "train":
        return command, parse_train(words, summary)
    parser = new_parser(f"open-mythos {name}", summary)
    parser.add_function_arguments(command, as_positional=True)
    return command, parse_words(parser, words, command)


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """Split off the command, which has one word or two; ``train-gate`` means ``train gate``."""
    first = argv[0].replace("-", " ") if argv and not argv[0].startswith("-") else ""
    words = [*first.split(), *argv[1:]] if first in COMMANDS else argv
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, words[count:]
    return " ".join(words[:1]), words[1:]


def _about(name: str, words: list[str]) -> tuple[Command, dict[str, Any]]:
    """Handle help, the version, and the first word of a two-word command."""
    if name == "--version" and not words:
        return _print_version, {}
    listed = {each: text for each, (_, text) in COMMANDS.items() if f"{each} ".startswith(name)}
    if name in ("", "-h", "--help") or (listed and words in ([], ["-h"], ["--help"])):
        return _print_commands, {"commands": listed or {k: v for k, (_, v) in COMMANDS.items()}}
    raise ConfigError(
        "no such command", where="open-mythos", value=" ".join([name, *words[:1]]).strip(),
        allowed=", ".join(COMMANDS), fix=nearest(name, {each.split()[0] for each in COMMANDS}),
    )  # fmt: skip


def _print_version() -> int:
    import open_mythos

    print(open_mythos.__version__)
    return 0


def _print_commands(commands: dict[str, str]) -> int:
    print("usage: open-mythos COMMAND ...    (open-mythos COMMAND --help; open-mythos --version)\n")
    for name, summary in commands.items():
        print(f"  {name:<14} {summary}")
    return 0
