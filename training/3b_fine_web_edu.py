"""Train the 3B variant on 30 B tokens of FineWeb-Edu.

    python training/3b_fine_web_edu.py --dry-run
    python training/3b_fine_web_edu.py
    torchrun --nproc_per_node=8 training/3b_fine_web_edu.py --subset sample-100BT

The tokenizer is that of gpt-oss-20b. Its vocabulary of 200,064 makes 4.2 B parameters of the
variant, whose name assumes a vocabulary of 32,000; with --model.tie_embeddings true it has 3.6 B.
Parameters, gradients and optimizer state in float32 take 16 bytes per parameter (67 GB, or 57 GB
tied), plus activations. One process needs a GPU that holds them (for less activation memory:
--train.micro_batch 1); several processes shard them by FSDP2.

The default subset has 10 B tokens, so 30 B are three epochs. sample-100BT repeats nothing.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "3b_fine_web_edu", *sys.argv[1:]]))
