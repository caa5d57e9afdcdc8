"""A recipe's text: tokenizer, batches, and what to evaluate on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from open_mythos.cli.recipe.options import Recipe
from open_mythos.cli.run_data import beside
from open_mythos.cli.training import evaluation
from open_mythos.data import (
    Batch,
    Corpus,
    HeldOutWindows,
    Loader,
    StreamLoader,
    TokenShards,
    open_corpus,
)
from open_mythos.data.stream_held_out import TooFewHeldOutError
from open_mythos.devices import training_dtype
from open_mythos.distributed import rank, world_size
from open_mythos.errors import DataError
from open_mythos.evaluation import evaluate_depths
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer import Tokenizer, load_tokenizer
from open_mythos.train import RunConfig
from open_mythos.train.build import Model
from open_mythos.train.parallel.process_group import first_decides
from open_mythos.train.trainer import Evaluate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """What a recipe trains on."""

    tokenizer: Tokenizer
    loader: Loader | StreamLoader
    evaluate: Evaluate | None
    """None where nothing is held out."""
    about: dict[str, Any]
    """Where it came from; JSON-ready."""


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """That of the prepared folder, or the one named, or the one beside the checkpoint.

    Raises:
        DataError: There is none, or a prepared folder has another than the one beside it.
        EnvironmentError_: The hub cannot be reached.
    """
    if recipe.is_prepared:
        return TokenShards(recipe.source).tokenizer()
    if recipe.tokenizer:
        return load_tokenizer(recipe.tokenizer)
    stored = beside(recipe.checkpoint, TOKENIZER_FOLDER)
    if stored is None:
        raise DataError(
            "the checkpoint brings no tokenizer", where="--checkpoint", value=recipe.checkpoint,
            allowed=f"a run, whose folder has a {TOKENIZER_FOLDER}/", fix="name one: --tokenizer",
        )  # fmt: skip
    return load_tokenizer(stored)


def recipe_text(recipe: Recipe, config: RunConfig, tokenizer: Tokenizer) -> Text:
    """Open the source, for this process of the group.

    Raises:
        DataError: The source is not there, or damaged.
        EnvironmentError_: The hub cannot be reached, or a package is missing.
    """
    train = config.train
    shape: dict[str, Any] = {
        "seq_len": train.seq_len, "global_batch": train.global_batch, "seed": train.seed,
        "rank": rank(), "world_size": world_size(),
        "mask_documents": config.data.document_masks,
    }  # fmt: skip
    if recipe.is_prepared:
        config.data.path = recipe.source
        shards = TokenShards(recipe.source)
        origin = {"source": recipe.source, "dataset": shards.fingerprint}
        return Text(tokenizer, Loader(shards, **shape), evaluation(config), origin)
    # one process lists the files, so that all see the same ones
    listed = first_decides(lambda: open_corpus(recipe.source, recipe.text_field).to_json())
    corpus = Corpus.from_json(listed)
    loader = StreamLoader(
        corpus, tokenizer, held_out=recipe.held_out, num_workers=recipe.workers, **shape
    )
    about: dict[str, Any] = {
        "source": recipe.source, "root": corpus.root, "text_field": recipe.text_field,
        "files": len(corpus.files), "bytes": corpus.size, "corpus": corpus.fingerprint,
        "held_out": recipe.held_out, "tokenizer": tokenizer.name,
    }  # fmt: skip
    return Text(tokenizer, loader, _held_out(corpus, tokenizer, recipe, config), about)


def _held_out(
    corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe, config: RunConfig
) -> Evaluate | None:
    """The loss on documents that the stream leaves out.

    Every process reads and computes all of the windows: they are few, and so all keep step.
    """
    if not recipe.held_out:
        return None
    train = config.train
    try:
        windows = HeldOutWindows(
            corpus, tokenizer, seq_len=train.seq_len, windows=config.data.eval_windows,
            held_out=recipe.held_out, batch=train.micro_batch or train.global_batch,
            mask_documents=config.data.document_masks,
        )  # fmt: skip
    except TooFewHeldOutError as error:
        logger.warning("nothing will be evaluated: %s", error)
        return None
    return _evaluation(windows, windows.bytes_per_token, config)


def _evaluation(windows: Iterable[Batch], bytes_per_token: float, config: RunConfig) -> Evaluate:
    def evaluate(model: Model, depths: list[int]) -> dict[str, Any]:
        rows = evaluate_depths(
            model, windows, depths, bytes_per_token=bytes_per_token,
            dtype=training_dtype(config.train.dtype, model.head.weight.device),
        )  # fmt: skip
        return {"depths": [asdict(row) for row in rows]}

    return evaluate
