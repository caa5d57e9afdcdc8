"""``open-mythos train``: train a recipe or variant with overrides from files and options."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter

from open_mythos.checks import check_count, check_fields, pick, unknown_key
from open_mythos.cli.options import (
    Parser,
    at_home,
    files_of_options,
    new_parser,
    parse_words,
    with_underscores,
)
from open_mythos.errors import ConfigError
from open_mythos.run_folder import read_config
from open_mythos.train.config import RunConfig, TrainConfig, fitting_micro_batch, no_text
from open_mythos.train.recipes import RECIPES, Recipe, default_recipe
from open_mythos.variants import VARIANTS, variant

ALIASES = {
    "source": "data.source", "tokenizer": "data.tokenizer", "text_field": "data.text_field",
    "held_out": "data.held_out", "workers": "data.workers",
}  # fmt: skip
"""Short names of often used fields."""
_GIVE_DEFAULTS = {
    "recipe": f"a predefined configuration: {', '.join(RECIPES)}",
    "variant": f"defaults of --model.*: {', '.join(VARIANTS)}",
    "checkpoint": "initial weights and --model.*: a model, a checkpoint or a run",
    "subset": "subset of the recipe's dataset, such as sample-100BT",
    "tokens": "length of the run in tokens, such as 1B, instead of --train.steps",
}
"""Options that set the defaults of others; command line only."""


def train(
    config: RunConfig,
    resume: str = "",
    allow: list[str] | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    fit_vocabulary: bool = True,
) -> int:
    """Train a model; see :func:`open_mythos.train.train_run`.

    Args:
        config: The run.
        resume: "latest", "strict", "auto", a path, or "" for a new run.
        allow: Fields that may differ from those of the checkpoint.
        dry_run: Print a summary instead.
        quiet: Show no progress.
        fit_vocabulary: Set the model's vocabulary to the tokenizer's.
    """
    if dry_run:
        from open_mythos.cli.dry_run import described
        from open_mythos.distributed import local_rank

        if local_rank() == 0:
            print(described(config, fit_vocabulary=fit_vocabulary))
        return 0
    from open_mythos.cli.progress import progress
    from open_mythos.train.parallel.process_group import process_group
    from open_mythos.train.run import train_run

    with (
        process_group(config.parallel, config.train.device),
        progress(config.train.steps, quiet, config.train.out_dir) as loggers,
    ):
        train_run(
            config, resume=resume, allow=allow or (), loggers=loggers, fit_vocabulary=fit_vocabulary
        )
    return 0


def parse_train(words: list[str], summary: str) -> dict[str, Any]:
    """Parse a command line into the arguments of :func:`train`.

    Raises:
        ConfigError: An option is unknown, or its value is not allowed.
        DataError: The checkpoint contains no model.
    """
    words = [_full_name(with_underscores(word)) for word in words]
    for file in files_of_options(words):
        _check_file(Path(at_home(file)))
    first, words = _parse_defaults(words)
    recipe = _recipe(first, asks_help=any(word in words for word in ("-h", "--help")))
    tokens = recipe.tokens if first.tokens is None else first.tokens
    defaults = recipe.config
    defaults.train.steps = _steps(defaults.train, tokens)  # so that --print_config shows them
    parser = _parser(summary, defaults)
    values = parse_words(parser, words, train)

    def is_named(section: str, field: str) -> bool:
        """Return whether an option sets the field, or a file changes it."""
        is_changed = values[section][field] != getattr(getattr(defaults, section), field)
        return is_changed or any(word.split("=")[0] == f"--{section}.{field}" for word in words)

    if isinstance(values["allow"], str):
        values["allow"] = [name for name in values["allow"].split(",") if name]
    train_values, data = values["train"], values["data"]
    fit_vocabulary = not is_named("model", "vocab_size")
    if not is_named("train", "micro_batch"):  # the default must divide another global batch, too
        size = fitting_micro_batch(train_values["micro_batch"], train_values["global_batch"])
        train_values["micro_batch"] = size
    if not is_named("train", "steps"):
        train_values["steps"] = _steps(TrainConfig(**train_values), tokens)
    elif first.tokens is not None:
        _given_twice("the length of the run", "--tokens, --train.steps")
    if first.subset is not None and (is_named("data", "source") or data["path"]):
        _given_twice("the text", "--source, --subset")
    if data["path"] and data["source"] == defaults.data.source:
        data["source"] = ""  # prepared shards replace the recipe's stream
    config = RunConfig.from_dict({each.name: values.pop(each.name) for each in fields(RunConfig)})
    depth = next((word for word in words if word.startswith("--depth.")), "")
    if depth and config.architecture == "dense":
        raise ConfigError(
            "a dense model has no loops", where=depth.partition("=")[0], value=depth,
            allowed="looped models", fix="leave it out",
        )  # fmt: skip
    if recipe.needs_text and not (config.data.source or config.data.path):
        raise no_text("--source")
    return {"config": config, "fit_vocabulary": fit_vocabulary, **values}


def _parse_defaults(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options that set the defaults of others; return their values and other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in _GIVE_DEFAULTS:
        parser.add_argument(f"--{name}")
    try:
        first, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(
            str(error),
            where="open-mythos train",
            value=words,
            allowed="the options of open-mythos train",
            fix="see open-mythos train --help",
        ) from error
    if first.tokens is not None:
        first.tokens = check_count("--tokens", _count(first.tokens))
    return first, rest


def _count(text: str) -> int:
    """Return the number of tokens in ``text``: 1000000, 1M."""
    try:
        return int(text)
    except ValueError:
        from open_mythos.plan.report import parse_count

        return round(parse_count(text, "--tokens"))


def _check_file(path: Path) -> None:
    """Check the sections of a file: a wrong type must not vanish behind an option."""
    sections = {each.name for each in fields(RunConfig)} - {"architecture"}
    for name, value in read_config(path).items():
        if name in _GIVE_DEFAULTS:
            raise ConfigError(
                f"a file cannot say {name!r}: it sets the defaults that the file changes",
                where=str(path), value=value, allowed="fields of the run",
                fix=f"give --{name} on the command line",
            )  # fmt: skip
        known = {*sections, "architecture", "resume", "allow", "dry_run", "quiet"}
        if name.split(".")[0] not in known:
            raise unknown_key(name, known, str(path))


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults that keeps the line breaks of the description."""


