"""Recipes: a script with a configuration becomes a program with options.

>>> import sys
>>> from open_mythos import mythos_nano
>>> from open_mythos.cli.recipe import run_recipe
>>> from open_mythos.train import RunConfig
>>> if __name__ == "__main__":                                          # doctest: +SKIP
...     sys.exit(run_recipe(RunConfig(model=mythos_nano()), description=..., source="stdlib"))
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from open_mythos.cli.recipe.options import parse_recipe
from open_mythos.cli.recipe.plan import plan
from open_mythos.distributed import local_rank
from open_mythos.errors import MythosError
from open_mythos.tokenizer import DEFAULT_MODEL_ID
from open_mythos.train.config import RunConfig

__all__ = ["run_recipe"]


def run_recipe(
    defaults: RunConfig,
    *,
    description: str,
    source: str = "",
    subsets: Mapping[str, str] | None = None,
    tokenizer: str = DEFAULT_MODEL_ID,
    tokens: int = 0,
    held_out: float = 0.005,
    workers: int = 2,
    from_checkpoint: bool = False,
    argv: Sequence[str] | None = None,
) -> int:
    """Train as the defaults and the command line say; under ``torchrun`` all processes together.

    The command line knows every field of the configuration (``--train.steps 3``), ``--variant``,
    ``--source``, ``--subset``, ``--tokenizer``, ``--tokens``, ``--resume``, ``--dry-run`` and what
    ``--help`` lists besides. A folder that ``open-mythos data prepare`` has written is trained on
    as it is; any other source is streamed.

    Args:
        defaults: The run. Its vocabulary becomes that of the tokenizer.
        description: What ``--help`` says about the recipe.
        source: What :func:`~open_mythos.data.open_corpus` takes, or a prepared folder; "" makes
            ``--source`` necessary.
        subsets: Name -> source, for ``--subset``; the first is the default, instead of ``source``.
        tokenizer: What :func:`~open_mythos.tokenizer.load_tokenizer` takes. Prepared folders have
            their own, and so have checkpoints.
        tokens: Tokens of the whole run, from which ``train.steps`` follows; 0 leaves the steps of
            ``defaults``.
        held_out: Share of the documents of a stream to evaluate on; 0 trains on all of them.
        workers: Processes of each rank that read and tokenise a stream.
        from_checkpoint: ``--checkpoint`` is necessary: a model to go on with, whose configuration
            replaces that of ``defaults``.
        argv: The command line; that of the process by default.

    Returns:
        The exit code, as of :func:`open_mythos.cli.main`.
    """
    try:
        recipe = parse_recipe(
            list(sys.argv[1:] if argv is None else argv), defaults, description=description,
            source=source, subsets=subsets or {}, tokenizer=tokenizer, tokens=tokens,
            held_out=held_out, workers=workers, from_checkpoint=from_checkpoint,
        )  # fmt: skip
        if recipe.dry_run:
            if local_rank() == 0:
                print(plan(recipe))
            return 0
        from open_mythos.cli.recipe.run import train_recipe

        train_recipe(recipe)
        return 0
    except MythosError as error:
        print(f"open-mythos: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
