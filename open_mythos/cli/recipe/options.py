"""What can be said to a recipe on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings

from open_mythos.cli.parser import Parser
from open_mythos.config import MythosConfig
from open_mythos.data.index import INDEX_FILE
from open_mythos.errors import ConfigError, DataError
from open_mythos.train.config import RunConfig, TrainConfig
from open_mythos.variants import VARIANTS, variant


@dataclass(frozen=True)
class Recipe:
    """A run, and the text that it trains on."""

    config: RunConfig
    """The run; the vocabulary is settled when the tokenizer is there."""
    source: str
    """A prepared folder, or what :func:`~open_mythos.data.open_corpus` takes."""
    tokenizer: str
    """Its name or path; "" takes that of the prepared folder or of the checkpoint."""
    text_field: str
    """JSON key or Parquet column of the text."""
    held_out: float
    """Share of a stream's documents to evaluate on."""
    workers: int
    """Processes of each rank that read and tokenise a stream."""
    checkpoint: str
    """Model to start from; "" starts from random weights."""
    resume: str
    """As for ``open-mythos train``."""
    vocabulary_given: bool
    """Whether the command line names ``model.vocab_size``."""
    dry_run: bool
    quiet: bool

    @property
    def is_prepared(self) -> bool:
        """Whether the source is a folder of token shards."""
        return (Path(self.source) / INDEX_FILE).is_file()


def parse_recipe(
    argv: list[str],
    defaults: RunConfig,
    *,
    description: str,
    source: str,
    subsets: Mapping[str, str],
    tokenizer: str,
    tokens: int,
    held_out: float,
    workers: int,
    from_checkpoint: bool,
) -> Recipe:
    """The recipe that ``argv`` asks for; the arguments are those of ``run_recipe``.

    Raises:
        ConfigError: An option is unknown, or its value is not allowed.
        DataError: The checkpoint is none.
    """
    argv = [_with_underscores(word) for word in argv]
    defaults = deepcopy(defaults)
    special = "checkpoint" if from_checkpoint else "variant"
    name, argv = _taken(argv, special)
    if from_checkpoint:
        defaults = _run_of(name, defaults)
    elif name:
        defaults.model = variant(name)
    defaults.train.steps = _steps(defaults.train, tokens)  # so that --print_config shows them
    parser = _parser(defaults, description, source, subsets, from_checkpoint)
    # a checkpoint brings a tokenizer; another may be named
    own = {"tokenizer": "" if from_checkpoint else tokenizer, "held_out": held_out}
    parser.set_defaults({**own, "workers": workers})
    values = parser.parse_args(argv).as_dict()
    if values.pop(special):
        raise ConfigError(
            "a file cannot say this: it decides what the other defaults are", where=special,
            fix=f"say --{special} on the command line",
        )  # fmt: skip

    def is_asked_for(section: str, field: str) -> bool:
        """Whether a field is named; one that a file merely repeats is not."""
        own = getattr(getattr(defaults, section), field)
        return bool(_taken(argv, f"{section}.{field}")[0]) or values[section][field] != own

    vocabulary_given = is_asked_for("model", "vocab_size")
    steps_given = is_asked_for("train", "steps")
    values.pop("config", None)
    train = values["train"]
    if not is_asked_for("train", "micro_batch") and train["global_batch"] > 0:
        # the recipe's own is a wish: another global batch must not make it a mistake
        train["micro_batch"] = fitting_micro_batch(train["micro_batch"], train["global_batch"])
    config = RunConfig.from_dict({each.name: values.pop(each.name) for each in fields(RunConfig)})
    wanted = values.pop("tokens")
    if not steps_given:
        config.train.steps = _steps(config.train, tokens if wanted is None else wanted)
        config.validate()
    elif wanted is not None:
        raise ConfigError(
            "the length of the run is said twice", where="--tokens, --train.steps",
            value=(wanted, config.train.steps), allowed="one of them",
        )  # fmt: skip
    subset = values.pop("subset", None)
    if not values["source"]:
        values["source"] = _of_subset(subset, subsets)
    elif subset is not None:
        raise ConfigError(
            "the text is said twice", where="--source, --subset", value=(values["source"], subset),
            allowed="one of them",
        )  # fmt: skip
    if not 0 <= values["held_out"] < 1:
        raise ConfigError(
            "not a share", where="--held_out", value=values["held_out"], allowed="[0, 1)"
        )
    checkpoint = name if from_checkpoint else ""
    return Recipe(config, checkpoint=checkpoint, vocabulary_given=vocabulary_given, **values)


