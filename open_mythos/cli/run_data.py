"""What several commands do with a stored model."""

from __future__ import annotations

import shutil
from pathlib import Path

from open_mythos.cli.options import is_text, not_utf8
from open_mythos.errors import ConfigError
from open_mythos.hub.places import model_directory
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import AtLeast, exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import CONFIG_FILE, TOKENIZER_FOLDER, copy_depths, find_beside


def depth_of(
    model: CausalLM, n_loops: int | None, exit: str, min_loops: int | None = None
) -> Depth:
    """Return the depth that ``--n-loops``, ``--exit`` and ``--min-loops`` request."""
    if isinstance(model, OpenMythos):
        rule = exit_rule(exit, model) if exit else None
        depth = Depth(n_loops, rule)
        if min_loops is None:
            return depth
        most = depth.most(model.cfg.max_loop_iters)
        if rule is None or min_loops > most:
            raise ConfigError(
                "nothing to keep from exiting earlier", where="--min-loops", value=min_loops,
                allowed=f"at most {most} loops, together with --exit", fix="omit --min-loops",
            )  # fmt: skip
        return Depth(depth.n_loops, AtLeast(rule, min_loops))
    for option, value in (
        ("--n-loops", n_loops), ("--exit", exit or None), ("--min-loops", min_loops),
    ):  # fmt: skip
        if value is not None:
            raise ConfigError(
                "a dense model has no loops", where=option, value=value, allowed="looped models"
            )
    return Depth()


def text_argument(text: str, where: str) -> str:
    """Return the text of an argument.

    Raises:
        DataError: It is not UTF-8.
    """
    if not is_text(text):
        raise not_utf8(where, text)
    return text


def copy_run_files(checkpoint: str, folder: Path) -> None:
    """Copy tokenizer, configuration and validated depths of a model's run into ``folder``."""
    copy_depths(model_directory(checkpoint), folder)
    for name in (TOKENIZER_FOLDER, CONFIG_FILE):
        found = find_beside(model_directory(checkpoint), name)
        if found is not None and found.is_dir():
            shutil.copytree(found, folder / name)
        elif found is not None:
            shutil.copy(found, folder / name)
