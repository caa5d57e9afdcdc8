"""``open-mythos train``: a recipe or a variant, changed by files and options, is trained."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter

from open_mythos.checks import pick
from open_mythos.cli.options import Parser, new_parser, parse_words, with_underscores
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError, DataError
from open_mythos.train.config import RunConfig, TrainConfig, fitting_micro_batch
from open_mythos.train.recipes import RECIPES, Recipe, default_recipe
from open_mythos.variants import VARIANTS, variant

ALIASES = {
    "source": "data.source", "tokenizer": "data.tokenizer", "text_field": "data.text_field",
    "held_out": "data.held_out", "workers": "data.workers",
}  # fmt: skip
"""Short names of fields that recipes are often given."""
_GIVE_DEFAULTS = {
    "recipe": f"a configuration by name: {', '.join(RECIPES)}",
    "variant": f"defaults of --model.*: {', '.join(VARIANTS)}",
    "checkpoint": "weights to start from: a model, a checkpoint or a run; gives --model.* as well",
    "subset": "part of the recipe's dataset, such as sample-100BT",
    "tokens": "length of the run in tokens, instead of --train.steps",
}
"""Options that decide what the others default to; a file cannot name them."""


def train(
    config: RunConfig,
    resume: str = "",
    dry_run: bool = False,
    quiet: bool = False,
    fit_vocabulary: bool = True,
) -> int:
    """Train a model; under ``torchrun`` all processes together.

    Without a text it trains on the source of the running Python's standard library, as bytes.

    Args:
        config: The run; ``--print_config`` shows it whole, as YAML for ``--config``.
        resume: "latest" continues from the newest valid checkpoint of train.out_dir, "strict"
            raises if the newest is damaged, "auto" starts a new run if there is none; a path
            continues from that checkpoint.
        dry_run: Print what would be done; touch no data.
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
        train_run(config, resume=resume, loggers=loggers, fit_vocabulary=fit_vocabulary)
    return 0


def parse_train(words: list[str], summary: str) -> dict[str, Any]:
    """Return the arguments of :func:`train` that a command line means.

    Raises:
        ConfigError: An option is unknown, or its value is not allowed.
        DataError: The checkpoint holds no model.
    """
    words = [_full_name(with_underscores(word)) for word in words]
    first, words = _Defaults(add_help=False, allow_abbrev=False).parse_known_args(words)
    recipe = _recipe(first, asks_help=any(word in words for word in ("-h", "--help")))
    tokens = recipe.tokens if first.tokens is None else first.tokens
    defaults = recipe.config
    defaults.train.steps = _steps(defaults.train, tokens)  # so that --print_config shows them
    parser = _parser(summary, defaults)
    values = parse_words(parser, words, ("dry_run", "quiet"))

    def is_named(section: str, field: str) -> bool:
        """Whether a field was given; one that a file merely repeats was not."""
        own = getattr(getattr(defaults, section), field)
        option = f"--{section}.{field}"
        said = any(word == option or word.startswith(f"{option}=") for word in words)
        return said or values[section][field] != own

    fit_vocabulary = not is_named("model", "vocab_size")
    if not is_named("train", "micro_batch"):
        # the recipe's own fits its global batch; with another one it becomes a divisor again
        train = values["train"]
        train["micro_batch"] = fitting_micro_batch(train["micro_batch"], train["global_batch"])
    if values["data"]["path"] and values["data"]["source"] == defaults.data.source:
        values["data"]["source"] = ""  # named shards replace the recipe's stream
    steps_given = is_named("train", "steps")
    source_given = is_named("data", "source")
    config = RunConfig.from_dict({each.name: values.pop(each.name) for each in fields(RunConfig)})
    if not steps_given:
        config.train.steps = _steps(config.train, tokens)
        config.validate()
    elif first.tokens is not None:
        _said_twice("the length of the run", "--tokens, --train.steps")
    if first.subset is not None and (source_given or config.data.path):
        _said_twice("the text", "--source, --subset")
    if recipe.needs_text and not (config.data.source or config.data.path):
        raise ConfigError(
            "no text is named", where="--source", value="",
            allowed='a file, a folder, a URL, "stdlib", or prepared shards',
            fix="say --source PATH",
        )  # fmt: skip
    return {"config": config, "fit_vocabulary": fit_vocabulary, **values}