def _parser(summary: str, defaults: RunConfig) -> Parser:
    first = "\n".join(f"  --{name:<12} {text}" for name, text in _GIVE_DEFAULTS.items())
    short = ", ".join(f"--{name}" for name in ALIASES)
    parser = new_parser(
        "open-mythos train",
        f"{summary}\n\nCommand line only, not in a --config file:\n{first}\n\n"
        f"Short for fields of --data: {short}",
    )
    parser.formatter_class = _Formatter
    parser.usage = "open-mythos train [OPTIONS]"
    parser.add_class_arguments(RunConfig)
    parser.set_defaults(defaults.to_dict())
    resume = '"latest", "strict" (raise if the newest is damaged), "auto" (or start), or a path'
    parser.add_argument("--resume", type=str, default="", help=f"continue a run: {resume}")
    may = "with --resume: fields that may differ from the saved ones, such as optim.lr"
    parser.add_argument("--allow", type=list[str] | str | None, default=None, help=may)
    parser.add_argument("--dry_run", type=bool, default=False, help="print a summary, do nothing")
    parser.add_argument("--quiet", type=bool, default=False, help="show no progress")
    return parser


def _full_name(word: str) -> str:
    name, equals, value = word.partition("=")
    full = ALIASES.get(name[2:]) if name.startswith("--") else None
    return f"--{full}{equals}{value}" if full else word


def _recipe(first: argparse.Namespace, *, asks_help: bool) -> Recipe:
    """Return the recipe with the model, initial weights and subset of the command line."""
    named = None if first.recipe is None else pick(RECIPES, first.recipe, "--recipe", what="recipe")
    recipe = named() if named else default_recipe(first.variant or "tiny")
    config = recipe.config
    if first.variant:
        config.model = variant(first.variant)
    if first.checkpoint is not None:
        first.checkpoint = at_home(first.checkpoint)
        from open_mythos.cli.info import described_model
        from open_mythos.hub.places import model_directory

        config.model, n_layers = described_model(str(model_directory(first.checkpoint)))
        config.architecture = "looped" if n_layers is None else "dense"
        config.train.init_from = first.checkpoint
    elif recipe.needs_checkpoint and not asks_help:
        raise ConfigError(
            "the recipe needs initial weights", where="--checkpoint", value="",
            allowed="a model, a checkpoint or a run", fix="add --checkpoint FOLDER",
        )  # fmt: skip
    if recipe.subsets:
        name = next(iter(recipe.subsets)) if first.subset is None else first.subset
        config.data.source = pick(recipe.subsets, name, "--subset", what="subset")
    elif first.subset is not None:
        raise ConfigError(
            "the recipe has no subsets",
            where="--subset",
            value=first.subset,
            allowed="recipes that name subsets",
        )
    return recipe


def _steps(train: TrainConfig, tokens: int) -> int:
    """Return the steps for ``tokens`` tokens; those of ``train`` for 0."""
    check_fields("train", train)
    return -(-tokens // (train.global_batch * train.seq_len)) if tokens else train.steps


def _given_twice(what: str, options: str) -> NoReturn:
    raise ConfigError(f"{what} is given twice", where=options, value="both", allowed="one of them")
