"""Train a looped model on your own text, then ask how much each further loop is worth.

    python examples/train_on_your_text.py                    # a slice of Python's standard library
    python examples/train_on_your_text.py my_notes.txt       # a file or folder: .txt .md .py .jsonl

Text becomes token shards, shards become batches, the trainer draws a depth for every sequence, and
the validation text is scored at several depths, deeper ones than were trained included.
"""

import argparse
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from open_mythos import mythos_nano
from open_mythos.data import EpochWindows, Loader, TokenShards, prepare, read_documents
from open_mythos.evaluation import evaluate_depths
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train import (
    DepthConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    build_model,
)

DEPTHS = (1, 2, 4, 8, 16)


class Printer:
    """Receives what the trainer measures; anything with this one method can."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        print(
            f"step {step:4d}   loss {metrics['loss']:.3f}   rho(A) {metrics['rho']:.4f}"
            f"   {metrics['tokens_per_second']:,.0f} tokens/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", nargs="?", help="a text file, or a folder of text files")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps")
    args = parser.parse_args()

    # Bytes are a vocabulary that needs no training and no download.
    tokenizer = ByteTokenizer()
    texts = read_documents(args.source) if args.source else islice(read_documents("stdlib"), 64)
    # Documents are kept for validation as wholes, so a single long file is cut into several.
    documents = (text[i : i + 4000] for text in texts for i in range(0, len(text), 4000))
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        index = prepare(documents, shards, tokenizer, val_fraction=0.1)
        for name, split in index.splits.items():
            print(f"{name:>5}: {split.documents} documents, {split.tokens:,} tokens")
        train_and_report(shards, args.steps)


def train_and_report(folder: Path, steps: int) -> None:
    """Train on the prepared folder, then print loss and bits per byte for each depth."""
    config = RunConfig(
        model=mythos_nano(),
        # Poisson depths: the model meets shallow and deep runs, and learns to be good at all.
        depth=DepthConfig(plan="poisson", mean=4.0),
        optim=OptimConfig(lr=3e-3),
        train=TrainConfig(
            steps=steps, seq_len=128, global_batch=8, warmup_steps=min(20, steps),
            log_every=max(1, steps // 6),
        ),
    )  # fmt: skip
    text = TokenShards(folder)
    loader = Loader(text, seq_len=128, global_batch=8, seed=config.train.seed)
    model = build_model(config)
    Trainer(model, loader, config, loggers=[Printer()]).fit()

    unseen = TokenShards(folder, "val")
    batches = EpochWindows(unseen, seq_len=128, global_batch=8, max_windows=64)
    print("\nloops   loss on unseen text   bits per byte")
    for row in evaluate_depths(model, batches, DEPTHS, bytes_per_token=unseen.bytes_per_token):
        print(f"{row.depth:5d}   {row.loss:19.3f}   {row.bits_per_byte:13.3f}")

    prompt = torch.tensor([ByteTokenizer().encode("def ")])
    ids = model.generate(prompt, max_new_tokens=80, n_loops=8, temperature=0.7, seed=0)
    print(f"\n{ByteTokenizer().decode(ids[0].tolist())}")


if __name__ == "__main__":
    main()
