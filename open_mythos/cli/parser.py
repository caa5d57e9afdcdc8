"""What can be said on the command line, and which function answers it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from open_mythos.checks import nearest
from open_mythos.cli import commands
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.train.config import RunConfig
from open_mythos.variants import VARIANTS, variant

Command = Callable[..., int]
_DEFAULT_VARIANT = "tiny"
_SECTIONS = ("architecture", "model", "data", "depth", "optim", "train", "parallel", "watch")


class Parser(ArgumentParser):
    """A parser whose mistakes are ConfigErrors that name the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the mistake as a ConfigError."""
        fix = f"see {self.prog} --help"
        for pattern in (
            r"unrecognized arguments: --?([\w.]+)",
            r"Key '?([\w.]+)'? is not expected",
        ):
            match = re.search(pattern, message) or re.search(
                r"(?:Subkey|Group|Option) '([\w.]+)' (?:is not|does not)", message
            )
            if match:
                fix = nearest(match[1], _option_names(self))
        raise ConfigError(" ".join(message.split()), where=self.prog, fix=fix) from ex


def _option_names(parser: ArgumentParser) -> list[str]:
    actions = [a for a in parser._actions if a.option_strings]
    return [s.removeprefix("--") for a in actions for s in a.option_strings if s.startswith("--")]


def build_parser(model: MythosConfig) -> ArgumentParser:
    """The whole parser; ``model`` gives the defaults of ``train --model.*``."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="open-mythos",
        description="Recurrent-Depth Transformers: train, generate, evaluate at any depth.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    groups = {"": parser.add_subcommands(required=False, dest="command")}
    for name, (command, summary) in _COMMANDS.items():
        group, _, last = _one_word(name).rpartition(" ")
        if group not in groups:
            group_parser = Parser(description=_GROUPS[group])
            groups[""].add_subcommand(group, group_parser, help=_GROUPS[group])
            groups[group] = group_parser.add_subcommands(required=True, dest="command")
        sub = Parser(description=summary)
        sub.add_argument("--config", action="config", help="a YAML file with these options")
        if command is commands.train:
            sub.add_argument(
                "--variant", default=_DEFAULT_VARIANT,
                help=f"defaults of --model.*: {', '.join(VARIANTS)}",
            )  # fmt: skip
            sub.add_class_arguments(RunConfig)
            sub.set_defaults({"model": model.to_dict()})
            sub.add_argument("--resume", default="", help=_RESUME)
            sub.add_argument("--quiet", type=bool, default=False, help="no progress bar")
        else:
            sub.add_function_arguments(command, as_positional=True)
        groups[group].add_subcommand(last, sub, help=summary)
    return parser


def parse(argv: list[str]) -> tuple[Command, dict[str, Any]]:
    """The function to call and its arguments.

    Raises:
        ConfigError: An option is unknown or its value is not of its type.
    """
    argv = _joined(argv)
    following = [*argv[1:], ""]
    argv = [_normalised(word, after) for word, after in zip(argv, following, strict=True)]
    parser = build_parser(variant(_variant_named_in(argv)))
    given = parser.parse_args(argv)
    if given.version:
        return commands.version, {}
    if given.command is None:
        parser.print_help()
        return (lambda: 0), {}
    words, arguments = [given.command], given[given.command]
    if given.command in _GROUPS:
        words, arguments = [given.command, arguments.command], arguments[arguments.command]
    known = {_one_word(name): command for name, (command, _) in _COMMANDS.items()}
    command = known[" ".join(words)]
    arguments.pop("config", None)
    if command is commands.train:
        return command, _train_arguments(arguments)
    return command, arguments.as_dict()


def _train_arguments(arguments: Namespace) -> dict[str, Any]:
    arguments.pop("variant", None)
    values = arguments.as_dict()
    run = RunConfig.from_dict({name: values.pop(name) for name in _SECTIONS})
    return {"config": run, **values}


def _one_word(name: str) -> str:
    """A command's name as the parser has it: "train-gate", because "train" is a command too."""
    return name.replace(" ", "-") if name.partition(" ")[0] in _COMMANDS else name


def _joined(argv: list[str]) -> list[str]:
    """``argv`` with a command of two such words as one."""
    words = argv[:1] if argv[:1] and argv[0] in _COMMANDS else []
    name = " ".join([*words, *argv[1:2]])
    return [_one_word(name), *argv[2:]] if words and name in _COMMANDS else argv


def _normalised(word: str, following: str) -> str:
    """``--max-new-tokens`` for ``--max_new_tokens`` and ``--quiet`` for ``--quiet true``."""
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"--[a-z][\w.-]*", name):
        return word
    name = name.replace("-", "_").replace("__", "--", 1)
    named_only = not equals and following not in ("true", "false")
    return f"{name}=true" if named_only and name[2:] in _flags() else name + equals + value


def _flags() -> set[str]:
    """Options that are set by naming them."""
    hints = [get_type_hints(command) for command, _ in _COMMANDS.values()]
    return {name for each in hints for name, kind in each.items() if kind is bool}


def _variant_named_in(argv: list[str]) -> str:
    """The variant has to be known before the parser is built: it gives defaults."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--variant":
            return following
        if word.startswith("--variant="):
            return word.partition("=")[2]
    return _DEFAULT_VARIANT


_COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (commands.train, "Train a model."),
    "train gate": (commands.train_gate, "Teach a trained model when to stop (train gate)."),
    "generate": (commands.generate, "Continue a text with a trained model."),
    "evaluate": (commands.evaluate, "Loss against the number of loops, or under an exit rule."),
    "trace": (commands.trace, "See the thinking: a page of a prompt, loop by loop."),
    "plan": (
        commands.plan,
        "Memory, layout, days and cost of a training, before it is paid for.",
    ),
    "report": (commands.report, "One HTML page of a run: curves, depths, loops, alarms."),
    "info": (commands.info, "Parameters, FLOPs per token and cache bytes against depth."),
    "data prepare": (commands.data_prepare, "Turn text into token shards."),
}
_RESUME = (
    '"latest" goes on with the newest valid checkpoint of train.out_dir, "strict" refuses if the '
    'newest is damaged, "auto" begins anew if there is none; a path goes on with that checkpoint'
)
_GROUPS = {"data": "Prepare training data."}