def fitting_micro_batch(wanted: int | None, batch: int) -> int | None:
    """The largest divisor of ``batch`` up to ``wanted``; None stays None."""
    if wanted is None:
        return None
    return max(size for size in range(1, max(1, min(wanted, batch)) + 1) if batch % size == 0)


def _parser(
    defaults: RunConfig,
    description: str,
    source: str,
    subsets: Mapping[str, str],
    from_checkpoint: bool,
) -> Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(description=description)
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    if from_checkpoint:
        parser.add_argument(
            "--checkpoint", type=str,
            help="necessary: a model, a checkpoint or a run (its newest checkpoint)",
        )  # fmt: skip
    else:
        parser.add_argument("--variant", type=str, help=f"model: {', '.join(VARIANTS)}")
    parser.add_argument(
        "--source", type=str, default=source,
        help='text: a file or folder (.txt, .jsonl, .parquet), a URL such as hf://datasets/..., '
        '"stdlib", or a folder that `open-mythos data prepare` wrote',
    )  # fmt: skip
    if subsets:
        parser.add_argument("--subset", type=str, help=f"of the data: {', '.join(subsets)}")
    parser.add_argument(
        "--tokenizer", type=str, help='"byte", a path, or a model of the Hugging Face hub'
    )
    parser.add_argument("--tokens", type=int, help="length of the run, instead of train.steps")
    parser.add_argument(
        "--text_field", type=str, default="text", help="JSON key or Parquet column of the text"
    )
    parser.add_argument(
        "--held_out", type=float, help="share of a stream's documents to evaluate on; 0 for none"
    )
    parser.add_argument(
        "--workers", type=int, help="processes of each rank that read and tokenise a stream"
    )
    parser.add_argument(
        "--resume", type=str, default="",
        help='"latest" goes on with the newest valid checkpoint of train.out_dir, "strict" refuses '
        'if the newest is damaged, "auto" begins anew if there is none; a path goes on with that',
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the plan, and touch no data")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_class_arguments(RunConfig)
    parser.set_defaults(defaults.to_dict())
    return parser


def _with_underscores(word: str) -> str:
    """``--dry_run`` for ``--dry-run``; values stay as they are."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    return "--" + name[2:].replace("-", "_") + equals + value


def _taken(argv: list[str], option: str) -> tuple[str, list[str]]:
    """The value of an option, "" where it is absent; and the command line without it."""
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == f"--{option}":
            rest = place + 1 if equals else place + 2
            value = value if equals else "".join(argv[place + 1 : rest])
            return value, [*argv[:place], *argv[rest:]]
    return "", argv


def _steps(train: TrainConfig, tokens: int) -> int:
    """Steps of ``tokens`` tokens; those of the configuration for 0."""
    if tokens < 0:
        raise ConfigError("not a length", where="--tokens", value=tokens, allowed="an integer >= 1")
    return -(-tokens // (train.global_batch * train.seq_len)) if tokens else train.steps


def _of_subset(subset: str | None, subsets: Mapping[str, str]) -> str:
    if not subsets:
        raise ConfigError(
            "no text is named", where="--source", value="",
            allowed='a file, a folder, a URL, or "stdlib"', fix="say --source PATH",
        )  # fmt: skip
    name = next(iter(subsets)) if subset is None else subset
    if name not in subsets:
        raise ConfigError(
            "no such subset", where="--subset", value=name, allowed=", ".join(subsets)
        )
    return subsets[name]


def _run_of(checkpoint: str, defaults: RunConfig) -> RunConfig:
    """``defaults`` with the architecture of a saved model.

    Raises:
        ConfigError: None is named.
        DataError: There is no model.
    """
    if not checkpoint:
        raise ConfigError(
            "no model is named to go on with", where="--checkpoint", value="",
            allowed="a model, a checkpoint or a run", fix="say --checkpoint FOLDER",
        )  # fmt: skip
    from open_mythos.hub.pretrained import CONFIG_FILE, model_directory

    path = model_directory(checkpoint) / CONFIG_FILE
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        defaults.architecture = description["architecture"]
        defaults.model = MythosConfig.from_dict(description["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "the checkpoint does not say what model it is of", where=str(path), value=str(error),
            fix="copy the folder again",
        ) from error  # fmt: skip
    return defaults