class _Defaults(argparse.ArgumentParser):
    """Reads the options that give others their defaults, before the others are read."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in _GIVE_DEFAULTS:
            self.add_argument(f"--{name}", type=int if name == "tokens" else str)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="open-mythos train", fix="see open-mythos train --help")


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


def _parser(summary: str, defaults: RunConfig) -> Parser:
    first = "\n".join(f"  --{name:<12} {text}" for name, text in _GIVE_DEFAULTS.items())
    short = ", ".join(f"--{name}" for name in ALIASES)
    parser = new_parser(
        "open-mythos train",
        f"{summary}\n\nOn the command line only:\n{first}\n\nShort for fields of --data: {short}",
    )
    parser.formatter_class = _Formatter
    parser.usage = "open-mythos train [OPTIONS]"
    parser.add_class_arguments(RunConfig)
    parser.set_defaults(defaults.to_dict())
    resume = '"latest", "strict" (raise if the newest is damaged), "auto" (or start), or a path'
    parser.add_argument("--resume", type=str, default="", help=f"continue a run: {resume}")
    parser.add_argument("--dry_run", type=bool, default=False, help="print the plan; touch no data")
    parser.add_argument("--quiet", type=bool, default=False, help="show no progress")
    return parser


def _full_name(word: str) -> str:
    name, equals, value = word.partition("=")
    full = ALIASES.get(name[2:]) if name.startswith("--") else None
    return f"--{full}{equals}{value}" if full else word


def _recipe(first: argparse.Namespace, *, asks_help: bool) -> Recipe:
    """Return the named recipe with the model, weights and subset that the command line names."""
    named = None if first.recipe is None else pick(RECIPES, first.recipe, "--recipe", what="recipe")
    recipe = named() if named else default_recipe()
    config = recipe.config
    if first.variant:
        config.model = variant(first.variant)
    if first.checkpoint:
        config.architecture, config.model = _architecture_of(first.checkpoint)
        config.train.init_from = first.checkpoint
    elif recipe.needs_checkpoint and not asks_help:
        raise ConfigError(
            "no weights are named to start from", where="--checkpoint", value="",
            allowed="a model, a checkpoint or a run", fix="say --checkpoint FOLDER",
        )  # fmt: skip
    if recipe.subsets:
        name = next(iter(recipe.subsets)) if first.subset is None else first.subset
        if name not in recipe.subsets:
            raise ConfigError(
                "no such subset", where="--subset", value=name, allowed=", ".join(recipe.subsets)
            )
        config.data.source = recipe.subsets[name]
    elif first.subset is not None:
        raise ConfigError("the recipe has no subsets", where="--subset", value=first.subset)
    return recipe


def _architecture_of(checkpoint: str) -> tuple[str, MythosConfig]:
    from open_mythos.hub.pretrained import CONFIG_FILE, model_directory

    path = model_directory(checkpoint) / CONFIG_FILE
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return description["architecture"], MythosConfig.from_dict(description["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "the checkpoint does not say what model it holds", where=str(path), value=str(error),
            fix="copy the folder again",
        ) from error  # fmt: skip


def _steps(train: TrainConfig, tokens: int) -> int:
    """Return the steps of ``tokens`` tokens; those of the configuration for 0."""
    if tokens < 0:
        raise ConfigError("not a length", where="--tokens", value=tokens, allowed="an integer >= 1")
    return -(-tokens // (train.global_batch * train.seq_len)) if tokens else train.steps


def _said_twice(what: str, options: str) -> NoReturn:
    raise ConfigError(f"{what} is given twice", where=options, allowed="one of them")
