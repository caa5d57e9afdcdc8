"""Option parsers based on jsonargparse: usage errors are ConfigErrors, dashes are underscores."""

from __future__ import annotations

import os
import re
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from open_mythos.checks import described, fits, nearest
from open_mythos.errors import ConfigError, DataError
from open_mythos.run_folder import load_yaml, read_config

Command = Callable[..., int]


class Parser(ArgumentParser):
    """A parser that raises usage errors as ConfigErrors with the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise a ConfigError, or a DataError for bytes that are no text."""
        if isinstance(cause := ex and ex.__context__, UnicodeEncodeError):
            key = re.search(r'key "([\w.]+)"', message)
            raise not_utf8(f"--{key[1]}" if key else self.prog, str(cause.object)) from ex
        fix = f"see {self.prog} --help"
        if "Union subtypes" in message and "list[" in message:
            fix = "write a list as [1,2], in quotes: '[4]'"
        options = [s[2:] for a in self._actions for s in a.option_strings if s.startswith("--")]
        match = None
        for pattern in (
            r"unrecognized arguments: --?([\w.]+)",
            r"Key '?([\w.]+)'? is not expected",
            r"(?:Subkey|Group|Option) '([\w.]+)' (?:is not|does not)",
        ):
            match = match or re.search(pattern, message)
            if match and len(guess := nearest(match[1], options)) < 500:  # not a list of hundreds
                fix = guess
        named = re.search(r"(?:Got value|[Gg]iven value):? '?(?!type)([^\s']+)", message) or match
        raise ConfigError(
            " ".join(message.split()), where=self.prog, value=named[1] if named else "",
            allowed=f"the options of {self.prog}", fix=fix,
        ) from ex  # fmt: skip


def new_parser(prog: str, description: str) -> Parser:
    """Create a parser that also reads a YAML file of options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        parser = Parser(prog=prog, description=description)
    except ValueError as error:  # JSONARGPARSE_DEBUG=1
        raise ConfigError(
            "an environment variable has another value than allowed", where=prog, value=str(error),
            allowed="true, false", fix="correct it or remove it",
        ) from error  # fmt: skip
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    return parser


def parse_words(parser: Parser, words: list[str], command: Command) -> dict[str, Any]:
    """Parse a command line; boolean options of ``command`` need no value.

    What it says counts more than what a file says, wherever ``--config`` stands. An argument whose
    type is a dataclass has an option per field: ``--limits.body-bytes 1000``.
    """
    flags = {name for name, kind in get_type_hints(command).items() if kind is bool}
    pairs = zip(words, [*words[1:], ""], strict=False)
    normal = [with_underscores(word, flags, following) for word, following in pairs]
    files = [str(at_home(file)) for file in files_of_options(normal)]
    groups = _hide_groups(parser)
    _check_groups(normal, groups)
    for file in files:
        _check_file(file, groups)
    values = parser.parse_args([*(f"--config={file}" for file in files), *_without_files(normal)])
    _check_numbers(normal, values)
    values.pop("config", None)
    arguments: dict[str, Any] = at_home(values.as_dict())
    for name, kind in get_type_hints(command).items():
        if name in arguments and arguments[name] is None and not fits(None, kind):
            raise ConfigError(
                "the file gives no value", where=f"--{name}", value=None, allowed=described(kind),
                fix=f"leave {name} out of the file",
            )  # fmt: skip
        if is_dataclass(kind) and name in arguments:
            make: Any = kind
            arguments[name] = make(**arguments[name])
    return arguments


def _given(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of every option."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            yield name[2:], value if equals else following


def _hide_groups(parser: Parser) -> set[str]:
    """Return the names of option groups; remove them from the help, as their fields are for use."""
    options = {name: each for each in parser._actions for name in each.option_strings}
    groups = {name.partition(".")[0] for name in options if "." in name}
    for name in groups & options.keys():
        options[name].help = SUPPRESS
    return {name[2:] for name in groups}


def _check_file(file: str, groups: set[str]) -> None:
    """Check a file of options before it is parsed: jsonargparse would read others that it names."""
    values = read_config(Path(file))
    for name in ("config", *groups):
        if name in values and not (isinstance(values[name], dict) and name in groups):
            raise ConfigError(
                "a file of options names no other" if name == "config" else "not a set of fields",
                where=f"{file}: {name}", value=values[name], allowed="a mapping",
                fix=f"write the fields of {name} below it",
            )  # fmt: skip


def _check_groups(words: list[str], groups: set[str]) -> None:
    """Check that a group is given as a mapping: jsonargparse would open any other as a file."""
    for name, value in _given(words):
        if name in groups and not isinstance(_loaded(name, value), dict):
            raise ConfigError(
                "not a set of fields", where=f"--{name}", value=value, allowed="{field: value}",
                fix=f"set single fields: --{name}.FIELD VALUE",
            )  # fmt: skip


def _check_numbers(words: list[str], values: Namespace) -> None:
    """Check that what was not taken for text has decimal numbers: in YAML 1.1 1:30 is ninety."""
    for name, value in _given(words):
        if ":" in value and not isinstance(values.get(name), str | None):
            _loaded(name, value)


def _loaded(name: str, value: str) -> Any:
    try:
        return load_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            "not a value in YAML", where=f"--{name}", value=value,
            allowed="decimal numbers, texts in quotes, no key twice, no aliases",
            fix=" ".join(str(error).split()),
        ) from error  # fmt: skip


def files_of_options(words: list[str]) -> Iterator[str]:
    """Yield the files that ``--config`` names."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or following):
            yield value if equals else following


def _without_files(words: list[str]) -> list[str]:
    """Return the words without ``--config`` and its files; one that lacks its file stays."""
    around = zip(["", *words], words, [*words[1:], ""], strict=False)
    return [
        word for last, word, following in around
        if last != "--config" and not word.startswith("--config=")
        and not (word == "--config" and following)
    ]  # fmt: skip


def at_home(value: Any) -> Any:
    """Return a value with the home folder for ``~/``, which no shell expands behind ``=``."""
    if isinstance(value, dict):
        return {key: each if key == "prompt" else at_home(each) for key, each in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value


def as_utf8(word: str) -> str:
    """Return an argument whose bytes Python may have read in another encoding.

    Bytes that are not UTF-8 stay as Python read them: they may name a file.
    """
    try:
        return word if is_text(word) else os.fsencode(word).decode()
    except UnicodeError:
        return word


def is_text(word: str) -> bool:
    """Return whether Python could read all bytes of an argument."""
    return not _SURROGATES.search(word)


def not_utf8(where: str, value: str) -> DataError:
    """Return the error for an argument that is no text."""
    return DataError(
        "the argument is not UTF-8 text", where=where, value=value, allowed="UTF-8",
        fix="write it in UTF-8",
    )  # fmt: skip


_SURROGATES = re.compile("[\ud800-\udfff]")


def with_underscores(word: str, flags: Iterable[str] = (), following: str = "") -> str:
    """Turn ``--max-new-tokens`` into ``--max_new_tokens`` and ``--quiet`` into ``--quiet=true``."""
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"--[a-z][\w.-]*", name):
        return word
    name = "--" + name[2:].replace("-", "_")
    is_bare = not equals and following not in ("true", "false")
    return f"{name}=true" if is_bare and name[2:] in flags else name + equals + value
